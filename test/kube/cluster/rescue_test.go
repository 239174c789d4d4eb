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
	"k8s.io/client-go/rest"
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
	e.audited(t, []kek{key}, 1, []string{"no value was sealed"})
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
	needsNamespaces(t)
	key := newKEK()
	e, p := startEtcd(t, tempDir(t)), newPlugin(t)
	p.start(t, key)
	a := newAPIServer(t, e)
	a.configure(t, "secrets: "+v2("vault", p))
	a.start(t)
	s := write(t, "good", many(), a).withExample(t, a)
	a.stop(t)
	p.stop(t)
	dir := tempDir(t)
	raw := e.raw(t, registry)
	stranger := bytes.Replace(raw[registry+"example"].Value, []byte(key.id()), []byte(newKEK().id()), 1)
	e.put(t, registry+"stranger", stranger)
	start := time.Now()
	code, out := a.operator(t, dir, "rescue-all", inEtc+key.file())
	took := time.Since(start).Round(time.Second)
	if code != 0 || strings.Count(out, "not opened: ") != 1 || !strings.Contains(out, "not opened: "+registry+"stranger\n") {
		t.Fatalf("rescue-all: exit %d, %s", code, out)
	}
	name := func(key string) string { return dir + "/objects/" + strings.ReplaceAll(key, "/", "_") }
	if files := must(os.ReadDir(dir + "/objects"))(t); len(files) != len(s) {
		t.Errorf("%d files of %d Secrets", len(files), len(s))
	}
	for secretName, secret := range s {
		object, err := os.ReadFile(name(registry + secretName))
		if err == nil {
			err = decode(object, raw[registry+secretName].ModRevision, secret)
		}
		if err != nil {
			t.Errorf("%s: %v", secretName, err)
		}
	}
	if err := os.Rename(name(registry+"example"), dir+"/example.bin"); err != nil {
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
		code, out, _ := command(t, nil, nil, "sh", "-euc", "cd $0; tail -c +5 example.bin | protoc --decode_raw", dir)
		if code != 0 || !strings.Contains(string(out), password) {
			t.Errorf("decode: exit %d\n%s", code, out)
		}
	} else {
		t.Log("no protoc: its recipe was not run")
	}
	os.Remove(dir + "/proxy.sock")
	if code, out := b.operator(t, dir, "yaml", "", "?dryRun=All", ""); code != 0 {
		t.Fatalf("into another cluster: exit %d\n%s", code, out)
	}
	restored := must(b.client.CoreV1().Secrets(namespace).Get(context.Background(), "example", metav1.GetOptions{}))(t)
	if string(restored.Data["password"]) != password || restored.UID == s["example"].UID {
		t.Errorf("restored %v", restored)
	}
	secrets{"example": restored}.sealed(t, other, "k8s:enc:kms:v2:other:", next)
	figures(t, "Kubernetes %s: %d Secrets unsealed into files in %v, one made YAML of and restored in another cluster",
		b.version(t), len(s), took)
}

// A custom resource is stored, rescued, and goes into another cluster, as JSON or as CBOR.
func TestRescueCustomResource(t *testing.T) {
	const crd = `{apiVersion: apiextensions.k8s.io/v1, kind: CustomResourceDefinition, metadata: {name: widgets.example.com}, spec: {group: example.com,
		scope: Namespaced, names: {plural: widgets, kind: Widget}, versions: [{name: v1, served: true, storage: true, schema:
		{openAPIV3Schema: {type: object, x-kubernetes-preserve-unknown-fields: true}}}]}}`
	const widget = `{apiVersion: example.com/v1, kind: Widget, metadata: {name: w, namespace: ` + namespace + `}, spec: {size: 7}}`
	for gate, magic := range map[string]string{"false": "{", "true": "\xd9\xd9\xf7"} {
		t.Run("CBORServingAndStorage="+gate, func(t *testing.T) {
			key := newKEK()
			p := newPlugin(t)
			p.start(t, key)
			cluster := func() (*etcd, *apiserver) {
				e := startEtcd(t, tempDir(t))
				a := newAPIServer(t, e, "--feature-gates=CBORServingAndStorage="+gate)
				a.configure(t, "widgets.example.com: "+v2("vault", p))
				a.start(t)
				a.kubectl(t, 0, crd, "create", "-f", "-")
				a.kubectl(t, 0, "", "wait", "--for=condition=Established", "crd/widgets.example.com")
				return e, a
			}
			e, a := cluster()
			a.kubectl(t, 0, widget, "create", "-f", "-")
			code, object, stderr := verb(t, []kek{key}, e.ctl(t, nil, "get", "/registry/example.com/widgets/"+namespace+"/w", "-w", "protobuf"), "unseal")
			if code != 0 || !strings.HasPrefix(string(object), magic) {
				t.Fatalf("exit %d, %.80q %s", code, object, stderr)
			}
			a.stop(t)
			_, b := cluster()
			if gate == "false" {
				b.kubectl(t, 0, string(object), "create", "-f", "-")
			} else {
				client := must(rest.HTTPClientFor(b.rest))(t)
				response := must(client.Post(b.url+"/apis/example.com/v1/namespaces/"+namespace+"/widgets", "application/cbor", bytes.NewReader(object)))(t)
				response.Body.Close()
				if response.StatusCode != 201 {
					t.Errorf("status %d", response.StatusCode)
				}
			}
			if size := b.kubectl(t, 0, "", "-n", namespace, "get", "widget", "w", "-o", "jsonpath={.spec.size}"); size != "7" {
				t.Errorf("it came back as %q", size)
			}
		})
	}
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
	totals := func(good, other, missing, damaged, foreign string) []string {
		lines := []string{"key_id=" + key.id() + " values=" + good + " sealing-kek", "foreign values=" + foreign}
		if damaged != "0" {
			lines = append(lines, damaged+" are damaged")
		}
		if other != "" {
			lines = append(lines, "key_id="+old.id()+" values="+other+" other-kek")
		}
		if missing != "" {
			lines = append(lines, "key_id="+lost.id()+" values="+missing+" missing-kek")
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
	e.audited(t, []kek{key, old, lost}, 1, []string{"foreign values=0", "other-kek"})
	for name := range s {
		if !strings.HasPrefix(name, "good") {
			e.ctl(t, nil, "del", registry+name)
		}
	}
	e.audited(t, []kek{key}, 0, totals("20", "", "", "0", "0"))
	e.audited(t, []kek{key}, 1, []string{"plaintext"}, "--strict") // the rest of the registry is not encrypted
	figures(t, "audit found %d damaged, 4 other-kek, 3 missing-kek of %d values, as the apiserver did; /readyz then fails %v", len(damage), len(s), ready)
}
