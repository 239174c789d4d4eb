// client is a load source on grpc-go, the client that kube-apiserver is made of.
//
//	client [-n REQUESTS] SOCKET         KMS v2 Encrypt, one at a time
//	client -values N -dir DIR SOCKET    N objects as a KMS v1 provider stores them in etcd
package main

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/binary"
	"flag"
	"fmt"
	"log"
	"net"
	"os"
	"path/filepath"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/encoding/protowire"
	"k8s.io/kms/apis/v1beta1"
	kmsapi "k8s.io/kms/apis/v2"
)

func check(err error) {
	if err != nil {
		log.Fatal(err)
	}
}

// dial does what kube-apiserver does.
func dial(path string) *grpc.ClientConn {
	conn, err := grpc.NewClient("passthrough:///"+path,
		grpc.WithAuthority("localhost"),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.WaitForReady(true)),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
			return net.DialUnix("unix", nil, &net.UnixAddr{Name: path})
		}))
	check(err)
	return conn
}

func withDeadline(call func(context.Context) error) {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	check(call(ctx))
}

func load(path string, requests int) {
	client := kmsapi.NewKeyManagementServiceClient(dial(path))
	request := &kmsapi.EncryptRequest{Plaintext: make([]byte, 32), Uid: "00000000-0000-4000-8000-000000000000"}
	samples := make([]time.Duration, requests)
	for i := range samples {
		sent := time.Now()
		withDeadline(func(ctx context.Context) error {
			_, err := client.Encrypt(ctx, request)
			return err
		})
		samples[i] = time.Since(sent)
	}
	slices.Sort(samples)
	us := func(i int) float64 { return float64(samples[i].Nanoseconds()) / 1e3 }
	fmt.Printf("p50_us=%.3f p99_us=%.3f\n", us(requests/2), us(requests*99/100))
}

// object is one value of etcd: prefix, length and sealed DEK, nonce, AES-GCM.
func object(client v1beta1.KeyManagementServiceClient, key string) []byte {
	dek, nonce := make([]byte, 32), make([]byte, 12)
	rand.Read(dek)
	rand.Read(nonce)
	value := []byte("k8s:enc:kms:v1:name:")
	withDeadline(func(ctx context.Context) error {
		sealed, err := client.Encrypt(ctx, &v1beta1.EncryptRequest{Version: "v1beta1", Plain: dek})
		if err == nil {
			value = binary.BigEndian.AppendUint16(value, uint16(len(sealed.Cipher)))
			value = append(value, sealed.Cipher...)
		}
		return err
	})
	block, err := aes.NewCipher(dek)
	check(err)
	aead, err := cipher.NewGCM(block)
	check(err)
	return aead.Seal(append(value, nonce...), nonce, make([]byte, 1024), []byte(key))
}

// values writes DIR/each/NUMBER, etcd RangeResponses of one entry, and DIR/all, one of all entries.
func values(path, dir string, count int) {
	client := v1beta1.NewKeyManagementServiceClient(dial(path))
	check(os.MkdirAll(filepath.Join(dir, "each"), 0o755))
	var all []byte
	for i := range count {
		key := fmt.Sprintf("/registry/secrets/default/%d", i)
		entry := protowire.AppendTag(nil, 1, protowire.BytesType)
		entry = protowire.AppendString(entry, key)
		entry = protowire.AppendTag(entry, 5, protowire.BytesType)
		entry = protowire.AppendBytes(entry, object(client, key))
		response := protowire.AppendTag(nil, 2, protowire.BytesType)
		response = protowire.AppendBytes(response, entry)
		check(os.WriteFile(filepath.Join(dir, "each", fmt.Sprint(i)), response, 0o644))
		all = append(all, response...)
	}
	check(os.WriteFile(filepath.Join(dir, "all"), all, 0o644))
}

func main() {
	requests := flag.Int("n", 10000, "requests")
	count := flag.Int("values", 0, "write so many etcd values")
	dir := flag.String("dir", ".", "where to")
	flag.Parse()
	if *count > 0 {
		values(flag.Arg(0), *dir, *count)
	} else {
		load(flag.Arg(0), *requests)
	}
}
