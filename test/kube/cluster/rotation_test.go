package cluster

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// writesUnder waits until what this apiserver writes is sealed under a KEK.
func (a *apiserver) writesUnder(t *testing.T, e *etcd, key kek) time.Duration {
	t.Helper()
	return eventually(t, 100*time.Second, "a write under "+key.id(), func() error {
		a.ready() // asking is what hurries a new key_id: 20 s instead of 60 s
		secrets := a.client.CoreV1().Secrets(namespace)
		if _, err := secrets.Create(context.Background(), newSecret("canary"), metav1.CreateOptions{}); err != nil {
			return err
		}
		kv := e.raw(t, registry+"canary")[registry+"canary"]
		if err := secrets.Delete(context.Background(), "canary", metav1.DeleteOptions{}); err != nil {
			return err
		}
		if id, err := sealedUnder(kv.Value); err != nil || id != key.id() {
			return fmt.Errorf("under %s, %v", id, err)
		}
		return nil
	})
}

// The rotation of README on two control planes that serve all the while. Then
// the old KEK is gone, and an old backup comes back all the same.
func TestRotation(t *testing.T) {
	old, next := newKEK(), newKEK()
	e := startEtcd(t, tempDir(t))
	plugins := []*plugin{newPlugin(t), newPlugin(t)}
	var servers []*apiserver
	for _, p := range plugins {
		p.start(t, old)
		a := newAPIServer(t, e)
		a.configure(t, "secrets: "+v2("vault", p))
		a.start(t)
		servers = append(servers, a)
	}
	everywhere := func(keks ...kek) {
		t.Helper()
		for _, p := range plugins {
			p.start(t, keks...)
			time.Sleep(time.Second) // one control plane after the other
		}
	}

	s := write(t, "rotation", many(), servers...)
	s.sealed(t, e, "k8s:enc:kms:v2:vault:", old)
	backup := filepath.Join(e.dir, "backup.db")
	e.ctl(t, nil, "snapshot", "save", backup)
	before := s
	total := count(s)
	underOld, underNext := "key_id="+old.id()+" values="+total, "key_id="+next.id()+" values="+total

	loads := []*load{readers(t, "reads A", servers[0], s.names()), readers(t, "reads B", servers[1], s.names()),
		updates(t, "writes A", servers[0], "secrets")}
	everywhere(old, next)
	e.audited(t, []kek{old, next}, 0, []string{"key_id=" + old.id(), "sealing-kek"})
	everywhere(next, old)
	var seen []time.Duration
	for _, a := range servers {
		seen = append(seen, a.writesUnder(t, e, next))
	}
	loads[2].stop() // its Secret is left as the last write made it: under the new KEK

	// May the old KEK go? Not before all is rewritten.
	e.audited(t, []kek{next, old}, 1, []string{underOld + " other-kek"})
	e.audited(t, []kek{next}, 1, []string{underOld + " missing-kek"})
	start := time.Now()
	s = s.rewrite(t, servers...)
	migration := time.Since(start).Round(time.Millisecond)
	underNext = "key_id=" + next.id() + " values=" + fmt.Sprint(len(s)+1) // and that of the writes
	e.audited(t, []kek{next, old}, 0, []string{underNext + " sealing-kek"})
	s.sealed(t, e, "k8s:enc:kms:v2:vault:", next)

	everywhere(next)
	calls := []map[string]int{plugins[0].calls(t), plugins[1].calls(t)}
	for _, l := range loads {
		l.flawless(t)
	}
	for key, kv := range e.raw(t, registry) {
		if id, err := sealedUnder(kv.Value); err != nil || id != next.id() {
			t.Errorf("%s is still under %s, %v", key, id, err)
		}
	}
	for i, a := range servers { // no cached DEK may hide that the old KEK is needed
		a.start(t)
		s.read(t, a)
		calls[i] = plugins[i].calls(t)
	}
	e.audited(t, []kek{next}, 0, []string{underNext + " sealing-kek", "plaintext values="})
	figures(t, "Kubernetes %s twice: %d Secrets rotated; %v; new key_id in use after %v; rewritten in %v; calls after the last restart %v",
		servers[0].version(t), len(s), loads, seen, migration, calls)

	// Disaster: back to the backup, which predates the migration.
	for i, a := range servers {
		a.stop(t)
		plugins[i].stop(t)
	}
	dir := tempDir(t)
	if code, _, stderr := command(t, nil, nil, filepath.Join(programs, "etcdutl"), "snapshot", "restore", backup,
		"--data-dir="+dir+"/data", "--name=default", "--bump-revision=1000000", "--mark-compacted"); code != 0 {
		t.Fatalf("etcdutl: %s", stderr)
	}
	e = startEtcd(t, dir)
	e.audited(t, []kek{next}, 1, []string{underOld + " missing-kek"})    // it does not open
	e.audited(t, []kek{old}, 0, []string{underOld + " sealing-kek"})     // it opens
	e.audited(t, []kek{next, old}, 1, []string{underOld + " other-kek"}) // it opens, and is due for a migration
	plugins[0].start(t, next, old)
	a := newAPIServer(t, e)
	a.configure(t, "secrets: "+v2("vault", plugins[0]))
	a.start(t)
	restored := before.names()
	all(t, restored, func(name string) error {
		secret, err := a.client.CoreV1().Secrets(namespace).Get(context.Background(), name, metav1.GetOptions{})
		if err == nil && !slices.Equal(secret.Data["password"], before[name].Data["password"]) {
			err = fmt.Errorf("read %v", secret)
		}
		return err
	})
	figures(t, "%d Secrets read from a backup of before the rotation, with new,old", len(restored))
}
