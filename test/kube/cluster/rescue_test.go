package cluster

import (
	"bytes"
	"context"
	"encoding/base64"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Neither plugin nor apiserver starts any more, but there is etcd, and the KEK.
func TestRescue(t *testing.T) {
	key, wrong := newKEK(), newKEK()
	e, p := startEtcd(t, tempDir(t)), newPlugin(t)
	p.start(t, key)
	a := newAPIServer(t, e, "--feature-gates=KMSv1=true")
	a.configure(t, "secrets: "+v1("first", p, 1000))
	a.start(t)
	s := write(t, "v1", 10, a)
	s.sealed(t, e, "k8s:enc:kms:v1:first:", key)
	a.configure(t, "secrets: "+v2("second", p)+", "+v1("first", p, 1000))
	a.start(t)
	more := write(t, "v2", 10, a)
	more.sealed(t, e, "k8s:enc:kms:v2:second:", key)
	s = s.andMore(more)
	a.stop(t)
	p.stop(t)

	s.unsealed(t, e, key)
	s.unsealed(t, e, wrong, key)
	raw := e.raw(t, registry)
	for _, name := range s.names() {
		for _, args := range [][]string{{"get", registry + name, "-w", "protobuf"}, {"get", registry + name, "--print-value-only"}} {
			v := []string{"unseal"}
			if args[2] == "--print-value-only" {
				v = append(v, registry+name)
			}
			code, stdout, stderr := verb(t, []kek{wrong}, e.ctl(t, nil, args...), v...)
			if code != 1 || len(stdout) > 0 || !strings.Contains(stderr, key.id()) {
				t.Errorf("unseal with the wrong KEK: exit %d, %q, %q", code, stdout, stderr)
			}
		}
		// Bound to its key: no value opens as another.
		code, stdout, stderr := verb(t, []kek{key}, raw[registry+name].Value, "unseal", registry+name+"x")
		if code != 1 || len(stdout) > 0 || stderr == "" {
			t.Errorf("unseal as another key: exit %d, %q, %q", code, stdout, stderr)
		}
	}

	// Put back in plaintext, for an apiserver without a plugin.
	for _, name := range s.names() {
		code, object, stderr := verb(t, []kek{key}, e.ctl(t, nil, "get", registry+name, "-w", "protobuf"), "unseal")
		if code != 0 {
			t.Fatal(stderr)
		}
		e.ctl(t, object, "put", registry+name)
	}
	for _, name := range s.names() {
		code, object, _ := verb(t, []kek{key}, raw[registry+name].Value, "unseal", registry+name)
		if got := e.raw(t, registry)[registry+name].Value; code != 0 || !bytes.Equal(got, object) {
			t.Errorf("%s: etcd holds %q, want %q", name, got, object)
		}
	}
	e.audited(t, []kek{key}, 1, []string{"broken values=0", "no value was sealed"})
	a.configure(t, "secrets: "+identity)
	a.start(t)
	for name := range s {
		secret, err := a.client.CoreV1().Secrets(namespace).Get(context.Background(), name, metav1.GetOptions{})
		if err != nil || !bytes.Equal(secret.Data["password"], s[name].Data["password"]) || secret.UID != s[name].UID {
			t.Errorf("%s: %v, %v", name, secret, err)
		}
	}
	figures(t, "Kubernetes %s: 10 Secrets of v1 and 10 of v2 unsealed, put back with etcdctl, served under identity", a.version(t))
}

// All of it into files, and one of them into YAML and into another cluster.
func TestRescueElsewhere(t *testing.T) {
	key := newKEK()
	e, p := startEtcd(t, tempDir(t)), newPlugin(t)
	p.start(t, key)
	a := newAPIServer(t, e)
	a.configure(t, "secrets: "+v2("vault", p))
	a.start(t)
	s := write(t, "good", 20, a).withExample(t, a)
	a.stop(t)
	p.stop(t)
	dir := tempDir(t)
	raw := e.raw(t, registry)
	code, stdout, stderr := verb(t, []kek{key}, e.ctl(t, nil, "get", "--prefix", "/registry/secrets", "-w", "protobuf"), "unseal", "--all", dir+"/objects")
	if code != 0 || string(stdout) != "written values=21\n" || stderr != "" {
		t.Fatalf("exit %d, %s%s", code, stdout, stderr)
	}
	for name, secret := range s {
		object, err := os.ReadFile(dir + "/objects" + registry + name)
		if err == nil {
			err = decode(object, raw[registry+name].ModRevision, secret)
		}
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := os.Rename(dir+"/objects"+registry+"example", dir+"/example.bin"); err != nil {
		t.Fatal(err)
	}

	other, q, next := startEtcd(t, tempDir(t)), newPlugin(t), newKEK()
	q.start(t, next)
	b := newAPIServer(t, other)
	b.configure(t, "secrets: "+v2("other", q))
	b.start(t)
	if code, out := b.operator(t, dir, "yaml", ""); code != 0 {
		t.Fatalf("yaml: exit %d\n%s", code, out)
	}
	password := string(s["example"].Data["password"])
	text := string(must(os.ReadFile(dir + "/example.yaml"))(t))
	for _, want := range []string{"kind: Secret\n", "name: example\n", "password: " + base64.StdEncoding.EncodeToString([]byte(password)) + "\n"} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
	if b.reads("example") == nil {
		t.Error("doc/operate.md says that nothing is stored for it")
	}
	if _, err := exec.LookPath("protoc"); err == nil {
		if code, out := b.operator(t, dir, "decode", ""); code != 0 || !strings.Contains(out, password) {
			t.Errorf("decode: exit %d\n%s", code, out)
		}
	} else {
		t.Log("no protoc: its recipe was not run")
	}
	os.Remove(dir + "/proxy.sock")
	if code, out := b.operator(t, dir, "restore", ""); code != 0 {
		t.Fatalf("restore: exit %d\n%s", code, out)
	}
	restored := must(b.client.CoreV1().Secrets(namespace).Get(context.Background(), "example", metav1.GetOptions{}))(t)
	if string(restored.Data["password"]) != password || restored.UID == s["example"].UID {
		t.Errorf("restored %v", restored)
	}
	secrets{"example": restored}.sealed(t, other, "k8s:enc:kms:v2:other:", next)
	figures(t, "Kubernetes %s: %d Secrets unsealed into files, one made YAML of and restored in another cluster", b.version(t), len(s))
}

// "Does this backup open?" after damage of every kind that etcd can hold.
func TestDamage(t *testing.T) {
	old, key, lost := newKEK(), newKEK(), newKEK()
	e, p := startEtcd(t, tempDir(t)), newPlugin(t)
	a := newAPIServer(t, e)
	a.configure(t, "secrets: "+v2("vault", p))
	written := func(prefix string, n int, keks ...kek) secrets {
		a.stop(t)
		p.start(t, keks...)
		a.start(t)
		s := write(t, prefix, n, a)
		s.sealed(t, e, "k8s:enc:kms:v2:vault:", keks[0])
		return s
	}
	s := written("lost", 3, lost).andMore(written("old", 4, old, lost)).andMore(written("good", 20, key, old, lost))
	a.stop(t)
	raw := e.raw(t, registry)
	totals := func(good, other, missing, broken, foreign string) []string {
		lines := []string{"v2 key_id=" + key.id() + " values=" + good + " sealing-kek", "broken values=" + broken, "foreign values=" + foreign}
		if other != "" {
			lines = append(lines, "v2 key_id="+old.id()+" values="+other+" other-kek")
		}
		if missing != "" {
			lines = append(lines, "v2 key_id="+lost.id()+" values="+missing+" missing-kek")
		}
		return lines
	}
	e.audited(t, []kek{key, old}, 1, totals("20", "4", "3", "0", "0"))

	damage := map[string]func(value []byte) []byte{
		"good-1": func(v []byte) []byte { v[len(v)-1] ^= 1; return v },        // the object
		"good-2": func(v []byte) []byte { return v[:len(v)-7] },               // cut short
		"good-3": func([]byte) []byte { return raw[registry+"good-4"].Value }, // another key's
		"good-5": func(v []byte) []byte { // the sealed data key
			i := bytes.Index(v, []byte(key.id())) + len(key.id()) + 60
			v[i] ^= 1
			return v
		},
		"good-6": func(v []byte) []byte { return bytes.Replace(v, []byte(key.id()), []byte(old.id()), 1) },
		"good-7": func(v []byte) []byte { return []byte("k8s:enc:aescbc:v1:key1:whatever") },
	}
	for name, f := range damage {
		e.put(t, registry+name, f(bytes.Clone(raw[registry+name].Value)))
	}
	out := e.audited(t, []kek{key, old}, 1, totals("14", "4", "3", "5", "1"), "--list")
	for name := range s {
		listed := strings.Contains(out, registry+name+"\n")
		if want := damage[name] != nil || !strings.HasPrefix(name, "good"); listed != want {
			t.Errorf("audit --list names %s: %v, want %v", name, listed, want)
		}
	}

	// The apiserver is of the same opinion.
	p.start(t, key, old)
	a.launch(t)
	eventually(t, 30*time.Second, "an apiserver that reads", func() error {
		_, err := a.client.CoreV1().Secrets(namespace).Get(context.Background(), "good-0", metav1.GetOptions{})
		return err
	})
	for name := range s {
		_, err := a.client.CoreV1().Secrets(namespace).Get(context.Background(), name, metav1.GetOptions{})
		if want := damage[name] == nil && !strings.HasPrefix(name, "lost"); (err == nil) != want {
			t.Errorf("%s: %v", name, err)
		}
	}
	// /readyz is not: some Secrets cannot be listed.
	ready := a.fails(t, "informer-sync", "poststarthook/storage-readiness")

	// Healed, it says so.
	for name := range damage {
		e.put(t, registry+name, raw[registry+name].Value)
	}
	e.audited(t, []kek{key, old, lost}, 1, []string{"broken values=0", "foreign values=0", "other-kek"})
	for name := range s {
		if !strings.HasPrefix(name, "good") {
			e.ctl(t, nil, "del", registry+name)
		}
	}
	e.audited(t, []kek{key}, 0, totals("20", "", "", "0", "0"))
	e.audited(t, []kek{key}, 1, []string{"plaintext"}, "--strict") // the rest of the registry is not encrypted
	figures(t, "audit found %d damaged, 4 other-kek, 3 missing-kek of %d values, as the apiserver did; /readyz then fails %v", len(damage), len(s), ready)
}

// Damage that takes away the sign by which a value is known for ours is still no other plugin's value.
func TestDamagedKeyID(t *testing.T) {
	key := newKEK()
	e, p := startEtcd(t, tempDir(t)), newPlugin(t)
	p.start(t, key)
	a := newAPIServer(t, e)
	a.configure(t, "secrets: "+v2("vault", p))
	a.start(t)
	write(t, "good", 3, a).sealed(t, e, "k8s:enc:kms:v2:vault:", key)
	a.stop(t)
	value := e.raw(t, registry)[registry+"good-1"].Value
	for what, damaged := range map[string][]byte{
		"keyID of one odd letter": bytes.Replace(value, []byte(key.id()), []byte("g"+key.id()[1:]), 1),
		"nothing but the prefix":  []byte("k8s:enc:kms:v2:vault:"),
	} {
		t.Run(what, func(t *testing.T) {
			e.put(t, registry+"good-1", damaged)
			e.audited(t, []kek{key}, 1, []string{"values=2 sealing-kek", "broken values=1", "foreign values=0"})
		})
	}
}
