package kube

import (
	"bytes"
	"context"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	kmsv1beta1api "k8s.io/kms/apis/v1beta1"
	kmsv2api "k8s.io/kms/apis/v2"
)

// dial is a bare grpc-go client.
func dial(t *testing.T, endpoint string, options ...grpc.DialOption) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient(endpoint, append(options, grpc.WithTransportCredentials(insecure.NewCredentials()))...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// The codes and messages which the contract promises, as grpc-go reads them.
func TestStatusCodes(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	endpoint, key, foreign := fileEndpoint(t), newKEK(), newKEK()
	serve(t, endpoint, key)
	conn := dial(t, endpoint)
	v1, v2 := kmsv1beta1api.NewKeyManagementServiceClient(conn), kmsv2api.NewKeyManagementServiceClient(conn)

	plaintext := bytes.Repeat([]byte("p"), 967) // the most of which the ciphertext has 1,024 bytes
	sealed, err := v2.Encrypt(ctx, &kmsv2api.EncryptRequest{Plaintext: plaintext, Uid: "uid"})
	if err != nil || len(sealed.Ciphertext) != 1024 || sealed.KeyId != key.id() || len(sealed.Annotations) != 0 {
		t.Fatalf("Encrypt: %v, %v", sealed, err)
	}
	sealedV1, err := v1.Encrypt(ctx, &kmsv1beta1api.EncryptRequest{Version: "v1beta1", Plain: plaintext})
	if err != nil {
		t.Fatal(err)
	}

	want := func(what string, err error, code codes.Code, says string) {
		t.Helper()
		if s := status.Convert(err); s.Code() != code || !strings.Contains(s.Message(), says) || (err != nil && s.Message() == "") {
			t.Errorf("%s: %v; want %v and a message with %q", what, err, code, says)
		}
	}
	decrypt := func(what string, change func(*kmsv2api.DecryptRequest), code codes.Code, says string) {
		t.Helper()
		request := &kmsv2api.DecryptRequest{Ciphertext: bytes.Clone(sealed.Ciphertext), Uid: "uid", KeyId: sealed.KeyId}
		change(request)
		response, err := v2.Decrypt(ctx, request)
		want(what, err, code, says)
		if err == nil && !bytes.Equal(response.Plaintext, plaintext) {
			t.Errorf("%s: opened to %q", what, response.Plaintext)
		}
	}
	decrypt("as it was", func(r *kmsv2api.DecryptRequest) {}, codes.OK, "")
	decrypt("empty", func(r *kmsv2api.DecryptRequest) { r.Ciphertext = nil }, codes.InvalidArgument, "")
	decrypt("short", func(r *kmsv2api.DecryptRequest) { r.Ciphertext = r.Ciphertext[:56] }, codes.InvalidArgument, "")
	decrypt("format", func(r *kmsv2api.DecryptRequest) { r.Ciphertext[0] = 2 }, codes.InvalidArgument, "")
	decrypt("nonce", func(r *kmsv2api.DecryptRequest) { r.Ciphertext[17] ^= 1 }, codes.InvalidArgument, "")
	decrypt("ciphertext", func(r *kmsv2api.DecryptRequest) { r.Ciphertext[41] ^= 1 }, codes.InvalidArgument, "")
	decrypt("tag", func(r *kmsv2api.DecryptRequest) { r.Ciphertext[1023] ^= 1 }, codes.InvalidArgument, "")
	decrypt("fingerprint", func(r *kmsv2api.DecryptRequest) { r.Ciphertext[1] ^= 1 }, codes.InvalidArgument, "")
	decrypt("another key_id", func(r *kmsv2api.DecryptRequest) { r.KeyId = foreign.id() }, codes.InvalidArgument, "")
	decrypt("no key_id", func(r *kmsv2api.DecryptRequest) { r.KeyId = "" }, codes.InvalidArgument, "")
	decrypt("annotations", func(r *kmsv2api.DecryptRequest) { r.Annotations = map[string][]byte{"a.b": nil} }, codes.InvalidArgument, "")
	decrypt("v1's ciphertext", func(r *kmsv2api.DecryptRequest) { r.Ciphertext = sealedV1.Cipher }, codes.InvalidArgument, "")
	decrypt("missing KEK", func(r *kmsv2api.DecryptRequest) {
		r.Ciphertext, r.KeyId = foreign.seal(2, plaintext), foreign.id()
	}, codes.NotFound, foreign.id())

	_, err = v2.Encrypt(ctx, &kmsv2api.EncryptRequest{Plaintext: append(plaintext, 'p')})
	want("ciphertext over 1,024 bytes", err, codes.InvalidArgument, "")
	_, err = v1.Decrypt(ctx, &kmsv1beta1api.DecryptRequest{Version: "v1beta1", Cipher: sealed.Ciphertext})
	want("v2's ciphertext in v1", err, codes.InvalidArgument, "")
	_, err = v1.Version(ctx, &kmsv1beta1api.VersionRequest{Version: "v1"})
	want("another version", err, codes.InvalidArgument, "")
	err = conn.Invoke(ctx, "/v2.KeyManagementService/Rewrap", &kmsv2api.StatusRequest{}, &kmsv2api.StatusResponse{})
	want("unknown method", err, codes.Unimplemented, "")
	err = conn.Invoke(ctx, "/v3.KeyManagementService/Status", &kmsv2api.StatusRequest{}, &kmsv2api.StatusResponse{})
	want("unknown service", err, codes.Unimplemented, "")

	_, err = v2.Encrypt(ctx, &kmsv2api.EncryptRequest{Plaintext: plaintext[:32]}, grpc.UseCompressor("gzip")) // registered by apiserver's own imports
	want("compressed", err, codes.Unimplemented, "")

	// 64 KiB is the last size that is read, and v1 has no use for it either.
	largest := &kmsv1beta1api.EncryptRequest{Version: "v1beta1", Plain: make([]byte, 65536)}
	largest.Plain = largest.Plain[proto.Size(largest)-65536:]
	_, err = v1.Encrypt(ctx, largest)
	want("message of 64 KiB", err, codes.InvalidArgument, "")
	largest.Plain = append(largest.Plain, 0)
	_, err = v1.Encrypt(ctx, largest)
	want("message over 64 KiB", err, codes.ResourceExhausted, "")

	health, err := v2.Status(ctx, &kmsv2api.StatusRequest{})
	if err != nil || health.Version != "v2" || health.Healthz != "ok" || health.KeyId != key.id() {
		t.Errorf("after all this, Status: %v, %v", health, err)
	}
}

// The :authority that releases of kube-apiserver have sent on a UNIX socket.
func TestAuthority(t *testing.T) {
	t.Parallel()
	endpoint := fileEndpoint(t)
	serve(t, endpoint, newKEK())
	for _, authority := range []string{"localhost", "%2Frun%2Fkms.sock", "/run/kms.sock", "@kms.sock"} {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		conn := dial(t, endpoint, grpc.WithAuthority(authority))
		if _, err := kmsv2api.NewKeyManagementServiceClient(conn).Status(ctx, &kmsv2api.StatusRequest{}); err != nil {
			t.Errorf("%s: %v", authority, err)
		}
	}
}

// Calls that their client gives up, at any moment of their life, cost nobody else.
func TestCancellation(t *testing.T) {
	t.Parallel()
	endpoint := fileEndpoint(t)
	serve(t, endpoint, newKEK())
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	client := kmsv2api.NewKeyManagementServiceClient(dial(t, endpoint))
	if _, err := client.Status(ctx, &kmsv2api.StatusRequest{}); err != nil { // is connected from here on
		t.Fatal(err)
	}
	var all sync.WaitGroup
	for i := range 500 {
		all.Go(func() {
			call, giveUp := context.WithCancel(ctx)
			time.AfterFunc(time.Duration(i)*10*time.Microsecond, giveUp)
			_, err := client.Encrypt(call, &kmsv2api.EncryptRequest{Plaintext: make([]byte, 32)})
			if code := status.Code(err); code != codes.OK && code != codes.Canceled {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if _, err := client.Status(ctx, &kmsv2api.StatusRequest{}); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

// The sealed form is for ever: opened and made here from its description alone.
func TestSealedForm(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	endpoint, key := fileEndpoint(t), newKEK()
	serve(t, endpoint, key)
	conn := dial(t, endpoint)
	v1, v2 := kmsv1beta1api.NewKeyManagementServiceClient(conn), kmsv2api.NewKeyManagementServiceClient(conn)
	for _, size := range []int{0, 1, 15, 16, 17, 32, 967} {
		plaintext := bytes.Repeat([]byte{0xa5}, size)
		sealed, err := v2.Encrypt(ctx, &kmsv2api.EncryptRequest{Plaintext: plaintext})
		if err != nil {
			t.Fatal(err)
		}
		if opened, err := key.open(2, sealed.Ciphertext); err != nil || !bytes.Equal(opened, plaintext) {
			t.Errorf("v2, %d bytes: %x, %v", size, opened, err)
		}
		opened, err := v2.Decrypt(ctx, &kmsv2api.DecryptRequest{Ciphertext: key.seal(2, plaintext), KeyId: key.id()})
		if err != nil || !bytes.Equal(opened.Plaintext, plaintext) {
			t.Errorf("v2, %d bytes: %v, %v", size, opened, err)
		}
		sealedV1, err := v1.Encrypt(ctx, &kmsv1beta1api.EncryptRequest{Version: "v1beta1", Plain: plaintext})
		if err != nil {
			t.Fatal(err)
		}
		if opened, err := key.open(1, sealedV1.Cipher); err != nil || !bytes.Equal(opened, plaintext) {
			t.Errorf("v1, %d bytes: %x, %v", size, opened, err)
		}
	}
}
