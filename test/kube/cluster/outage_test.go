package cluster

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Kills the plugin under clients that write and read through v1 (which asks it
// every time) and v2 (which has the data key), and starts it again. On a socket
// file that a crash left behind, kube-apiserver is refused and backs off; on a
// socket that is passed on, as systemd does, it only waits.
func TestCrash(t *testing.T) {
	t.Run("stale", func(t *testing.T) { crash(t, false) })
	t.Run("activated", func(t *testing.T) { crash(t, true) })
}

func crash(t *testing.T, activated bool) {
	kills, outage := 3, 10*time.Second
	if !testing.Short() {
		kills, outage = 10, 40*time.Second
	}
	key := newKEK()
	e, p := startEtcd(t, tempDir(t)), newPlugin(t)
	if activated {
		p.listen(t)
	}
	p.start(t, key)
	a := newAPIServer(t, e, "--feature-gates=KMSv1=true")
	a.configure(t, "secrets: "+v1("first", p, -1), "configmaps: "+v2("second", p))
	a.start(t)
	s := write(t, "crash", 50, a)
	names := s.names()
	run := func() []*load {
		return []*load{updates(t, "v1 writes", a, "secrets"), readers(t, "v1 reads", a, names), updates(t, "v2 writes", a, "configmaps")}
	}
	end := func(loads []*load) {
		for _, l := range loads {
			l.stop()
		}
		for _, resource := range []string{"secrets", "configmaps"} { // a new start of updates creates anew
			e.ctl(t, nil, "del", "/registry/"+resource+"/default/load-"+resource)
		}
		eventually(t, 10*time.Second, "deletion", func() error {
			_, err := a.client.CoreV1().Secrets(namespace).Get(context.Background(), "load-secrets", metav1.GetOptions{})
			if err == nil {
				return fmt.Errorf("still there")
			}
			return nil
		})
	}

	// Crashes with a restart after RestartSec= of 100 ms.
	loads := run()
	for range kills {
		time.Sleep(4 * time.Second)
		p.kill()
		time.Sleep(100 * time.Millisecond)
		p.start(t, key)
	}
	time.Sleep(4 * time.Second)
	end(loads)
	for _, l := range loads[:2] { // each crash took far less than the 3 s that a call may take
		l.survived(t, kills)
	}
	loads[2].flawless(t)
	refused := strings.Count(tail(a.log, 1<<30), "connection refused")
	figures(t, "%d crashes: %v; refused connects in the apiserver's log: %d", kills, loads, refused)
	if activated != (refused == 0) {
		t.Errorf("refused connects: %d", refused)
	}

	// A long outage: v1 fails while it lasts. How long does it go on after that?
	loads = run()
	time.Sleep(2 * time.Second)
	p.kill()
	time.Sleep(outage)
	p.start(t, key)
	back := time.Now()
	healed := eventually(t, 130*time.Second, "v1 after the outage", func() error {
		l := loads[0]
		l.mutex.Lock()
		defer l.mutex.Unlock()
		if !l.lastTime.After(back) {
			return fmt.Errorf("%v", l.first())
		}
		return nil
	})
	time.Sleep(2 * time.Second)
	end(loads)
	refused = strings.Count(tail(a.log, 1<<30), "connection refused")
	figures(t, "an outage of %v: v1 writes again %v after it; %v; refused connects %d", outage, healed, loads, refused)
	if activated && refused > 0 { // then it backs off: v1 would go on to fail for up to two minutes
		t.Errorf("refused connects: %d", refused)
	}
	loads[2].flawless(t) // v2 has its data key: nobody notices
	if loads[0].bad == 0 {
		t.Error("v1 wrote without a plugin")
	}
	s.read(t, a)
	s.sealed(t, e, "k8s:enc:kms:v1:first:", key)
}

// secret writes one Secret.
func (a *apiserver) secret(name string) error {
	_, err := a.client.CoreV1().Secrets(namespace).Create(context.Background(), newSecret(name), metav1.CreateOptions{})
	return err
}

func (a *apiserver) reads(name string) error {
	secret, err := a.client.CoreV1().Secrets(namespace).Get(context.Background(), name, metav1.GetOptions{})
	if err == nil && !strings.HasPrefix(string(secret.Data["password"]), marker) {
		err = fmt.Errorf("read %v", secret)
	}
	return err
}

// failing are the checks that /readyz finds failing.
func failing(err error) (names []string) {
	for line := range strings.Lines(fmt.Sprint(err)) {
		if name, ok := strings.CutPrefix(line, "[-]"); ok {
			names = append(names, strings.Fields(name)[0])
		}
	}
	return names
}

// fails waits until /readyz fails for these checks and no other: at first, much else is not up yet either.
func (a *apiserver) fails(t *testing.T, want ...string) (got []string) {
	t.Helper()
	eventually(t, 60*time.Second, fmt.Sprintf("/readyz without %v", want), func() error {
		err := a.ready()
		if got = failing(err); !slices.Equal(got, want) {
			return err
		}
		return nil
	})
	return got
}

// The mistakes of a bad morning: kube-apiserver starts without the
// plugin (which refuses to start without its KEK), or with one that has the wrong KEK. Nothing is
// corrupted, and each heals by itself, without a restart of kube-apiserver.
func TestWrongKEK(t *testing.T) {
	t.Parallel() // it mostly waits
	key, wrong := newKEK(), newKEK()
	e, p := startEtcd(t, tempDir(t)), newPlugin(t)
	a := newAPIServer(t, e)
	a.configure(t, "secrets: "+v2("vault", p))

	p.start(t, key)
	a.start(t)
	s := write(t, "good", 20, a)
	s.sealed(t, e, "k8s:enc:kms:v2:vault:", key)
	raw := e.raw(t, registry)
	unchanged := func() {
		t.Helper()
		for k, kv := range raw {
			if now := e.raw(t, k)[k]; now == nil || now.ModRevision != kv.ModRevision {
				t.Errorf("%s has changed", k)
			}
		}
	}

	// No plugin when kube-apiserver starts.
	a.stop(t)
	p.stop(t)
	for _, env := range [][]string{nil, {"KMS_KEK_FILE=" + p.dir + "/missing"}, {"KMS_KEK=c2hvcnQ="}} {
		code, stdout, stderr := command(t, env, nil, binary, "serve", "--listen", p.endpoint)
		if code != 1 || len(stdout) > 0 || strings.Count(stderr, "\n") != 1 {
			t.Errorf("a plugin with %v: exit %d, %q", env, code, stderr)
		}
	}
	a.launch(t)
	down := a.fails(t, "kms-providers", "informer-sync", "poststarthook/storage-readiness")
	refusedRead, refusedWrite := a.reads("good-1"), a.secret("never")
	if raw := e.raw(t, registry+"never"); refusedRead == nil || refusedWrite == nil || len(raw) > 0 {
		t.Errorf("without a plugin, a read: %v, a write: %v, in etcd: %v", refusedRead, refusedWrite, raw)
	}
	documented(t, refusedRead, "got unexpected nil transformer")
	documented(t, refusedWrite, "got unexpected nil transformer")
	_, alive := a.get("/livez")
	if !slices.Equal(failing(alive), []string{"poststarthook/storage-readiness"}) {
		t.Errorf("/livez: %v", alive)
	}
	unchanged()
	p.start(t, key)
	healedDown := eventually(t, 40*time.Second, "a start without plugin", a.ready)
	s.read(t, a)
	figures(t, "Kubernetes %s, plugin down at start: /readyz fails %v, /livez %v, a read says %.300q, a write %.300q; ready %v after the plugin",
		a.version(t), down, failing(alive), fmt.Sprint(refusedRead), fmt.Sprint(refusedWrite), healedDown)

	// The wrong KEK, and kube-apiserver starts.
	a.stop(t)
	p.start(t, wrong)
	a.launch(t)
	odd := a.fails(t, "informer-sync", "poststarthook/storage-readiness")
	err := a.reads("good-1")
	if err == nil || !strings.Contains(err.Error(), key.id()) {
		t.Errorf("read with the wrong KEK: %v", err)
	}
	wrongWrite := a.secret("under-wrong") // goes through: the plugin cannot know
	if wrongWrite != nil {
		t.Errorf("doc/operate.md says that this write goes through: %v", wrongWrite)
	}
	unchanged()
	code, out := e.audit(t, []kek{wrong})
	if code != 1 || !strings.Contains(out, key.id()) {
		t.Errorf("audit with the wrong KEK: exit %d\n%s", code, out)
	}
	p.start(t, key, wrong) // the right one again; the wrong one has sealed something by now
	healedWrong := eventually(t, 100*time.Second, "after the right KEK", a.ready)
	a.writesUnder(t, e, key)
	s.read(t, a)
	// Hence the wrong KEK has to stay until what it has sealed is rewritten.
	e.audited(t, []kek{key}, 1, []string{"key_id=" + wrong.id() + " values=1 missing-kek"})
	odds := secrets{"under-wrong": must(a.client.CoreV1().Secrets(namespace).Get(context.Background(), "under-wrong", metav1.GetOptions{}))(t)}
	odds.rewrite(t, a).sealed(t, e, "k8s:enc:kms:v2:vault:", key)
	e.audited(t, []kek{key}, 0, []string{"key_id=" + key.id() + " values=21 sealing-kek"})
	figures(t, "wrong KEK at start: /readyz fails %v, a read says %.300q, a write: %v; ready %v after the right KEK",
		odd, fmt.Sprint(err), wrongWrite, healedWrong)

	// The wrong KEK under a kube-apiserver that stays up and has the data keys in its cache.
	p.start(t, newKEK())
	s.read(t, a)
	p.start(t, key, wrong)

	if testing.Short() {
		return
	}
	// An outage longer than the life of v2's data key: writes fail, reads do not.
	p.stop(t)
	start := time.Now()
	a.fails(t, "kms-providers")
	var stopped error
	eventually(t, 5*time.Minute, "v2 without plugin", func() error {
		a.ready()
		time.Sleep(time.Second)
		if err := a.reads("good-1"); err != nil {
			t.Fatalf("read %v into the outage: %v", time.Since(start), err)
		}
		if stopped = a.secret(fmt.Sprintf("during-%d", time.Now().UnixNano())); stopped == nil {
			return fmt.Errorf("still writes")
		}
		return nil
	})
	lasted := time.Since(start).Round(time.Second)
	documented(t, stopped, "encryptedDEKSource with keyID hash")
	p.start(t, key, wrong)
	back := eventually(t, 150*time.Second, "writes after the outage", func() error { return a.secret("after") })
	figures(t, "plugin gone under a running apiserver: writes go on for %v and then say %.200q, reads go on; writes again %v after the plugin",
		lasted, fmt.Sprint(stopped), back)
}
