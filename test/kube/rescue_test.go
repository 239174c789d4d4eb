package kube

import (
	"bytes"
	"crypto/cipher"
	"fmt"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"
	"k8s.io/apiserver/pkg/server/options/encryptionconfig"
	"k8s.io/apiserver/pkg/storage/value"
	aestransformer "k8s.io/apiserver/pkg/storage/value/encrypt/aes"
	"k8s.io/apiserver/pkg/storage/value/encrypt/envelope"
	"k8s.io/apiserver/pkg/storage/value/encrypt/envelope/kmsv2"
	kmstypes "k8s.io/apiserver/pkg/storage/value/encrypt/envelope/kmsv2/v2"
)

// rangeResponse is what `etcdctl get KEY -w protobuf` prints.
func rangeResponse(t *testing.T, key string, value []byte) []byte {
	t.Helper()
	message, err := proto.Marshal(&etcdserverpb.RangeResponse{
		Header: &etcdserverpb.ResponseHeader{ClusterId: 0xcdf818194e3a8c32, MemberId: 0x8e9e05c52164694d, Revision: 4321, RaftTerm: 2},
		Kvs:    []*mvccpb.KeyValue{{Key: []byte(key), Value: value, CreateRevision: 1234, ModRevision: 4320, Version: 3}},
		Count:  1,
	})
	if err != nil {
		t.Fatal(err)
	}
	return message
}

// storedForms has kube-apiserver write the Secret in every form that unseal opens, by its prefix.
func storedForms(t *testing.T, endpoint string) map[string][]byte {
	t.Helper()
	// The form of 1.27 and 1.28, where v2's DEK is used as it is. The switch is global, hence a name of its own.
	direct := "direct-" + strings.ToLower(t.Name())
	t.Cleanup(encryptionconfig.SetKDFForTests(direct, false))
	forms := map[string][]byte{
		"k8s:enc:kms:v1:vault:":          newAPIServer(t, v1("vault", endpoint)).write(t),
		"k8s:enc:kms:v2:vault:":          newAPIServer(t, v2("vault", endpoint)).write(t),
		"k8s:enc:kms:v2:" + direct + ":": newAPIServer(t, v2(direct, endpoint)).write(t),
	}
	for prefix, want := range map[string]kmstypes.EncryptedDEKSourceType{
		"k8s:enc:kms:v2:vault:":          kmstypes.EncryptedDEKSourceType_HKDF_SHA256_XNONCE_AES_GCM_SEED,
		"k8s:enc:kms:v2:" + direct + ":": kmstypes.EncryptedDEKSourceType_AES_GCM_KEY,
	} {
		if got := encryptedObject(t, forms[prefix], prefix).EncryptedDEKSourceType; got != want {
			t.Fatalf("%s has a %v, want %v", prefix, got, want)
		}
	}
	return forms
}

// notUnsealed wants exit 1, nothing on stdout, and one line on stderr which says so.
func notUnsealed(t *testing.T, ring []kek, stdin []byte, says string, args ...string) {
	t.Helper()
	code, stdout, stderr := run(t, ring, stdin, append([]string{"unseal"}, args...)...)
	if code != 1 || len(stdout) != 0 || strings.Count(stderr, "\n") != 1 || !strings.Contains(stderr, says) {
		t.Errorf("exit %d, %q, %q; want 1, nothing, and a line with %q", code, stdout, stderr, says)
	}
}

func TestUnseal(t *testing.T) {
	t.Parallel()
	endpoint, old, next := fileEndpoint(t), newKEK(), newKEK()
	p := serve(t, endpoint, old)
	forms := storedForms(t, endpoint)
	p.stop(t) // unseal needs none
	for prefix, stored := range forms {
		response := rangeResponse(t, etcdKey, stored)
		for _, ring := range [][]kek{{old}, {next, old}} {
			code, stdout, stderr := run(t, ring, stored, "unseal", etcdKey)
			again, listed, said := run(t, ring, response, "unseal")
			if code != 0 || again != 0 || !bytes.Equal(stdout, secret) || !bytes.Equal(listed, secret) {
				t.Errorf("%s: exit %d %d, %q %q, want the Secret twice\n%s%s", prefix, code, again, stdout, listed, stderr, said)
			}
		}
		notUnsealed(t, []kek{next}, stored, old.id(), etcdKey)
		notUnsealed(t, []kek{old}, rangeResponse(t, etcdKey+"2", stored), "")
	}
}

// Clusters before 1.25 wrote v1 in AES-CBC. kube-apiserver still reads that and
// wants it rewritten; unseal does not, since CBC has no tag, and says why.
func TestUnsealCBC(t *testing.T) {
	t.Parallel()
	endpoint, key := fileEndpoint(t), newKEK()
	serve(t, endpoint, key)
	service, err := envelope.NewGRPCService(t.Context(), endpoint, 3*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	cbc := envelope.NewEnvelopeTransformer(service, -1, func(b cipher.Block) (value.Transformer, error) {
		return aestransformer.NewCBCTransformer(b), nil
	})
	rest, err := cbc.TransformToStorage(t.Context(), secret, value.DefaultContext(etcdKey))
	if err != nil {
		t.Fatal(err)
	}
	stored := append([]byte("k8s:enc:kms:v1:vault:"), rest...)
	newAPIServer(t, v1("vault", endpoint)).read(t, stored, true) // v1 calls nothing but CBC stale
	notUnsealed(t, []kek{key}, stored, "CBC", etcdKey)
}

// keyid prints what kube-apiserver's metrics show, hashed by its own function.
func TestKeyID(t *testing.T) {
	t.Parallel()
	ring := []kek{newKEK(), newKEK()}
	var want string
	for _, k := range ring {
		want += fmt.Sprintf("%s %s\n", k.id(), kmsv2.GetHashIfNotEmpty(k.id()))
	}
	if code, stdout, stderr := run(t, ring, nil, "keyid"); code != 0 || string(stdout) != want {
		t.Errorf("exit %d, %q, want %q\n%s", code, stdout, want, stderr)
	}
}
