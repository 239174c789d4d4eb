package cluster

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/protobuf/proto"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	kmstypes "k8s.io/apiserver/pkg/storage/value/encrypt/envelope/kmsv2/v2"
	"k8s.io/client-go/kubernetes/scheme"
)

const (
	namespace = "default"
	registry  = "/registry/secrets/" + namespace + "/"
	marker    = "plaintext-of-a-secret" // part of each Secret, of no stored value
	identity  = "{identity: {}}"
	workers   = 16
)

// v2 and v1 are entries of an EncryptionConfiguration. The name is part of every stored value.
func v2(name string, p *plugin) string {
	return fmt.Sprintf("{kms: {apiVersion: v2, name: %s, endpoint: '%s', timeout: 3s}}", name, p.endpoint)
}

func v1(name string, p *plugin, cache int) string {
	return fmt.Sprintf("{kms: {apiVersion: v1, name: %s, endpoint: '%s', timeout: 3s, cachesize: %d}}", name, p.endpoint, cache)
}

// many is the number of Secrets of a story.
func many() int {
	if testing.Short() {
		return 200
	}
	return 2000
}

// secrets are Secrets as the API returned them, by name.
type secrets map[string]*corev1.Secret

func newSecret(name string) *corev1.Secret {
	random := make([]byte, 64)
	rand.Read(random)
	return &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: map[string]string{"test": "cluster"}},
		Data:       map[string][]byte{"password": []byte(marker + " " + name + " " + hex.EncodeToString(random)), "binary": random},
	}
}

// all calls f for each name, several at a time, and reports the first errors.
func all(t *testing.T, names []string, f func(name string) error) {
	t.Helper()
	var group sync.WaitGroup
	var mutex sync.Mutex
	var errs []error
	queue := make(chan string)
	for range workers {
		group.Go(func() {
			for name := range queue {
				if err := f(name); err != nil {
					mutex.Lock()
					errs = append(errs, fmt.Errorf("%s: %w", name, err))
					mutex.Unlock()
				}
			}
		})
	}
	for _, name := range names {
		queue <- name
	}
	close(queue)
	group.Wait()
	if len(errs) > 0 {
		t.Errorf("%d of %d failed:\n%v", len(errs), len(names), errors.Join(errs[:min(len(errs), 5)]...))
	}
}

// write creates n Secrets, each through one of the apiservers.
func write(t *testing.T, prefix string, n int, through ...*apiserver) secrets {
	t.Helper()
	var mutex sync.Mutex
	var names []string
	written, by := secrets{}, map[string]*apiserver{}
	for i := range n {
		names = append(names, fmt.Sprintf("%s-%d", prefix, i))
		by[names[i]] = through[i%len(through)]
	}
	all(t, names, func(name string) error {
		created, err := by[name].client.CoreV1().Secrets(namespace).Create(context.Background(), newSecret(name), metav1.CreateOptions{})
		if err == nil {
			mutex.Lock()
			defer mutex.Unlock()
			written[name] = created
		}
		return err
	})
	if len(written) != n {
		t.Fatalf("%d of %d Secrets written", len(written), n)
	}
	return written
}

// rewrite stores each Secret again without a change, which is what storage migration is.
func (s secrets) rewrite(t *testing.T, through ...*apiserver) secrets {
	t.Helper()
	var mutex sync.Mutex
	rewritten, by := secrets{}, map[string]*apiserver{}
	for i, name := range s.names() {
		by[name] = through[i%len(through)]
	}
	all(t, s.names(), func(name string) error {
		api := by[name].client.CoreV1().Secrets(namespace)
		secret, err := api.Get(context.Background(), name, metav1.GetOptions{})
		if err == nil {
			secret, err = api.Update(context.Background(), secret, metav1.UpdateOptions{})
		}
		if err == nil && secret.ResourceVersion == s[name].ResourceVersion {
			err = errors.New("not stored again: the apiserver does not hold it for stale")
		}
		if err != nil {
			return err
		}
		mutex.Lock()
		defer mutex.Unlock()
		rewritten[name] = secret
		return nil
	})
	return rewritten
}

func (s secrets) names() []string { return slices.Sorted(maps.Keys(s)) }

// read wants each Secret back, one by one (which asks etcd) and in a list.
func (s secrets) read(t *testing.T, a *apiserver) {
	t.Helper()
	api := a.client.CoreV1().Secrets(namespace)
	all(t, s.names(), func(name string) error {
		secret, err := api.Get(context.Background(), name, metav1.GetOptions{})
		if err == nil && !equality.Semantic.DeepEqual(secret, s[name]) {
			err = fmt.Errorf("read %v, want %v", secret, s[name])
		}
		return err
	})
	list, err := api.List(context.Background(), metav1.ListOptions{})
	if err != nil {
		t.Errorf("list: %v", err)
		return
	}
	found := 0
	for i := range list.Items {
		if want, ours := s[list.Items[i].Name]; ours && equality.Semantic.DeepEqual(&list.Items[i], want) {
			found++
		}
	}
	if found != len(s) {
		t.Errorf("the list holds %d of %d Secrets", found, len(s))
	}
}

// --------------------------------------------------------------- raw values

// raw returns what etcd holds, by etcd key.
func (e *etcd) raw(t *testing.T, prefix string) map[string]*mvccpb.KeyValue {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	response := must(e.client.Get(ctx, prefix, clientv3.WithPrefix()))(t)
	values := map[string]*mvccpb.KeyValue{}
	for _, kv := range response.Kvs {
		values[string(kv.Key)] = kv
	}
	return values
}

func (e *etcd) put(t *testing.T, key string, value []byte) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	must(e.client.Put(ctx, key, string(value)))(t)
}

// sealedUnder tells which KEK a raw value says it needs.
func sealedUnder(value []byte) (keyID string, err error) {
	for _, api := range []string{"v1", "v2"} {
		rest, ok := bytes.CutPrefix(value, []byte("k8s:enc:kms:"+api+":"))
		if !ok {
			continue
		}
		_, rest, ok = bytes.Cut(rest, []byte(":"))
		if !ok {
			break
		}
		if api == "v1" { // length[2], format, fingerprint[16]
			if len(rest) < 19 || rest[2] != 1 {
				break
			}
			return hex.EncodeToString(rest[3:19]), nil
		}
		object := new(kmstypes.EncryptedObject)
		if err := proto.Unmarshal(rest, object); err != nil {
			return "", err
		}
		if len(object.EncryptedDEKSource) < 17 || hex.EncodeToString(object.EncryptedDEKSource[1:17]) != object.KeyID ||
			object.EncryptedDEKSourceType != kmstypes.EncryptedDEKSourceType_HKDF_SHA256_XNONCE_AES_GCM_SEED {
			return "", fmt.Errorf("odd object: %v", object)
		}
		return object.KeyID, nil
	}
	return "", fmt.Errorf("not of KMS: %.40q", value)
}

// sealed wants each raw value to start with a prefix, to hold no plaintext, and to be under this KEK.
func (s secrets) sealed(t *testing.T, e *etcd, prefix string, key kek) {
	t.Helper()
	raw := e.raw(t, registry)
	var wrong []string
	for name, secret := range s {
		kv := raw[registry+name]
		if kv == nil {
			wrong = append(wrong, name+": not in etcd")
			continue
		}
		id, err := sealedUnder(kv.Value)
		if !bytes.HasPrefix(kv.Value, []byte(prefix)) || err != nil || id != key.id() || bytes.Contains(kv.Value, []byte(marker)) ||
			bytes.Contains(kv.Value, secret.Data["binary"][:16]) || bytes.Contains(kv.Value, []byte(name)) {
			wrong = append(wrong, fmt.Sprintf("%s: want %s under %s, got %v %v %.60q", name, prefix, key.id(), id, err, kv.Value))
		}
	}
	if len(wrong) > 0 {
		t.Errorf("%d of %d raw values:\n%s", len(wrong), len(s), strings.Join(wrong[:min(len(wrong), 5)], "\n"))
	}
}

// decode wants the object that unseal wrote to be the Secret that the API had returned.
func decode(object []byte, revision int64, want *corev1.Secret) error {
	if !bytes.HasPrefix(object, []byte("k8s\x00")) {
		return fmt.Errorf("%.20q does not start as Kubernetes' protobuf", object)
	}
	decoded, _, err := scheme.Codecs.UniversalDeserializer().Decode(object, nil, nil)
	if err != nil {
		return err
	}
	secret, ok := decoded.(*corev1.Secret)
	if !ok || secret.ResourceVersion != "" {
		return fmt.Errorf("%T, want a Secret without resourceVersion", decoded)
	}
	secret.TypeMeta = metav1.TypeMeta{} // clients do not fill it in either
	secret.ResourceVersion = fmt.Sprint(revision)
	if !equality.Semantic.DeepEqual(secret, want) {
		return fmt.Errorf("unsealed %v, want %v", secret, want)
	}
	return nil
}

// unsealed opens each value with nothing but etcdctl, the KEK and unseal, in both ways.
func (s secrets) unsealed(t *testing.T, e *etcd, keks ...kek) {
	t.Helper()
	raw := e.raw(t, registry)
	all(t, s.names(), func(name string) error {
		key := registry + name
		for _, way := range []struct{ ctl, args []string }{
			{[]string{"get", key, "-w", "protobuf"}, []string{"unseal"}},
			{[]string{"get", key, "--print-value-only"}, []string{"unseal", key}},
		} {
			code, object, stderr := verb(t, keks, e.ctl(t, nil, way.ctl...), way.args...)
			if code != 0 {
				return fmt.Errorf("exit %d, %s", code, stderr)
			}
			if err := decode(object, raw[key].ModRevision, s[name]); err != nil {
				return err
			}
		}
		return nil
	})
}

// audit is asked about all that etcd holds, as the guide says.
func (e *etcd) audit(t *testing.T, keks []kek, args ...string) (int, string) {
	t.Helper()
	// A pipe, as operators use it: audit has to stream.
	line := fmt.Sprintf(`"$0" --endpoints=%s get --prefix /registry -w protobuf | "$1" audit %s 2>&1`, e.url, strings.Join(args, " "))
	code, stdout, stderr := command(t, ring(keks...), nil, "/bin/sh", "-c", line, filepath.Join(programs, "etcdctl"), binary)
	return code, string(stdout) + stderr
}

// audited wants an exit status and lines (or parts of lines).
func (e *etcd) audited(t *testing.T, keks []kek, wantCode int, want []string, args ...string) string {
	t.Helper()
	code, out := e.audit(t, keks, args...)
	for _, line := range want {
		if !strings.Contains(out, line) {
			t.Errorf("audit %v does not say %q", args, line)
			wantCode = -1
		}
	}
	if code != wantCode {
		t.Errorf("audit %v: exit %d, want %d\n%s", args, code, wantCode, out)
	}
	return out
}

func count(s secrets) string { return fmt.Sprint(len(s)) }

func (s secrets) andMore(more secrets) secrets {
	sum := maps.Clone(s)
	maps.Copy(sum, more)
	return sum
}
