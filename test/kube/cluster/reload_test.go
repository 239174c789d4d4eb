package cluster

import (
	"fmt"
	"regexp"
	"testing"
	"time"
)

// writesWith waits until raw values start with a prefix.
func (a *apiserver) writesWith(t *testing.T, e *etcd, prefix string, within time.Duration) time.Duration {
	t.Helper()
	return eventually(t, within, "a write as "+prefix, func() error {
		name := fmt.Sprintf("probe-%d", time.Now().UnixNano())
		if err := a.secret(name); err != nil {
			return err
		}
		value := e.raw(t, registry+name)[registry+name].Value
		if len(value) < len(prefix) || string(value[:len(prefix)]) != prefix {
			time.Sleep(time.Second)
			return fmt.Errorf("%.40q", value)
		}
		return nil
	})
}

// kube-apiserver takes up a changed EncryptionConfiguration by itself: from
// plaintext to our socket, not to a socket where nobody listens, and to a second plugin.
func TestReload(t *testing.T) {
	t.Parallel() // it mostly waits
	first, second := newKEK(), newKEK()
	e, p, q := startEtcd(t, tempDir(t)), newPlugin(t), newPlugin(t)
	p.start(t, first)
	a := newAPIServer(t, e, "--encryption-provider-config-automatic-reload=true")
	a.configure(t, "secrets: "+identity)
	a.start(t)
	s := write(t, "plain", 20, a)
	loads := []*load{readers(t, "reads", a, s.names()), updates(t, "writes", a, "secrets")}

	a.configure(t, "secrets: "+v2("vault", p)+", "+identity)
	took := []time.Duration{a.writesWith(t, e, "k8s:enc:kms:v2:vault:", 100*time.Second)}
	s.read(t, a)

	if !testing.Short() {
		a.configure(t, "secrets: "+v2("other", q)+", "+v2("vault", p)+", "+identity)
		time.Sleep(90 * time.Second) // it polls each minute, and tries for 10 s
		if text, err := a.get("/metrics"); err != nil || !reloadFailed.MatchString(text) {
			t.Errorf("no failed reload in /metrics: %v", err)
		}
		a.writesWith(t, e, "k8s:enc:kms:v2:vault:", time.Second)
		if err := a.ready(); err != nil {
			t.Error(err)
		}
		q.start(t, second)
		took = append(took, a.writesWith(t, e, "k8s:enc:kms:v2:other:", 200*time.Second))
		s.read(t, a)
	}
	for _, l := range loads {
		l.flawless(t)
	}
	rewritten := s.rewrite(t, a)
	if testing.Short() {
		rewritten.sealed(t, e, "k8s:enc:kms:v2:vault:", first)
	} else {
		rewritten.sealed(t, e, "k8s:enc:kms:v2:other:", second)
	}
	rewritten.read(t, a)
	figures(t, "Kubernetes %s: a new configuration in use after %v, %v", a.version(t), took, loads)
}

// reloadFailed finds a reload that kube-apiserver refused.
var reloadFailed = regexp.MustCompile(`(?m)^apiserver_encryption_config_controller_automatic_reloads_total\{.*status="failure".*\} [1-9]`)
