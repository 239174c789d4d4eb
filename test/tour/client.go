// The client of the tour: grpc-go, set up as kube-apiserver does it (k8s.io/apiserver, kmsv2/grpc_service.go). talk.py records it.
package main

import (
	"context"
	"log"
	"net"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	v1 "k8s.io/kms/apis/v1beta1"
	v2 "k8s.io/kms/apis/v2"
)

const uid = "3f6cbc16-2a0b-4f54-8d0c-6a4f2f4b9a01" // kube-apiserver makes one for each call

func octets(first byte) (data [32]byte) {
	for i := range data {
		data[i] = first + byte(i)
	}
	return
}

// What a call gave, which must have this status.
func want[T any](code string) func(T, error) T {
	return func(answer T, err error) T {
		if got := status.Code(err).String(); got != code {
			log.Fatalf("%s, not %s: %v", got, code, err)
		}
		return answer
	}
}

func main() {
	conn := want[*grpc.ClientConn]("OK")(grpc.NewClient("passthrough:///"+os.Args[1], grpc.WithAuthority("localhost"),
		grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDefaultCallOptions(grpc.WaitForReady(true)),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
			return net.DialUnix("unix", nil, &net.UnixAddr{Name: os.Args[1]})
		})))
	pause := func() { time.Sleep(200 * time.Millisecond) } // each side finishes what it says
	call := func() context.Context {
		pause()
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second) // the default of an EncryptionConfiguration
		context.AfterFunc(ctx, cancel)
		return ctx
	}
	conn.Connect()
	client, old, one, two := v2.NewKeyManagementServiceClient(conn), v1.NewKeyManagementServiceClient(conn), octets(0xc0), octets(0xe0)
	want[*v2.StatusResponse]("OK")(client.Status(call(), &v2.StatusRequest{}))
	first := want[*v2.EncryptResponse]("OK")(client.Encrypt(call(), &v2.EncryptRequest{Plaintext: one[:], Uid: uid}))
	want[*v2.EncryptResponse]("OK")(client.Encrypt(call(), &v2.EncryptRequest{Plaintext: two[:], Uid: uid}))
	decrypt := &v2.DecryptRequest{Ciphertext: first.Ciphertext, Uid: uid, KeyId: first.KeyId}
	want[*v2.DecryptResponse]("OK")(client.Decrypt(call(), decrypt))
	decrypt.KeyId = "00000000000000000000000000000000"
	want[*v2.DecryptResponse]("InvalidArgument")(client.Decrypt(call(), decrypt))
	want[*v1.EncryptResponse]("OK")(old.Encrypt(call(), &v1.EncryptRequest{Version: "v1beta1", Plain: one[:]}))
	want[*v2.EncryptResponse]("InvalidArgument")(client.Encrypt(call(), &v2.EncryptRequest{Plaintext: make([]byte, 33000), Uid: uid}))
	ctx, cancel := context.WithCancel(call())
	want[grpc.ClientStream]("OK")(conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true}, v2.KeyManagementService_Decrypt_FullMethodName))
	pause()
	cancel()
	os.Stdin.Read(make([]byte, 1)) // until the server has ended
	conn.Close()
}
