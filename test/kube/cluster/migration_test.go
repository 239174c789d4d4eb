package cluster

import (
	"testing"
)

// v1 with a cache smaller than the number of Secrets, then from plaintext and
// from v1 to v2, with all of them on one socket.
func TestMigration(t *testing.T) {
	key := newKEK()
	e, p := startEtcd(t, tempDir(t)), newPlugin(t)
	p.start(t, key)
	a := newAPIServer(t, e, "--feature-gates=KMSv1=true")
	old := v1("old", p, 50)

	a.configure(t, "secrets: "+identity)
	a.start(t)
	plain := write(t, "plain", 50, a)

	a.configure(t, "secrets: "+old+", "+identity)
	a.start(t)
	s := write(t, "v1", many(), a)
	s.sealed(t, e, "k8s:enc:kms:v1:old:", key)
	s.read(t, a)
	plain.read(t, a)
	calls := p.calls(t)
	if n := many(); calls["v1beta1 Encrypt OK"] < n || calls["v1beta1 Decrypt OK"] < n {
		t.Errorf("%v: want at least %d of each", calls, n)
	}
	figures(t, "Kubernetes %s, %d Secrets under v1 with a cache of 50: calls %v", a.version(t), len(s), calls)
	e.audited(t, []kek{key}, 0, []string{"key_id=" + key.id() + " values=" + count(s) + " sealing-kek"})
	s.unsealed(t, e, key)

	// All three at once: each old form is read, and stored anew as v2.
	a.configure(t, "secrets: "+v2("new", p)+", "+old+", "+identity)
	a.start(t)
	everything := s.andMore(plain)
	everything.read(t, a)
	everything = everything.rewrite(t, a)
	everything.sealed(t, e, "k8s:enc:kms:v2:new:", key)
	migrated := p.calls(t)
	a.configure(t, "secrets: "+v2("new", p))
	p.start(t, key)
	a.start(t)
	everything.read(t, a)
	out := e.audited(t, []kek{key}, 0, []string{"key_id=" + key.id() + " values=" + count(everything) + " sealing-kek"})
	figures(t, "%d Secrets moved to v2: calls since the start %v; of v2 alone %v; audit:\n%s", len(everything), migrated, p.calls(t), out)
}
