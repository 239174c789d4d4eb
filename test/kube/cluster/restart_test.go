package cluster

import (
	"testing"
	"time"
)

// Many Secrets under v2, then restarts of both sides in both orders.
func TestRestart(t *testing.T) {
	e, p, a := startEtcd(t, tempDir(t)), newPlugin(t), (*apiserver)(nil)
	key := newKEK()
	p.start(t, key)
	a = newAPIServer(t, e)
	a.configure(t, "secrets: "+v2("vault", p))
	ready := a.start(t)
	start := time.Now()
	s := write(t, "restart", many(), a)
	writing := time.Since(start)
	s.read(t, a)
	s.sealed(t, e, "k8s:enc:kms:v2:vault:", key)
	first := p.calls(t)

	a.stop(t) // the apiserver first
	p.start(t, key)
	a.start(t)
	s.read(t, a)
	second := p.calls(t)

	p.stop(t) // the plugin first
	a.stop(t)
	a.launch(t) // before the plugin is there
	p.start(t, key)
	healed := eventually(t, 40*time.Second, "/readyz", a.ready)
	s.read(t, a)
	third := p.calls(t)

	p.start(t, key) // the plugin alone
	s.read(t, a)
	s = s.andMore(write(t, "later", 10, a))
	s.sealed(t, e, "k8s:enc:kms:v2:vault:", key)

	figures(t, "Kubernetes %s, etcd %s: %d Secrets written in %v, ready after %v; calls: writing %v; apiserver restarted %v; both restarted %v, ready %v after the plugin",
		a.version(t), e.version(t), len(s), writing.Round(time.Millisecond), ready, first, second, third, healed)
	for _, calls := range []map[string]int{first, second, third} {
		for call, n := range calls {
			if call != "v2 Status OK" && call != "v2 Encrypt OK" && call != "v2 Decrypt OK" || n > 20 {
				t.Errorf("%s: %d calls", call, n)
			}
		}
	}

	a.stop(t)
	p.stop(t)
	start = time.Now()
	s.unsealed(t, e, key)
	e.audited(t, []kek{key}, 0, []string{"key_id=" + key.id() + " values=" + count(s) + " sealing-kek"})
	figures(t, "%d Secrets unsealed from etcdctl alone, twice each, in %v", len(s), time.Since(start).Round(time.Millisecond))
}
