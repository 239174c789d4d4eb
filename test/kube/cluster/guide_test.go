package cluster

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// What the guide tells to type, literally. (Most of it: test/deploy.sh, under systemd, which also asks that each block is
// run there or here.)

// guide returns the block of shell with this name.
func guide(t *testing.T, name string) string {
	t.Helper()
	var text []byte
	for _, file := range []string{"operate", "k3s", "variants"} {
		text = append(text, must(os.ReadFile("../../../doc/"+file+".md"))(t)...)
	}
	block := regexp.MustCompile("(?s)\n```sh " + name + "\n(.*?)```\n").FindSubmatch(text)
	if block == nil {
		t.Fatalf("the guide has no block %s", name)
	}
	// What is installed there lies here.
	return strings.ReplaceAll(string(block[1]), "/usr/share/kmsplugin", must(filepath.Abs("../../../deploy"))(t))
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
// before it and, behind inEtc, as root in an /etc of its own; nothing that they start outlives them.
// What is replaced in the block comes in pairs.
func (a *apiserver) operator(t *testing.T, dir, name, setUp string, replace ...string) (int, string) {
	t.Helper()
	script := setUp + "\ncd \"$0\"\n" + strings.NewReplacer(replace...).Replace(guide(t, name))
	argv := []string{"sh", "-euc", script, dir}
	if strings.HasPrefix(setUp, inEtc) {
		argv[2] = ownEtc + argv[2]
		argv = append([]string{"unshare", "--mount", "--pid", "--fork", "--kill-child"}, argv...)
	}
	code, stdout, stderr := command(t, a.environment(t), nil, argv...)
	return code, string(stdout) + stderr
}

// environment has kubectl set up for this apiserver, and the programs in the path.
func (a *apiserver) environment(t *testing.T) []string {
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
	return []string{"KUBECONFIG=" + kubeconfig, "HOME=" + bin, "ETCDCTL_ENDPOINTS=" + a.etcd, "PATH=" + bin + ":" + programs + ":" + os.Getenv("PATH")}
}

// kubectl runs it, and returns what it says.
func (a *apiserver) kubectl(t *testing.T, want int, stdin string, args ...string) string {
	t.Helper()
	code, stdout, stderr := command(t, a.environment(t), []byte(stdin), append([]string{filepath.Join(programs, "kubectl")}, args...)...)
	if code != want {
		t.Fatalf("kubectl %v: exit %d\n%s%s", args, code, stdout, stderr)
	}
	return string(stdout)
}

// Turning it on: all Secrets rewritten with kubectl, while others write and delete some of them. And a snapshot is asked
// whether it opens.
func TestGuide(t *testing.T) {
	t.Parallel()
	key := newKEK()
	e, p := startEtcd(t, tempDir(t)), newPlugin(t)
	p.start(t, key)
	a := newAPIServer(t, e)
	a.configure(t, "secrets: "+identity)
	a.start(t)
	if out, err := a.get("/readyz/kms-providers"); err == nil {
		t.Errorf("an API server without KMS has what the page waits for: %s", out)
	}
	s := write(t, "plain", 50, a)
	for _, providers := range []string{identity + ", " + v2("vault", p), v2("vault", p) + ", " + identity} {
		a.configure(t, "secrets: "+providers)
		a.start(t)
		if out, err := a.get("/readyz/kms-providers"); err != nil || out != "ok" {
			t.Errorf("what the page waits for: %s, %v", out, err)
		}
	}
	dir := tempDir(t)
	// As in a busy cluster: between reading and writing, one Secret is changed and one is deleted.
	busy := `kubectl() {
		[ "$1" = replace ] || { command kubectl "$@"; return; }
		cat >"$0/list.json"
		command kubectl -n ` + namespace + ` label secret plain-1 busy=yes
		command kubectl -n ` + namespace + ` delete secret plain-2
		command kubectl "$@" <"$0/list.json"
	}
	`
	code, out := a.operator(t, dir, "encrypt", busy)
	if code != 1 || strings.Count(out, "the object has been modified") != 1 || strings.Count(out, "not found") != 1 {
		t.Errorf("encrypt, in a busy cluster: exit %d\n%s", code, out)
	}
	for _, sentence := range []string{"the object has been modified", "not found"} {
		documented(t, errors.New(out), sentence)
	}
	delete(s, "plain-2")
	s = s.fresh(t, a)
	s.sealed(t, e, "k8s:enc:kms:v2:vault:", key)
	if code, out := a.operator(t, dir, "encrypt", ""); code != 0 {
		t.Errorf("encrypt: exit %d\n%s", code, out)
	}
	s.sealed(t, e, "k8s:enc:kms:v2:vault:", key)
	figures(t, "Kubernetes %s: %d Secrets sealed by kubectl get | kubectl replace", a.version(t), len(s))

	needsNamespaces(t)
	for _, c := range []struct {
		key  kek
		code int
		want string
	}{{key, 0, "values=49 sealing-kek"}, {newKEK(), 1, "values=49 missing-kek"}} {
		dir := tempDir(t)
		e.ctl(t, nil, "snapshot", "save", dir+"/snapshot.db")
		code, out := a.operator(t, dir, "snapshot", inEtc+c.key.file())
		if code != c.code || !strings.Contains(out, c.want) || !strings.Contains(out, key.id()) {
			t.Errorf("snapshot: exit %d, want %d and %s\n%s", code, c.code, c.want, out)
		}
	}
}

// inEtc goes before what is set up in an /etc of its own; file makes a ring there.
const inEtc = "# etc\n"

func (k kek) file() string {
	return "umask 077; mkdir -p /etc/kmsplugin; echo " + string(k) + " >/etc/kmsplugin/kek"
}
