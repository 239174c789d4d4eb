package kube

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/hex"
	"errors"
)

// The plugin's sealed form, with Go's cryptography: format byte 1, fingerprint
// [16], nonce[24], then XAES-256-GCM of the plaintext. The AAD is the 17 bytes
// before the nonce and a byte for the API: 1 is v1beta1, 2 is v2.

func (k kek) seal(api byte, plaintext []byte) []byte {
	fingerprint, _ := hex.DecodeString(k.id())
	header := append([]byte{1}, fingerprint...)
	nonce := make([]byte, 24)
	rand.Read(nonce)
	return k.xaes(nonce).Seal(append(bytes.Clone(header), nonce...), nonce[12:], plaintext, append(header, api))
}

func (k kek) open(api byte, sealed []byte) ([]byte, error) {
	if len(sealed) < 57 || sealed[0] != 1 || hex.EncodeToString(sealed[1:17]) != k.id() {
		return nil, errors.New("another format or key")
	}
	return k.xaes(sealed[17:41]).Open(nil, sealed[29:41], sealed[41:], append(bytes.Clone(sealed[:17]), api))
}

// xaes derives the key of one message from the first half of its nonce (C2SP XAES-256-GCM).
func (k kek) xaes(nonce []byte) cipher.AEAD {
	block, _ := aes.NewCipher(k.bytes())
	var k1, derived [32]byte
	block.Encrypt(k1[:16], k1[:16])
	carry := k1[0] >> 7
	for i := range 15 {
		k1[i] = k1[i]<<1 | k1[i+1]>>7
	}
	k1[15] = k1[15]<<1 ^ carry*0x87
	for half := range 2 {
		m := append([]byte{0, byte(half + 1), 'X', 0}, nonce[:12]...)
		for i := range m {
			m[i] ^= k1[i]
		}
		block.Encrypt(derived[16*half:], m)
	}
	block, _ = aes.NewCipher(derived[:])
	aead, _ := cipher.NewGCM(block)
	return aead
}
