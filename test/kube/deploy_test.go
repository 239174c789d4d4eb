package kube

// The encryption configurations in deploy/, given to what reads them in earnest, and the
// sentences that doc/operate.md promises in kube-apiserver's log. (The pods: cluster/deploy_test.go.)

import (
	"bufio"
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/server/options/encryptionconfig"
)

const (
	deploy         = "../../deploy/"
	deployEndpoint = "unix:///run/kmsplugin/kms.sock"
)

// read returns a file of this repository.
func read(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// loadDeployed is newAPIServer for a file of deploy/, in which nothing but the endpoint is changed.
func loadDeployed(t *testing.T, name, endpoint string) *apiserver {
	t.Helper()
	config := read(t, deploy+name)
	if !strings.Contains(config, deployEndpoint) {
		t.Fatalf("%s: no endpoint %s", name, deployEndpoint)
	}
	file := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(file, []byte(strings.ReplaceAll(config, deployEndpoint, endpoint)), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	loaded, err := encryptionconfig.LoadEncryptionConfig(ctx, file, false, "kube-test")
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return &apiserver{loaded.Transformers[schema.GroupResource{Resource: "secrets"}], loaded.HealthChecks}
}

// TestDeployEncryption: each configuration writes under the right provider, and
// each reads what the one before it in its migration has written.
func TestDeployEncryption(t *testing.T) {
	endpoint := fileEndpoint(t)
	serve(t, endpoint, newKEK())
	const v1Prefix, v2Prefix = "k8s:enc:kms:v1:kmsplugin-v1:", "k8s:enc:kms:v2:kmsplugin:"
	for _, c := range []struct {
		file   string
		writes string   // the prefix of what it writes
		reads  []string // whose values it reads, though they are stale
	}{
		{"encryption-v1.yaml", v1Prefix, []string{"k8s\x00"}},
		{"encryption-prepare.yaml", "k8s\x00", []string{v2Prefix}},
		{"encryption-migration.yaml", v2Prefix, []string{"k8s\x00", v1Prefix}},
		{"encryption-v2.yaml", v2Prefix, []string{"k8s\x00"}},
	} {
		t.Run(c.file, func(t *testing.T) {
			server := loadDeployed(t, c.file, endpoint)
			if err := server.check(); err != nil {
				t.Error(err)
			}
			stored := server.write(t)
			if !strings.HasPrefix(string(stored), c.writes) {
				t.Errorf("writes %.40q, want %q", stored, c.writes)
			}
			server.read(t, stored, false)
			for _, from := range c.reads {
				writer := map[string]string{"k8s\x00": "encryption-prepare.yaml", v1Prefix: "encryption-v1.yaml", v2Prefix: "encryption-v2.yaml"}[from]
				server.read(t, loadDeployed(t, writer, endpoint).write(t), true)
			}
		})
	}
}

// TestDocumentedErrors: the sentences in doc/operate.md's table come about as it says.
func TestDocumentedErrors(t *testing.T) {
	table := read(t, "../../doc/operate.md")
	// want asserts on parts of an error, each of which the table must quote.
	want := func(t *testing.T, err error, parts ...string) {
		t.Helper()
		if err == nil {
			t.Fatal("no error")
		}
		for _, part := range parts {
			if !strings.Contains(err.Error(), part) {
				t.Errorf("%q is not in: %v", part, err)
			}
			if !strings.Contains(table, part) {
				t.Errorf("doc/operate.md does not have %q", part)
			}
		}
		t.Log(err)
	}
	t.Run("no socket", func(t *testing.T) {
		want(t, newAPIServer(t, v2("name", fileEndpoint(t)), identity).check(),
			"code = DeadlineExceeded", "connect: no such file or directory")
	})
	t.Run("no socket, v1", func(t *testing.T) {
		want(t, newAPIServer(t, v1("name", fileEndpoint(t)), identity).check(),
			"section of the healthz check for KMS Provider", "connect: no such file or directory")
	})
	t.Run("nobody listens", func(t *testing.T) {
		endpoint := fileEndpoint(t)
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: strings.TrimPrefix(endpoint, "unix://"), Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		l.SetUnlinkOnClose(false)
		l.Close()
		want(t, newAPIServer(t, v2("name", endpoint), identity).check(), "code = DeadlineExceeded", "connect: connection refused")
	})
	t.Run("systemd listens, and the plugin is gone", func(t *testing.T) {
		endpoint := fileEndpoint(t)
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: strings.TrimPrefix(endpoint, "unix://"), Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		want(t, newAPIServer(t, v2("name", endpoint), identity).check(), "code = DeadlineExceeded", "waiting for connections to become ready")
	})
	t.Run("refused by uid", func(t *testing.T) {
		endpoint := fileEndpoint(t)
		startRefusing(t, endpoint)
		err := newAPIServer(t, v2("name", endpoint), identity).check()
		word := "broken pipe" // the plugin's close races with the client's first write and read: three outcomes
		for _, other := range []string{"failed to write client preface", "error reading server preface"} {
			if err != nil && strings.Contains(err.Error(), other) {
				word = other
			}
		}
		want(t, err, "code = DeadlineExceeded", word)
	})
	t.Run("KEK is missing", func(t *testing.T) {
		first, second := fileEndpoint(t), fileEndpoint(t)
		serve(t, first, newKEK())
		serve(t, second, newKEK())
		stored := newAPIServer(t, v2("name", first)).write(t)
		other := newAPIServer(t, v2("name", second))
		want(t, other.refuse(t, stored, etcdKey), "failed to decrypt DEK", "code = NotFound")
		want(t, newAPIServer(t, v2("other", second)).refuse(t, stored, etcdKey), "no matching prefix found")
	})
	t.Run("a value that was altered", func(t *testing.T) {
		endpoint := fileEndpoint(t)
		serve(t, endpoint, newKEK())
		stored := newAPIServer(t, v2("name", endpoint)).write(t)
		object := encryptedObject(t, stored, "k8s:enc:kms:v2:name:")
		source := slices.Clone(object.EncryptedDEKSource)
		at := strings.Index(string(stored), string(source))
		stored[at+len(source)-1] ^= 1
		want(t, newAPIServer(t, v2("name", endpoint)).refuse(t, stored, etcdKey), "code = InvalidArgument")
	})
}

// startRefusing starts a plugin that lets in nobody of this test.
func startRefusing(t *testing.T, endpoint string) {
	t.Helper()
	cmd := exec.Command(binary, "serve", "--listen", endpoint, "--allow-uid", "4294967294")
	cmd.Env = environ([]kek{newKEK()})
	stderr, err := cmd.StderrPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Signal(syscall.SIGTERM); cmd.Wait() })
	if line, err := bufio.NewReader(stderr).ReadString('\n'); !strings.Contains(line, "msg=ready") {
		t.Fatalf("not ready: %v %s", err, line)
	}
}
