package cluster

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// What doc/operate.md tells to type, literally. (Most of it: test/deploy.sh, under systemd.)

// guide returns the block of shell under `<!-- cluster: NAME -->`, or under `run:`, which test/deploy.sh runs, too.
func guide(t *testing.T, name string) string {
	t.Helper()
	text := must(os.ReadFile("../../../doc/operate.md"))(t)
	block := regexp.MustCompile("(?s)\n<!-- (?:cluster|run): " + name + " -->\n```sh\n(.*?)```\n").FindSubmatch(text)
	if block == nil {
		t.Fatalf("doc/operate.md has no block %s", name)
	}
	return string(block[1])
}

// documented wants an error to say this, and the guide to know it.
func documented(t *testing.T, err error, sentence string) {
	t.Helper()
	if !strings.Contains(fmt.Sprint(err), sentence) {
		t.Errorf("not %q: %v", sentence, err)
	}
	if !strings.Contains(string(must(os.ReadFile("../../../doc/operate.md"))(t)), sentence) {
		t.Errorf("doc/operate.md does not have %q", sentence)
	}
}

// needsNamespaces skips what must not touch this machine's own /etc/kubernetes and /etc/kmsplugin.
func needsNamespaces(t *testing.T) {
	t.Helper()
	if exec.Command("unshare", "--mount", "--pid", "--fork", "true").Run() != nil {
		t.Skip("needs root with namespaces, for an /etc of its own")
	}
}

// ownEtc gives a script in a mount namespace an /etc of which nothing is left, on $0.
const ownEtc = `
	mkdir "$0/etc"
	mount -t tmpfs tmpfs "$0/etc"
	mkdir "$0/etc/up" "$0/etc/work"
	mount -t overlay -o "lowerdir=/etc,upperdir=$0/etc/up,workdir=$0/etc/work" overlay /etc
`

// operator runs a block of the guide in a folder, with kubectl set up for this
// apiserver, and kmsplugin, etcdctl and the others in the path. setUp, if any, runs
// before it and, as root, in an /etc of its own; nothing that they start outlives them.
func (a *apiserver) operator(t *testing.T, dir, name, setUp string) (int, string) {
	t.Helper()
	bin := tempDir(t)
	for name, file := range map[string]string{"kmsplugin": binary, "kmsplugin-ring": must(filepath.Abs("../../../deploy/kmsplugin-ring"))(t)} {
		if err := os.Symlink(file, bin+"/"+name); err != nil {
			t.Fatal(err)
		}
	}
	kubeconfig := filepath.Join(bin, "config")
	if err := os.WriteFile(kubeconfig, []byte(`{apiVersion: v1, kind: Config, current-context: c,
  clusters: [{name: c, cluster: {server: "`+a.url+`", tls-server-name: kubernetes, certificate-authority: "`+a.rest.CAFile+`"}}],
  users: [{name: u, user: {token: `+token+`}}], contexts: [{name: c, context: {cluster: c, user: u}}]}`), 0o600); err != nil {
		t.Fatal(err)
	}
	env := []string{"KUBECONFIG=" + kubeconfig, "HOME=" + bin, "PATH=" + bin + ":" + programs + ":" + os.Getenv("PATH")}
	argv := []string{"sh", "-euc", `cd "$0"; ` + guide(t, name), dir}
	if setUp != "" {
		argv[2] = ownEtc + setUp + "\n" + argv[2]
		argv = append([]string{"unshare", "--mount", "--pid", "--fork", "--kill-child"}, argv...)
	}
	code, stdout, stderr := command(t, env, nil, argv...)
	return code, string(stdout) + stderr
}

// Every block that the guide says is run here is run by some test, under its name.
func TestGuideBlocks(t *testing.T) {
	var tests string
	for _, file := range must(filepath.Glob("*_test.go"))(t) {
		tests += string(must(os.ReadFile(file))(t))
	}
	text := must(os.ReadFile("../../../doc/operate.md"))(t)
	blocks := regexp.MustCompile("<!-- cluster: (.*) -->").FindAllSubmatch(text, -1)
	if len(blocks) == 0 {
		t.Error("no block")
	}
	for _, block := range blocks {
		if !regexp.MustCompile(`(guide|operator)\(t, (\w+, )?"` + string(block[1]) + `"`).MatchString(tests) {
			t.Errorf("nobody runs %s", block[1])
		}
	}
}

// Turning it on: all Secrets rewritten with kubectl. And a snapshot is asked whether it opens.
func TestGuide(t *testing.T) {
	t.Parallel()
	key := newKEK()
	e, p := startEtcd(t, tempDir(t)), newPlugin(t)
	p.start(t, key)
	a := newAPIServer(t, e)
	a.configure(t, "secrets: "+identity)
	a.start(t)
	s := write(t, "plain", 50, a)
	a.configure(t, "secrets: "+v2("vault", p)+", "+identity)
	a.start(t)
	dir := tempDir(t)
	if code, out := a.operator(t, dir, "rewrite", ""); code != 0 {
		t.Errorf("rewrite: exit %d\n%s", code, out)
	}
	s.sealed(t, e, "k8s:enc:kms:v2:vault:", key)
	for name, secret := range s {
		got, err := a.client.CoreV1().Secrets(namespace).Get(context.Background(), name, metav1.GetOptions{})
		if err != nil || !maps.EqualFunc(got.Data, secret.Data, bytes.Equal) || got.UID != secret.UID {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
	figures(t, "Kubernetes %s: %d Secrets sealed by kubectl get | kubectl replace", a.version(t), len(s))

	needsNamespaces(t)
	for _, c := range []struct {
		key  kek
		code int
		want string
	}{{key, 0, "v2 key_id=" + key.id() + " values=50 sealing-kek"}, {newKEK(), 1, "v2 key_id=" + key.id() + " values=50 missing-kek"}} {
		dir := tempDir(t)
		e.ctl(t, nil, "snapshot", "save", dir+"/snapshot.db")
		code, out := a.operator(t, dir, "snapshot", "umask 077; mkdir -p /etc/kmsplugin; echo "+string(c.key)+" >/etc/kmsplugin/kek")
		if code != c.code || !strings.Contains(out, c.want) {
			t.Errorf("snapshot: exit %d, want %d and %s\n%s", code, c.code, c.want, out)
		}
	}
}
