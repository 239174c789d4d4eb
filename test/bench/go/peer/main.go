// peer is a KMS plugin as a Go programmer writes one today: Kubernetes' own service
// library, AES-256-GCM from the standard library, and nothing else.
//
//	peer SOCKET        KMS v2
package main

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"log"
	"os"
	"time"

	"k8s.io/kms/pkg/service"
)

type plugin struct {
	aead  cipher.AEAD
	keyID string
}

func newPlugin(kek []byte) (*plugin, error) {
	block, err := aes.NewCipher(kek)
	if err != nil {
		return nil, err
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256(kek)
	return &plugin{aead: aead, keyID: hex.EncodeToString(sum[:16])}, nil
}

func (p *plugin) seal(plaintext []byte) []byte {
	nonce := make([]byte, p.aead.NonceSize(), p.aead.NonceSize()+len(plaintext)+p.aead.Overhead())
	rand.Read(nonce)
	return p.aead.Seal(nonce, nonce, plaintext, nil)
}

func (p *plugin) open(ciphertext []byte) ([]byte, error) {
	n := p.aead.NonceSize()
	if len(ciphertext) < n {
		return nil, errors.New("the ciphertext is too short")
	}
	return p.aead.Open(nil, ciphertext[:n], ciphertext[n:], nil)
}

func (p *plugin) Status(context.Context) (*service.StatusResponse, error) {
	return &service.StatusResponse{Version: "v2", Healthz: "ok", KeyID: p.keyID}, nil
}

func (p *plugin) Encrypt(_ context.Context, _ string, plaintext []byte) (*service.EncryptResponse, error) {
	return &service.EncryptResponse{Ciphertext: p.seal(plaintext), KeyID: p.keyID}, nil
}

func (p *plugin) Decrypt(_ context.Context, _ string, request *service.DecryptRequest) ([]byte, error) {
	if request.KeyID != p.keyID {
		return nil, errors.New("unknown key_id")
	}
	return p.open(request.Ciphertext)
}

func main() {
	kek := make([]byte, 32)
	rand.Read(kek)
	p, err := newPlugin(kek)
	if err != nil {
		log.Fatal(err)
	}
	log.Fatal(service.NewGRPCService(os.Args[1], 3*time.Second, p).ListenAndServe())
}
