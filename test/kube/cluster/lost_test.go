package cluster

import (
	"context"
	"encoding/base64"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// The KEK is lost, with all copies. An apiserver that still runs has the data
// keys: nothing it has read is lost. After its restart what was not saved is
// gone, and has to be deleted before anything of its kind can be listed again.
func TestLostKEK(t *testing.T) {
	t.Parallel() // it mostly waits
	gone, next := newKEK(), newKEK()
	e, p := startEtcd(t, tempDir(t)), newPlugin(t)
	a := newAPIServer(t, e)
	a.configure(t, "secrets: "+v2("vault", p))
	p.start(t, gone)
	a.start(t)
	saved, left := write(t, "saved", 20, a), write(t, "left", 5, a)
	if err := a.secret("example"); err != nil {
		t.Fatal(err)
	}
	saved.sealed(t, e, "k8s:enc:kms:v2:vault:", gone)
	lost := append(left.names(), "example")

	// While it runs.
	p.start(t, next)
	took := a.writesUnder(t, e, next)
	dir := tempDir(t)
	if code, out := a.operator(t, dir, "export", ""); code != 0 {
		t.Fatalf("export: exit %d\n%s", code, out)
	}
	export := string(must(os.ReadFile(dir + "/secrets.yaml"))(t))
	for name, secret := range saved.andMore(left) {
		if !strings.Contains(export, base64.StdEncoding.EncodeToString(secret.Data["password"])) {
			t.Errorf("%s is not in the export", name)
		}
	}
	saved = saved.rewrite(t, a)
	saved.sealed(t, e, "k8s:enc:kms:v2:vault:", next)
	e.audited(t, []kek{next}, 1, []string{
		"key_id=" + next.id() + " values=" + count(saved) + " sealing-kek",
		"key_id=" + gone.id() + " values=" + fmt.Sprint(len(lost)) + " missing-kek"})

	// After a restart.
	a.launch(t)
	failing := a.fails(t, "informer-sync", "poststarthook/storage-readiness")
	api, ctx := a.client.CoreV1().Secrets(namespace), context.Background()
	for name := range saved {
		if err := a.reads(name); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	_, listed := api.List(ctx, metav1.ListOptions{})
	deleted := api.Delete(ctx, "example", metav1.DeleteOptions{})
	if listed == nil || deleted == nil {
		t.Errorf("a list: %v, a deletion: %v", listed, deleted)
	}
	documented(t, listed, "storage is (re)initializing")
	documented(t, deleted, "corrupt object")
	unsafe := func(name string, dry ...string) error {
		yes := true
		return api.Delete(ctx, name, metav1.DeleteOptions{IgnoreStoreReadErrorWithClusterBreakingPotential: &yes, DryRun: dry})
	}
	readable := unsafe(saved.names()[0])
	if readable == nil {
		t.Error("a Secret that can be read was deleted unsafely")
	}
	if err := unsafe("example", metav1.DryRunAll); err != nil {
		t.Errorf("dry run: %v", err)
	}
	if code, out := a.operator(t, dir, "unsafe-delete", ""); code != 0 {
		t.Errorf("the guide's deletion: exit %d\n%s", code, out)
	}
	for _, name := range left.names() {
		if raw := e.raw(t, registry+name); len(raw) != 1 {
			t.Errorf("%s: %d values", name, len(raw))
		}
		if err := unsafe(name); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	healed := eventually(t, 100*time.Second, "/readyz, when the unreadable ones are gone", a.ready)
	saved.read(t, a)
	e.audited(t, []kek{next}, 0, []string{"key_id=" + next.id() + " values=" + count(saved) + " sealing-kek"})
	if raw := e.raw(t, registry); len(raw) != len(saved) {
		t.Errorf("%d values are left, not %d", len(raw), len(saved))
	}
	figures(t, "Kubernetes %s: KEK lost under a running apiserver: new one in use after %v, %d Secrets exported, %d rewritten; after a restart /readyz fails %v, a list says %.200q, "+
		"a deletion %.200q; %d deleted unsafely (a readable one: %.120q), ready %v later",
		a.version(t), took, len(saved)+len(lost), len(saved), failing, fmt.Sprint(listed), fmt.Sprint(deleted), len(lost), fmt.Sprint(readable), healed)
}

// An empty etcd and no plugin: kube-apiserver is not ready, and no Secret gets in
// any other way; all the rest comes about.
func TestEmptyEtcd(t *testing.T) {
	t.Parallel() // it mostly waits
	key := newKEK()
	e, p := startEtcd(t, tempDir(t)), newPlugin(t)
	a := newAPIServer(t, e)
	a.configure(t, "secrets: "+v2("vault", p))
	a.launch(t)
	failing := a.fails(t, "kms-providers")
	if _, err := a.get("/livez"); err != nil {
		t.Errorf("/livez: %v", err)
	}
	refused := a.secret("never")
	if raw := e.raw(t, "/registry/secrets/"); refused == nil || len(raw) > 0 {
		t.Errorf("a write without a plugin: %v, in etcd: %v", refused, raw)
	}
	for _, key := range []string{"namespaces/kube-system", "priorityclasses/system-node-critical", "namespaces/default"} {
		eventually(t, 30*time.Second, key, func() error {
			if len(e.raw(t, "/registry/"+key)) != 1 {
				return fmt.Errorf("not in etcd")
			}
			return nil
		})
	}
	documented(t, refused, "got unexpected nil transformer")
	bootstrapped := len(e.raw(t, "/registry/"))
	p.start(t, key)
	healed := eventually(t, 40*time.Second, "a first start without plugin", a.ready)
	s := write(t, "first", 5, a)
	s.sealed(t, e, "k8s:enc:kms:v2:vault:", key)
	figures(t, "Kubernetes %s, empty etcd, no plugin: /readyz fails %v, %d values bootstrapped, a write of a Secret says %.200q; ready %v after the plugin",
		a.version(t), failing, bootstrapped, fmt.Sprint(refused), healed)
}
