package cluster

import (
	"bytes"
	"context"
	"crypto/cipher"
	"fmt"
	"net"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/server/healthz"
	"k8s.io/apiserver/pkg/server/options/encryptionconfig"
	"k8s.io/apiserver/pkg/storage/value"
	aestransformer "k8s.io/apiserver/pkg/storage/value/encrypt/aes"
	"k8s.io/apiserver/pkg/storage/value/encrypt/envelope"
	"k8s.io/apiserver/pkg/storage/value/encrypt/envelope/kmsv2"
	kmstypes "k8s.io/apiserver/pkg/storage/value/encrypt/envelope/kmsv2/v2"
	utilfeature "k8s.io/apiserver/pkg/util/feature"
	"k8s.io/klog/v2"
)

// kube-apiserver's own code between an EncryptionConfiguration and etcd, without the rest of it: for what can be seen
// there alone. (compat/ has the same of older releases.)

const (
	object  = "k8s\x00 correct horse battery staple" // what it stands for does not matter here
	etcdKey = registry + "database"
)

func init() {
	if err := utilfeature.DefaultMutableFeatureGate.Set("KMSv1=true"); err != nil { // off by default since 1.29
		panic(err)
	}
	klog.SetLogger(klog.Logger{}) // it logs every refusal that the tests provoke, and returns it as well
}

// client is what kube-apiserver makes of --encryption-provider-config. Its v2 cache of DEKs starts empty, so a read by a
// new one always asks the plugin.
type client struct {
	secrets value.Transformer
	health  []healthz.HealthChecker
}

func loadClient(t *testing.T, config string) *client {
	t.Helper()
	file := tempDir(t) + "/encryption.yaml"
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	loaded := must(encryptionconfig.LoadEncryptionConfig(ctx, file, false, "kube-test"))(t)
	return &client{loaded.Transformers[schema.GroupResource{Resource: "secrets"}], loaded.HealthChecks}
}

func newClient(t *testing.T, providers ...string) *client {
	t.Helper()
	return loadClient(t, "apiVersion: apiserver.config.k8s.io/v1\nkind: EncryptionConfiguration\nresources: [{resources: [secrets], providers: ["+
		strings.Join(providers, ", ")+"]}]\n")
}

// deployedClient reads a file of deploy/, in which nothing but the endpoint is changed.
func deployedClient(t *testing.T, name string, p *plugin) *client {
	t.Helper()
	before := string(must(os.ReadFile("../../../deploy/" + name))(t))
	after := strings.ReplaceAll(before, "unix:///run/kmsplugin/kms.sock", p.endpoint)
	if after == before {
		t.Fatalf("%s: no endpoint", name)
	}
	return loadClient(t, after)
}

// write returns what would be stored in etcd.
func (c *client) write(t *testing.T) []byte {
	t.Helper()
	return must(c.secrets.TransformToStorage(t.Context(), []byte(object), value.DefaultContext(etcdKey)))(t)
}

// read wants the object back, and kube-apiserver's opinion on whether it is due for a rewrite.
func (c *client) read(t *testing.T, stored []byte, wantStale bool) {
	t.Helper()
	got, stale, err := c.secrets.TransformFromStorage(t.Context(), stored, value.DefaultContext(etcdKey))
	if err != nil || string(got) != object || stale != wantStale {
		t.Errorf("read %q, stale %v, %v", got, stale, err)
	}
}

// refuse wants an error and no bytes, and returns the error.
func (c *client) refuse(t *testing.T, stored []byte) error {
	t.Helper()
	got, _, err := c.secrets.TransformFromStorage(t.Context(), stored, value.DefaultContext(etcdKey))
	if err == nil || got != nil {
		t.Errorf("read %q and error %v, want nothing and an error", got, err)
	}
	return err
}

// check asks all of kube-apiserver's health checks.
func (c *client) check() error {
	for _, check := range c.health {
		if err := check.Check(httptest.NewRequest("GET", "/healthz", nil)); err != nil {
			return fmt.Errorf("%s: %w", check.Name(), err)
		}
	}
	return nil
}

func encryptedObject(t *testing.T, stored []byte, prefix string) *kmstypes.EncryptedObject {
	t.Helper()
	rest, found := bytes.CutPrefix(stored, []byte(prefix))
	o := new(kmstypes.EncryptedObject)
	if err := proto.Unmarshal(rest, o); !found || err != nil {
		t.Fatalf("%q does not begin with %q, or %v", stored, prefix, err)
	}
	return o
}

// Each form in which kube-apiserver has stored values, by its own code: unseal opens all but AES-CBC.
func TestStoredForms(t *testing.T) {
	t.Parallel()
	old, next, p := newKEK(), newKEK(), newPlugin(t)
	p.start(t, old)
	// 1.27 and 1.28 used v2's DEK as it is. The switch is global, hence a name of its own.
	const direct, directPrefix, v1Prefix, v2Prefix = "direct", "k8s:enc:kms:v2:direct:", "k8s:enc:kms:v1:vault:", "k8s:enc:kms:v2:vault:"
	t.Cleanup(encryptionconfig.SetKDFForTests(direct, false))
	forms := map[string][]byte{v1Prefix: newClient(t, v1("vault", p, -1)).write(t), v2Prefix: newClient(t, v2("vault", p)).write(t),
		directPrefix: newClient(t, v2(direct, p)).write(t)}
	if encryptedObject(t, forms[v2Prefix], v2Prefix).EncryptedDEKSourceType != kmstypes.EncryptedDEKSourceType_HKDF_SHA256_XNONCE_AES_GCM_SEED ||
		encryptedObject(t, forms[directPrefix], directPrefix).EncryptedDEKSourceType != kmstypes.EncryptedDEKSourceType_AES_GCM_KEY {
		t.Fatal("other kinds of DEK sources than expected")
	}
	// Clusters before 1.25 wrote v1 in AES-CBC. kube-apiserver still reads that and wants it rewritten.
	service := must(envelope.NewGRPCService(t.Context(), p.endpoint, 3*time.Second))(t)
	cbc := envelope.NewEnvelopeTransformer(service, -1, func(b cipher.Block) (value.Transformer, error) {
		return aestransformer.NewCBCTransformer(b), nil
	})
	oldest := append([]byte(v1Prefix), must(cbc.TransformToStorage(t.Context(), []byte(object), value.DefaultContext(etcdKey)))(t)...)
	newClient(t, v1("vault", p, -1)).read(t, oldest, true) // v1 calls nothing but CBC stale
	p.stop(t)                                              // unseal needs none

	refused := func(keks []kek, says string, stdin []byte, args ...string) {
		t.Helper()
		if code, stdout, stderr := verb(t, keks, stdin, append([]string{"unseal"}, args...)...); code != 1 || len(stdout) > 0 || !strings.Contains(stderr, says) {
			t.Errorf("exit %d, %q, %q; want 1, nothing, and a line with %q", code, stdout, stderr, says)
		}
	}
	for prefix, stored := range forms {
		response := must(proto.Marshal(&etcdserverpb.RangeResponse{Header: &etcdserverpb.ResponseHeader{Revision: 4321}, Count: 1,
			Kvs: []*mvccpb.KeyValue{{Key: []byte(etcdKey), Value: stored, ModRevision: 4320}}}))(t)
		for _, keks := range [][]kek{{old}, {next, old}} {
			_, raw, why := verb(t, keks, stored, "unseal", etcdKey)
			_, listed, whyNot := verb(t, keks, response, "unseal")
			if string(raw) != object || string(listed) != object {
				t.Errorf("%s: %q %q\n%s%s", prefix, raw, listed, why, whyNot)
			}
		}
		refused([]kek{next}, old.id(), stored, etcdKey)
		refused([]kek{old}, "", stored, etcdKey+"2")
	}
	refused([]kek{old}, "CBC", oldest, etcdKey)

	// keyid prints what kube-apiserver's metrics show, hashed by its own function.
	want := fmt.Sprintf("%s %s\n%s %s\n", old.id(), kmsv2.GetHashIfNotEmpty(old.id()), next.id(), kmsv2.GetHashIfNotEmpty(next.id()))
	if _, stdout, stderr := verb(t, []kek{old, next}, nil, "keyid"); string(stdout) != want {
		t.Errorf("%q, want %q\n%s", stdout, want, stderr)
	}
}

// Each configuration of deploy/ writes under the right provider, and reads what the one before it in its migration has written.
func TestDeployEncryption(t *testing.T) {
	t.Parallel()
	const plain, v1Prefix, v2Prefix = "k8s\x00", "k8s:enc:kms:v1:kmsplugin-v1:", "k8s:enc:kms:v2:kmsplugin:"
	p := newPlugin(t)
	p.start(t, newKEK())
	writers := map[string]string{plain: "encryption-prepare.yaml", v1Prefix: "encryption-v1.yaml", v2Prefix: "encryption-v2.yaml"}
	for file, c := range map[string]struct {
		writes string   // the prefix of what it writes
		reads  []string // whose values it reads, though they are stale
	}{
		"encryption-v1.yaml":        {v1Prefix, []string{plain}},
		"encryption-prepare.yaml":   {plain, []string{v2Prefix}},
		"encryption-migration.yaml": {v2Prefix, []string{plain, v1Prefix}},
		"encryption-v2.yaml":        {v2Prefix, []string{plain}},
	} {
		server := deployedClient(t, file, p)
		if err := server.check(); err != nil {
			t.Errorf("%s: %v", file, err)
		}
		stored := server.write(t)
		if !strings.HasPrefix(string(stored), c.writes) {
			t.Errorf("%s writes %.40q, want %q", file, stored, c.writes)
		}
		server.read(t, stored, false)
		for _, from := range c.reads {
			server.read(t, deployedClient(t, writers[from], p).write(t), true)
		}
	}
}

// The sentences in doc/operate.md's table come about as it says.
func TestDocumentedErrors(t *testing.T) {
	t.Parallel()
	want := func(err error, parts ...string) {
		t.Helper()
		for _, part := range parts {
			documented(t, err, part)
		}
		t.Log(err)
	}
	p, q := newPlugin(t), newPlugin(t)
	want(newClient(t, v2("name", p), identity).check(), "code = DeadlineExceeded", "connect: no such file or directory")
	want(newClient(t, v1("name", p, -1), identity).check(),
		"section of the healthz check for KMS Provider", "connect: no such file or directory")
	l := must(net.ListenUnix("unix", &net.UnixAddr{Name: p.socket(), Net: "unix"}))(t)
	l.SetUnlinkOnClose(false)
	want(newClient(t, v2("name", p), identity).check(), "code = DeadlineExceeded", "waiting for connections to become ready") // as systemd's
	l.Close()
	want(newClient(t, v2("name", p), identity).check(), "code = DeadlineExceeded", "connect: connection refused")

	refusing := spawn(t, q.dir, "refusing", ring(newKEK()), nil, binary, "serve", "--listen", q.endpoint, "--allow-uid", "4294967294")
	eventually(t, 10*time.Second, "a plugin that lets in nobody of this test", func() error {
		if !strings.Contains(tail(refusing.log, 1<<20), "msg=ready") {
			return fmt.Errorf("not ready")
		}
		return nil
	})
	err, word := newClient(t, v2("name", q), identity).check(), "broken pipe"
	for _, other := range []string{"failed to write client preface", "error reading server preface"} {
		if err != nil && strings.Contains(err.Error(), other) { // the plugin's close races with the client's first write and read
			word = other
		}
	}
	want(err, "code = DeadlineExceeded", word)
	refusing.end(15)

	p.start(t, newKEK())
	q.start(t, newKEK())
	stored := newClient(t, v2("name", p)).write(t)
	want(newClient(t, v2("name", q)).refuse(t, stored), "failed to decrypt DEK", "code = NotFound")
	want(newClient(t, v2("other", q)).refuse(t, stored), "no matching prefix found")
	source := encryptedObject(t, stored, "k8s:enc:kms:v2:name:").EncryptedDEKSource
	stored[bytes.Index(stored, source)+len(source)-1] ^= 1
	want(newClient(t, v2("name", p)).refuse(t, stored), "code = InvalidArgument")
}
