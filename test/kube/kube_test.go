package kube

import (
	"bytes"
	"context"
	"fmt"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer/protobuf"
	"k8s.io/apiserver/pkg/server/healthz"
	"k8s.io/apiserver/pkg/server/options/encryptionconfig"
	"k8s.io/apiserver/pkg/storage/value"
	kmstypes "k8s.io/apiserver/pkg/storage/value/encrypt/envelope/kmsv2/v2"
)

// etcdKey is where the Secret of these tests lies; kube-apiserver binds it to the ciphertext.
const etcdKey = "/registry/secrets/default/database"

// secret is a Secret as kube-apiserver serialises it for etcd.
var secret = func() []byte {
	scheme := runtime.NewScheme()
	if err := corev1.AddToScheme(scheme); err != nil {
		panic(err)
	}
	object, err := runtime.Encode(protobuf.NewSerializer(scheme, scheme), &corev1.Secret{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Secret"},
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "database"},
		Data:       map[string][]byte{"password": []byte("correct horse battery staple")},
	})
	if err != nil {
		panic(err)
	}
	return object
}()

// Entries of providers: in an EncryptionConfiguration.
const identity = "{identity: {}}"

func v2(name, endpoint string) string {
	return fmt.Sprintf("{kms: {apiVersion: v2, name: %s, endpoint: '%s', timeout: 3s}}", name, endpoint)
}

// v1 has no cache of DEKs, so that every read asks the plugin.
func v1(name, endpoint string) string {
	return fmt.Sprintf("{kms: {apiVersion: v1, name: %s, endpoint: '%s', timeout: 3s, cachesize: -1}}", name, endpoint)
}

// apis are the two KMS APIs where a test wants the same of both.
var apis = map[string]func(name, endpoint string) string{"v1": v1, "v2": v2}

// apiserver is what kube-apiserver makes of --encryption-provider-config. Its
// v2 cache of DEKs starts empty, so a read by a new one always asks the plugin.
type apiserver struct {
	secrets value.Transformer
	health  []healthz.HealthChecker
}

func newAPIServer(t *testing.T, providers ...string) *apiserver {
	t.Helper()
	config := `apiVersion: apiserver.config.k8s.io/v1
kind: EncryptionConfiguration
resources:
  - resources: [secrets]
    providers:
      - ` + strings.Join(providers, "\n      - ") + "\n"
	file := filepath.Join(t.TempDir(), "encryption.yaml")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	loaded, err := encryptionconfig.LoadEncryptionConfig(ctx, file, false, "kube-test")
	if err != nil {
		t.Fatalf("%v in\n%s", err, config)
	}
	return &apiserver{loaded.Transformers[schema.GroupResource{Resource: "secrets"}], loaded.HealthChecks}
}

// write returns what would be stored in etcd.
func (a *apiserver) write(t *testing.T) []byte {
	t.Helper()
	stored, err := a.secrets.TransformToStorage(t.Context(), secret, value.DefaultContext(etcdKey))
	if err != nil {
		t.Fatalf("write: %v", err)
	}
	return stored
}

// read wants the Secret back, and kube-apiserver's opinion on whether it is due for a rewrite.
func (a *apiserver) read(t *testing.T, stored []byte, wantStale bool) {
	t.Helper()
	object, stale, err := a.secrets.TransformFromStorage(t.Context(), stored, value.DefaultContext(etcdKey))
	switch {
	case err != nil:
		t.Errorf("read: %v", err)
	case !bytes.Equal(object, secret):
		t.Errorf("read %q, want %q", object, secret)
	case stale != wantStale:
		t.Errorf("stale is %v, want %v", stale, wantStale)
	}
}

// refuse wants an error and no bytes, and returns the error.
func (a *apiserver) refuse(t *testing.T, stored []byte, key string) error {
	t.Helper()
	object, _, err := a.secrets.TransformFromStorage(t.Context(), stored, value.DefaultContext(key))
	if err == nil || object != nil {
		t.Errorf("read %q and error %v, want nothing and an error", object, err)
	}
	return err
}

// check asks all of kube-apiserver's health checks.
func (a *apiserver) check() error {
	for _, c := range a.health {
		if err := c.Check(httptest.NewRequest("GET", "/healthz", nil)); err != nil {
			return fmt.Errorf("%s: %w", c.Name(), err)
		}
	}
	return nil
}

// encryptedObject decodes what v2 stores behind its prefix.
func encryptedObject(t *testing.T, stored []byte, prefix string) *kmstypes.EncryptedObject {
	t.Helper()
	rest, found := bytes.CutPrefix(stored, []byte(prefix))
	object := new(kmstypes.EncryptedObject)
	if err := proto.Unmarshal(rest, object); !found || err != nil {
		t.Fatalf("%q does not begin with %q, or %v", stored, prefix, err)
	}
	return object
}

// The rotation of README, step by step, each with a restart of the plugin on the same socket.
func TestRotation(t *testing.T) {
	for api, provider := range apis {
		t.Run(api, func(t *testing.T) {
			t.Parallel()
			endpoint, old, next := fileEndpoint(t), newKEK(), newKEK()
			byKeyID := api == "v2" // what only v2 can tell
			var p *plugin
			restart := func(ring ...kek) *apiserver {
				if p != nil {
					p.stop(t)
				}
				p = serve(t, endpoint, ring...)
				return newAPIServer(t, provider("vault", endpoint))
			}

			first := restart(old).write(t)

			a := restart(old, next) // the old one still seals
			a.read(t, first, false)
			a.read(t, a.write(t), false)

			a = restart(next, old)
			a.read(t, first, byKeyID)
			migrated := a.write(t)
			a.read(t, migrated, false)

			restart(old, next).read(t, migrated, byKeyID) // a control plane that is one step behind

			a = restart(next)
			a.read(t, migrated, false)
			err := a.refuse(t, first, etcdKey)
			if status.Code(err) != codes.NotFound || !strings.Contains(fmt.Sprint(err), old.id()) {
				t.Errorf("%v: want NotFound naming %s", err, old.id())
			}
		})
	}
}
