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

// Codes and messages as grpc-go reads them, one of each form that an answer has.
func TestStatusCodes(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	endpoint, other, key, foreign := fileEndpoint(t), fileEndpoint(t), newKEK(), newKEK()
	serve(t, endpoint, key)
	serve(t, other, foreign)
	conn := dial(t, endpoint)
	v1, v2 := kmsv1beta1api.NewKeyManagementServiceClient(conn), kmsv2api.NewKeyManagementServiceClient(conn)
	want := func(what string, err error, code codes.Code, says string) {
		t.Helper()
		if s := status.Convert(err); s.Code() != code || !strings.Contains(s.Message(), says) || (err != nil && s.Message() == "") {
			t.Errorf("%s: %v; want %v and a message with %q", what, err, code, says)
		}
	}

	plaintext := bytes.Repeat([]byte("p"), 967) // the most of which the ciphertext has 1,024 bytes
	encrypt := &kmsv2api.EncryptRequest{Plaintext: plaintext, Uid: "uid"}
	sealed, err := v2.Encrypt(ctx, encrypt)
	if err != nil || len(sealed.Ciphertext) != 1024 || sealed.KeyId != key.id() || len(sealed.Annotations) != 0 {
		t.Fatalf("Encrypt: %v, %v", sealed, err)
	}
	opened, err := v2.Decrypt(ctx, &kmsv2api.DecryptRequest{Ciphertext: sealed.Ciphertext, KeyId: sealed.KeyId})
	if err != nil || !bytes.Equal(opened.Plaintext, plaintext) {
		t.Errorf("Decrypt: %v, %v", opened, err)
	}
	_, err = v2.Decrypt(ctx, &kmsv2api.DecryptRequest{Ciphertext: sealed.Ciphertext[:1023], KeyId: sealed.KeyId})
	want("cut short", err, codes.InvalidArgument, "")
	lost, err := kmsv2api.NewKeyManagementServiceClient(dial(t, other)).Encrypt(ctx, encrypt)
	if err != nil {
		t.Fatal(err)
	}
	_, err = v2.Decrypt(ctx, &kmsv2api.DecryptRequest{Ciphertext: lost.Ciphertext, KeyId: lost.KeyId})
	want("missing KEK", err, codes.NotFound, foreign.id())
	err = conn.Invoke(ctx, "/v2.KeyManagementService/Rewrap", &kmsv2api.StatusRequest{}, &kmsv2api.StatusResponse{})
	want("unknown method", err, codes.Unimplemented, "")
	_, err = v2.Encrypt(ctx, &kmsv2api.EncryptRequest{Plaintext: plaintext[:32]}, grpc.UseCompressor("gzip")) // registered by apiserver's own imports
	want("compressed", err, codes.Unimplemented, "")
	_, err = v1.Encrypt(ctx, &kmsv1beta1api.EncryptRequest{Version: "v1beta1", Plain: make([]byte, 65536)})
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
