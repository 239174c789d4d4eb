// client is a load source on grpc-go, the client that kube-apiserver is made of.
//
//	client [-n REQUESTS] SOCKET         KMS v2 Encrypt, one at a time
package main

import (
	"context"
	"flag"
	"fmt"
	"log"
	"net"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
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

func load(path string, requests int) {
	client := kmsapi.NewKeyManagementServiceClient(dial(path))
	request := &kmsapi.EncryptRequest{Plaintext: make([]byte, 32), Uid: "00000000-0000-4000-8000-000000000000"}
	samples := make([]time.Duration, requests)
	for i := range samples {
		sent := time.Now()
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
		_, err := client.Encrypt(ctx, request)
		cancel()
		check(err)
		samples[i] = time.Since(sent)
	}
	slices.Sort(samples)
	us := func(i int) float64 { return float64(samples[i].Nanoseconds()) / 1e3 }
	fmt.Printf("p50_us=%.3f p99_us=%.3f\n", us(requests/2), us(requests*99/100))
}

func main() {
	requests := flag.Int("n", 10000, "requests")
	flag.Parse()
	load(flag.Arg(0), *requests)
}
