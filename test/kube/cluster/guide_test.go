package cluster

import (
	"os"
	"path/filepath"
	"regexp"
	"testing"
)

// What doc/operate.md tells to type, literally. (Most of it: test/deploy.sh, under systemd.)

// guide returns the block of shell under `<!-- cluster: NAME -->`.
func guide(t *testing.T, name string) string {
	t.Helper()
	text := must(os.ReadFile("../../../doc/operate.md"))(t)
	block := regexp.MustCompile("(?s)\n<!-- cluster: " + name + " -->\n```sh\n(.*?)```\n").FindSubmatch(text)
	if block == nil {
		t.Fatalf("doc/operate.md has no block %s", name)
	}
	return string(block[1])
}

// operator runs a block of the guide in a folder, with kubectl set up for this
// apiserver, and kmsplugin, etcdctl and the others in the path.
func (a *apiserver) operator(t *testing.T, dir, name string) (int, string) {
	t.Helper()
	bin := tempDir(t)
	if err := os.Symlink(binary, bin+"/kmsplugin"); err != nil {
		t.Fatal(err)
	}
	kubeconfig := filepath.Join(bin, "config")
	if err := os.WriteFile(kubeconfig, []byte(`{apiVersion: v1, kind: Config, current-context: c,
  clusters: [{name: c, cluster: {server: "`+a.url+`", tls-server-name: kubernetes, certificate-authority: "`+a.rest.CAFile+`"}}],
  users: [{name: u, user: {token: `+token+`}}], contexts: [{name: c, context: {cluster: c, user: u}}]}`), 0o600); err != nil {
		t.Fatal(err)
	}
	env := []string{"KUBECONFIG=" + kubeconfig, "HOME=" + bin, "PATH=" + bin + ":" + programs + ":" + os.Getenv("PATH")}
	code, stdout, stderr := command(t, env, nil, "sh", "-euc", `cd "$0" && eval "$1"`, dir, guide(t, name))
	return code, string(stdout) + stderr
}
