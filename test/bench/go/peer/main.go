// peer is a KMS plugin as a Go programmer writes one today: Kubernetes' own service
// library, AES-256-GCM from the standard library, and nothing else.
//
//	peer SOCKET        KMS v2
//	peer -v1 SOCKET    KMS v1beta1, for which there is no library
package main

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"flag"
	"log"
	"net"
	"time"

	"google.golang.org/grpc"
	"k8s.io/kms/apis/v1beta1"
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

// KMS v2.

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

// KMS v1beta1.

type pluginV1 struct {
	v1beta1.UnimplementedKeyManagementServiceServer
	*plugin
}

func (p pluginV1) Version(context.Context, *v1beta1.VersionRequest) (*v1beta1.VersionResponse, error) {
	return &v1beta1.VersionResponse{Version: "v1beta1", RuntimeName: "peer", RuntimeVersion: "0.1.0"}, nil
}

func (p pluginV1) Encrypt(_ context.Context, request *v1beta1.EncryptRequest) (*v1beta1.EncryptResponse, error) {
	return &v1beta1.EncryptResponse{Cipher: p.seal(request.Plain)}, nil
}

func (p pluginV1) Decrypt(_ context.Context, request *v1beta1.DecryptRequest) (*v1beta1.DecryptResponse, error) {
	plain, err := p.open(request.Cipher)
	return &v1beta1.DecryptResponse{Plain: plain}, err
}

func serveV1(p *plugin, path string) error {
	listener, err := net.Listen("unix", path)
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	v1beta1.RegisterKeyManagementServiceServer(server, pluginV1{plugin: p})
	return server.Serve(listener)
}

func main() {
	v1 := flag.Bool("v1", false, "serve v1beta1")
	flag.Parse()
	kek := make([]byte, 32)
	rand.Read(kek)
	p, err := newPlugin(kek)
	if err != nil {
		log.Fatal(err)
	}
	if *v1 {
		log.Fatal(serveV1(p, flag.Arg(0)))
	}
	log.Fatal(service.NewGRPCService(flag.Arg(0), 3*time.Second, p).ListenAndServe())
}
