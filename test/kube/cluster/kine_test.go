package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
)

// An edge control plane as k3s has it by default: kube-apiserver on kine, which keeps all in one table of SQLite.

// startKine starts kine on the table that is in dir, or on a new one. To kube-apiserver it is an etcd.
func startKine(t *testing.T, dir string) *etcd {
	t.Helper()
	port := freePort(t)
	e := &etcd{dir: dir, url: fmt.Sprintf("http://127.0.0.1:%d", port)}
	e.kine(t)
	e.connect(t)
	return e
}

// kine starts its process, with the parameters of its own default, and so of k3s'.
func (e *etcd) kine(t *testing.T) {
	t.Helper()
	e.process = spawn(t, e.dir, "kine", nil, nil, filepath.Join(programs, "kine"), "--listen-address="+e.url, "--metrics-bind-address=0",
		"--endpoint=sqlite://"+e.dir+"/state.db?_journal_mode=WAL&_busy_timeout=30000&_synchronous=NORMAL&_txlock=immediate&_stmt_cache_size=20&cache=shared")
}

// needsSQLite skips where the guide's recipes cannot run.
func needsSQLite(t *testing.T) {
	t.Helper()
	for _, name := range []string{"sqlite3", "xxd"} {
		if _, err := exec.LookPath(name); err != nil {
			t.Skip("needs sqlite3 and xxd")
		}
	}
}

// recipe runs a block of the guide's, in which the paths of k3s and of the KEK are this test's. What it writes comes to lie beside the database.
func (e *etcd) recipe(t *testing.T, name string, keks ...kek) (int, string) {
	t.Helper()
	dir := tempDir(t)
	err := errors.Join(os.Symlink(binary, dir+"/kmsplugin"), os.Symlink(must(filepath.Abs("../../../deploy/kmsplugin-ring"))(t), dir+"/kmsplugin-ring"),
		os.WriteFile(dir+"/kek", []byte(strings.TrimPrefix(ring(keks...)[0], "KMS_KEK=")), 0o600))
	if err != nil {
		t.Fatal(err)
	}
	script := strings.NewReplacer("/var/lib/rancher/k3s/server/db", e.dir, "kmsplugin-ring", "kmsplugin-ring --file "+dir+"/kek").Replace(guide(t, name))
	code, stdout, stderr := command(t, []string{"PATH=" + dir + ":" + os.Getenv("PATH")}, nil, "sh", "-euc", `cd "$0"; `+script+"\n", dir)
	for _, written := range []string{"example.bin", "objects", "copy.db"} {
		os.RemoveAll(e.dir + "/" + written)
		if err := os.Rename(dir+"/"+written, e.dir+"/"+written); err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
	}
	return code, string(stdout) + stderr
}

// answers wants an exit status and a part of what a recipe says.
func (e *etcd) answers(t *testing.T, name string, keks []kek, wantCode int, want ...string) {
	t.Helper()
	code, out := e.recipe(t, name, keks...)
	for _, line := range want {
		if !strings.Contains(out, line) {
			t.Errorf("%s does not say %q", name, line)
			wantCode = -1
		}
	}
	if code != wantCode {
		t.Errorf("%s: exit %d, want %d\n%s", name, code, wantCode, out)
	}
}

// holdsPlaintext counts what is readable in the files of the database, rows or not.
func (e *etcd) holdsPlaintext(t *testing.T) int {
	t.Helper()
	found := 0
	for _, file := range must(filepath.Glob(e.dir + "/state.db*"))(t) {
		found += bytes.Count(must(os.ReadFile(file))(t), []byte(marker))
	}
	return found
}

// revisions makes n new revisions, of something else than Secrets.
func (a *apiserver) revisions(t *testing.T, n int) {
	t.Helper()
	var names []string
	for i := range n {
		names = append(names, fmt.Sprintf("filler-%d", i))
	}
	all(t, names, func(name string) error {
		_, err := a.client.CoreV1().ConfigMaps(namespace).Create(context.Background(),
			&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
		return err
	})
}

// Plaintext, turned on, what is left of it removed, rotated, killed, and rescued without an API server.
func TestKine(t *testing.T) {
	needsSQLite(t)
	old, next := newKEK(), newKEK()
	e, p := startKine(t, tempDir(t)), newPlugin(t)
	a := newAPIServer(t, e, "--etcd-compaction-interval=5s")
	a.configure(t, "secrets: "+identity)
	a.start(t)
	s := write(t, "plain", many(), a).withExample(t, a)
	n := count(s)
	e.answers(t, "sqlite-audit", []kek{old}, 1, "no value was sealed", "plaintext values="+n)

	// Turned on. The table still has what is rewritten, in old rows and in old_value of the new ones.
	p.start(t, old)
	a.configure(t, "secrets: "+v2("vault", p)+", "+identity)
	a.start(t)
	s = s.rewrite(t, a)
	s.sealed(t, e, "k8s:enc:kms:v2:vault:", old)
	e.answers(t, "sqlite-audit", []kek{old}, 0, "key_id="+old.id()+" values="+n+" sealing-kek", "plaintext values=0")
	e.answers(t, "sqlite-history", []kek{old}, 1, "plaintext values=")
	first := e.holdsPlaintext(t)
	api := func() typedcorev1.SecretInterface { return a.client.CoreV1().Secrets(namespace) }
	again := must(api().Update(context.Background(), s["example"], metav1.UpdateOptions{}))(t)
	if again.ResourceVersion != s["example"].ResourceVersion {
		t.Error("doc/operate.md says that a second rewrite writes nothing")
	}
	dir := tempDir(t)
	if code, out := a.operator(t, dir, "change", ""); code != 0 {
		t.Fatalf("change: exit %d\n%s", code, out)
	}
	a.revisions(t, 1100) // as time brings them: kine keeps the newest 1,000 whole
	gone := eventually(t, time.Minute, "no plaintext in any row", func() error {
		if code, out := e.recipe(t, "sqlite-history", old); code != 0 {
			return errors.New(out)
		}
		return nil
	})
	rows := e.holdsPlaintext(t)
	a.stop(t)
	stop := func() {
		t.Helper()
		if err := e.end(syscall.SIGTERM); err != nil {
			t.Error(err)
		}
	}
	stop()
	stopped := e.holdsPlaintext(t)
	e.kine(t) // which vacuums
	eventually(t, 30*time.Second, "kine", func() error { _, err := e.client.Get(context.Background(), "x"); return err })
	stop()
	vacuumed := e.holdsPlaintext(t)
	if first == 0 || vacuumed != 0 {
		t.Errorf("plaintext in the database's files: %d after turning it on, %d after all the steps", first, vacuumed)
	}
	figures(t, "%d Secrets turned on: their plaintext %d times in the database's files; no row with it %v after the change and 1,100 revisions, and still %d times; kine stopped %d, started and stopped %d",
		len(s), first, gone, rows, stopped, vacuumed)

	// Killed at once, and started with the plugin last.
	e.kine(t)
	p.start(t, old)
	a.configure(t, "secrets: "+v2("vault", p))
	a.start(t)
	s = s.fresh(t, a)
	for _, victim := range []*process{a.process, e.process, p.process} {
		victim.cmd.Process.Kill()
	}
	for _, victim := range []*process{a.process, e.process, p.process} {
		<-victim.exited
	}
	a.process, p.process = nil, nil
	e.kine(t)
	a.launch(t)
	p.start(t, old)
	ready := eventually(t, 2*time.Minute, "/readyz", a.ready)
	s.read(t, a)
	figures(t, "%d Secrets after SIGKILL of kube-apiserver, kine and plugin, the plugin started last: ready %v after it, all readable", len(s), ready)

	// Rotation: a question that a loop over unseal does not ask.
	p.start(t, old, next)
	p.start(t, next, old)
	a.writesUnder(t, e, next)
	e.answers(t, "sqlite-audit", []kek{next, old}, 1, "values="+n+" other-kek", "are under another KEK than the sealing one")
	s = s.rewrite(t, a)
	start := time.Now()
	e.answers(t, "sqlite-audit", []kek{next}, 0, "key_id="+next.id()+" values="+n+" sealing-kek")
	auditing := time.Since(start).Round(time.Millisecond)
	e.answers(t, "sqlite-history", []kek{next, old}, 1, "key_id="+old.id())

	// A copy without its -wal lacks the newest rows; the recipe's does not.
	for name, want := range map[string]bool{"cp": false, "recipe": true} {
		copied := &etcd{dir: tempDir(t)}
		if name == "cp" {
			b := must(os.ReadFile(e.dir + "/state.db"))(t)
			if err := os.WriteFile(copied.dir+"/state.db", b, 0o600); err != nil {
				t.Fatal(err)
			}
		} else if code, out := e.recipe(t, "sqlite-copy", next); code != 0 {
			t.Errorf("sqlite-copy: exit %d\n%s", code, out)
		} else if err := os.Rename(e.dir+"/copy.db", copied.dir+"/state.db"); err != nil {
			t.Fatal(err)
		}
		code, out := copied.recipe(t, "sqlite-audit", next)
		if (code == 0) != want {
			t.Errorf("the copy by %s: exit %d\n%s", name, code, out)
		}
	}

	// The API server is lost: out of the table.
	a.stop(t)
	p.stop(t)
	raw := e.raw(t, registry)
	e.answers(t, "sqlite-all", []kek{next}, 0)
	for name, secret := range s {
		object, err := os.ReadFile(e.dir + "/objects/" + strings.ReplaceAll(registry+name, "/", "_"))
		if err == nil {
			err = decode(object, raw[registry+name].ModRevision, secret)
		}
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	e.answers(t, "sqlite", []kek{old}, 1, next.id())
	e.answers(t, "sqlite", []kek{next}, 0)

	// Put back: kine takes a put, and no del but in a transaction.
	object := must(os.ReadFile(e.dir + "/example.bin"))(t)
	refused, _, stderr := command(t, nil, nil, filepath.Join(programs, "etcdctl"), "--endpoints="+e.url, "del", registry+"example")
	if refused == 0 || !strings.Contains(stderr, "delete is not implemented by kine") {
		t.Errorf("etcdctl del: exit %d\n%s", refused, stderr)
	}
	e.ctl(t, object, "put", registry+"example")
	delete := strings.NewReplacer("REVISION", fmt.Sprint(raw[registry+"plain-0"].ModRevision), "/example", "/plain-0").Replace(guide(t, "txn-delete"))
	code, stdout, _ := command(t, []string{"ETCDCTL_ENDPOINTS=" + e.url, "PATH=" + programs + ":" + os.Getenv("PATH")}, nil, "sh", "-euc", delete)
	if code != 0 || !bytes.HasPrefix(stdout, []byte("SUCCESS")) {
		t.Errorf("a deletion by transaction: exit %d, %s", code, stdout)
	}
	a.configure(t, "secrets: "+identity+", "+v2("vault", p))
	p.start(t, next)
	a.start(t)
	if err := a.reads("example"); err != nil {
		t.Errorf("put back: %v", err)
	}
	if a.reads("plain-0") == nil {
		t.Error("deleted, and still there")
	}

	// What cannot be read any more is deleted through the API, on kine too.
	e.ctl(t, []byte("k8s:enc:kms:v2:vault:nonsense"), "put", registry+"example")
	a.launch(t)
	eventually(t, time.Minute, "an apiserver that knows it for corrupt", func() error {
		if err := a.reads("example"); err == nil || !strings.Contains(err.Error(), "corrupt object") && !strings.Contains(err.Error(), "unable to transform key") {
			return fmt.Errorf("%v", err)
		}
		return nil
	})
	if code, out := a.operator(t, dir, "unsafe-delete", ""); code != 0 {
		t.Errorf("unsafe-delete: exit %d\n%s", code, out)
	}
	figures(t, "%d values audited out of SQLite in %v; put back with etcdctl, deleted by a transaction and through the API", len(s), auditing)
}

// withExample adds the Secret that the guide's recipes name.
func (s secrets) withExample(t *testing.T, a *apiserver) secrets {
	t.Helper()
	example := must(a.client.CoreV1().Secrets(namespace).Create(context.Background(), newSecret("example"), metav1.CreateOptions{}))(t)
	return s.andMore(secrets{"example": example})
}

// fresh reads the Secrets anew: others have changed them.
func (s secrets) fresh(t *testing.T, a *apiserver) secrets {
	t.Helper()
	list := must(a.client.CoreV1().Secrets(namespace).List(context.Background(), metav1.ListOptions{}))(t)
	now := secrets{}
	for i := range list.Items {
		if want := s[list.Items[i].Name]; want != nil {
			if !bytes.Equal(want.Data["password"], list.Items[i].Data["password"]) {
				t.Errorf("%s has changed", want.Name)
			}
			now[want.Name] = &list.Items[i]
		}
	}
	if len(now) != len(s) {
		t.Errorf("%d of %d Secrets", len(now), len(s))
	}
	return now
}
