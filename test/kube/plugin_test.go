// Package kube tests kmsplugin with Kubernetes' own client code: what
// kube-apiserver runs between an EncryptionConfiguration and a KMS plugin's
// socket, and what it stores in etcd. This file starts and stops the plugin;
// kube_test.go is kube-apiserver's side, grpc_test.go a bare grpc-go client,
// rescue_test.go the verbs that read etcd without an API server.
package kube

import (
	"bufio"
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	utilfeature "k8s.io/apiserver/pkg/util/feature"
	"k8s.io/klog/v2"
)

var binary string // absolute path of the plugin under test

func TestMain(m *testing.M) {
	path := os.Getenv("KMSPLUGIN")
	if path == "" {
		path = "../../kmsplugin"
	}
	var err error
	if binary, err = filepath.Abs(path); err == nil {
		_, err = exec.LookPath(binary)
	}
	// Off by default since Kubernetes 1.29.
	err = errors.Join(err, utilfeature.DefaultMutableFeatureGate.SetFromMap(map[string]bool{"KMSv1": true}))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	// apiserver logs every refusal that the tests provoke, and returns it as well.
	klog.SetLogger(klog.Logger{}) // the zero one discards
	for _, name := range []string{"KMS_KEK", "KMS_KEK_FILE", "NOTIFY_SOCKET"} {
		os.Unsetenv(name)
	}
	os.Exit(m.Run())
}

// kek is a key as KMS_KEK takes it.
type kek string

func newKEK() kek {
	key := make([]byte, 32)
	rand.Read(key)
	return kek(base64.StdEncoding.EncodeToString(key))
}

// id computes the key_id from its definition, so that a plugin which changes it is caught.
func (k kek) id() string {
	key, err := base64.StdEncoding.DecodeString(string(k))
	if err != nil {
		panic(err)
	}
	mac := hmac.New(sha256.New, key)
	mac.Write([]byte("kmsplugin key_id v1"))
	return hex.EncodeToString(mac.Sum(nil)[:16])
}

func environ(ring []kek) []string {
	var keys []string
	for _, k := range ring {
		keys = append(keys, string(k))
	}
	env := os.Environ()
	if len(keys) > 0 {
		env = append(env, "KMS_KEK="+strings.Join(keys, ","))
	}
	return env
}

// run executes a verb that ends by itself: its exit status, stdout and stderr.
func run(t *testing.T, ring []kek, stdin []byte, args ...string) (int, []byte, string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, binary, args...)
	var stdout, stderr bytes.Buffer
	cmd.Env, cmd.Stdin, cmd.Stdout, cmd.Stderr = environ(ring), bytes.NewReader(stdin), &stdout, &stderr
	err := cmd.Run()
	if exit := new(exec.ExitError); err != nil && !(errors.As(err, &exit) && exit.Exited()) {
		t.Fatalf("%v: %v\n%s", args, err, stderr.String())
	}
	return cmd.ProcessState.ExitCode(), stdout.Bytes(), stderr.String()
}

// plugin is a running `kmsplugin serve`.
type plugin struct {
	cmd    *exec.Cmd
	log    bytes.Buffer // its stderr; to be read after exited
	exited chan error
	ended  bool
}

// serve starts the plugin and returns once it says that it is ready.
func serve(t *testing.T, endpoint string, ring ...kek) *plugin {
	t.Helper()
	p := &plugin{cmd: exec.Command(binary, "serve", "--listen", endpoint), exited: make(chan error, 1)}
	p.cmd.Env = environ(ring)
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // should this process be killed
	stderr, err := p.cmd.StderrPipe()
	if err == nil {
		err = p.cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	ready := make(chan struct{}, 1)
	go func() {
		for lines := bufio.NewScanner(stderr); lines.Scan(); {
			fmt.Fprintln(&p.log, lines.Text())
			if strings.Contains(lines.Text(), "msg=ready") {
				select {
				case ready <- struct{}{}:
				default:
				}
			}
		}
		p.exited <- p.cmd.Wait()
	}()
	t.Cleanup(func() { p.stop(t) })
	select {
	case <-ready:
	case err := <-p.exited:
		p.ended = true
		t.Fatalf("ended before it was ready: %v\n%s", err, p.log.String())
	case <-time.After(10 * time.Second):
		t.Fatal("not ready after 10 s")
	}
	return p
}

// stop ends the plugin as systemd and the kubelet do, and wants a clean exit.
func (p *plugin) stop(t *testing.T) {
	t.Helper()
	if p.ended {
		return
	}
	p.ended = true
	p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case err := <-p.exited:
		if err != nil {
			t.Errorf("exit after SIGTERM: %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Error("still running 10 s after SIGTERM")
		p.cmd.Process.Kill()
		<-p.exited
	}
	if t.Failed() {
		t.Logf("the plugin's log:\n%s", p.log.String())
	}
}

// fileEndpoint is a socket in a directory of its own. t.TempDir would put the
// test's name into the path, of which a socket has only 107 bytes.
func fileEndpoint(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "kms") // mode 0700
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return "unix://" + dir + "/kms.sock"
}

var abstractNames atomic.Int32

func abstractEndpoint(*testing.T) string {
	return fmt.Sprintf("unix:///@kmsplugin-test-%d-%d", os.Getpid(), abstractNames.Add(1))
}
