// Package cluster runs kmsplugin where it is meant to run: under a real
// kube-apiserver with a real etcd. Nothing is simulated, everything is on
// loopback and in temporary directories, and each test has processes of its own.
//
// This file starts and ends processes: etcd, kube-apiserver, the plugin.
// values_test.go is about Secrets, as the API returns them and as etcd holds
// them; each other file is one story that an operator lives through.
package cluster

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

var (
	binary   string // the plugin under test
	programs string // the folder of kube-apiserver, etcd, etcdctl and etcdutl
)

func TestMain(m *testing.M) {
	for _, v := range []struct {
		path          *string
		name, missing string
	}{{&binary, "KMSPLUGIN", "../../../kmsplugin"}, {&programs, "KUBE_PROGRAMS", "../../../build/kube"}} {
		path := os.Getenv(v.name)
		if path == "" {
			path = v.missing
		}
		var err error
		if *v.path, err = filepath.Abs(path); err == nil {
			_, err = os.Stat(*v.path)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	for _, name := range []string{"KMS_KEK", "KMS_KEK_FILE", "NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID"} {
		os.Unsetenv(name)
	}
	os.Exit(m.Run())
}

// figures are what a story found out; cluster.sh repeats them at its end.
func figures(t *testing.T, format string, args ...any) {
	t.Helper()
	t.Logf("figures %s: %s", t.Name(), fmt.Sprintf(format, args...))
}

func must[T any](v T, err error) func(*testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// tempDir has a short path, since a socket has only 107 bytes for its own, and mode 0700.
func tempDir(t *testing.T) string {
	t.Helper()
	dir := must(os.MkdirTemp("", "kms"))(t)
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// eventually wants f to return nil in time, and tells how long that took.
func eventually(t *testing.T, within time.Duration, what string, f func() error) time.Duration {
	t.Helper()
	start := time.Now()
	for {
		err := f()
		if err == nil {
			return time.Since(start).Round(time.Millisecond)
		}
		if time.Since(start) > within {
			t.Fatalf("%s: not within %v: %v", what, within, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// freePort may be taken by another before it is used; so far that never happened.
func freePort(t *testing.T) int {
	t.Helper()
	l := must(net.Listen("tcp", "127.0.0.1:0"))(t)
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// ----------------------------------------------------------------- processes

type process struct {
	cmd    *exec.Cmd
	log    string // the file that stdout and stderr go to
	exited chan struct{}
	once   sync.Once
}

// spawn starts a process whose log is kept over restarts under the same name.
func spawn(t *testing.T, dir, name string, env []string, files []*os.File, argv ...string) *process {
	t.Helper()
	p := &process{cmd: exec.Command(argv[0], argv[1:]...), log: filepath.Join(dir, name+".log"), exited: make(chan struct{})}
	out := must(os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600))(t)
	defer out.Close()
	p.cmd.Stdout, p.cmd.Stderr = out, out
	p.cmd.Env, p.cmd.ExtraFiles = append(os.Environ(), env...), files
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // should the test itself be killed
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { p.cmd.Wait(); close(p.exited) }()
	t.Cleanup(func() {
		p.end(syscall.SIGKILL)
		if t.Failed() {
			p.once.Do(func() { t.Logf("the end of %s's log:\n%s", name, complaints(p.log)) })
		}
	})
	return p
}

// end sends a signal and waits; what does not end in time is killed and said to be an error.
func (p *process) end(signal syscall.Signal) error {
	select {
	case <-p.exited:
		return nil
	default:
	}
	p.cmd.Process.Signal(signal)
	select {
	case <-p.exited:
		return nil
	case <-time.After(40 * time.Second):
		p.cmd.Process.Kill()
		<-p.exited
		return fmt.Errorf("%s: still running 40 s after %v", p.cmd.Path, signal)
	}
}

func (p *process) ended() bool {
	select {
	case <-p.exited:
		return true
	default:
		return false
	}
}

// complaints is the end of a log, without klog's lines of level info.
func complaints(file string) string {
	var lines []string
	for line := range strings.Lines(tail(file, 1<<20)) {
		if !info.MatchString(line) {
			lines = append(lines, line[:min(len(line), 500)])
		}
	}
	return strings.Join(lines[max(0, len(lines)-20):], "")
}

var info = regexp.MustCompile(`^I\d{4} `)

func tail(file string, n int) string {
	b, _ := os.ReadFile(file)
	return string(b[max(0, len(b)-n):])
}

// command runs something that ends by itself: its exit status, stdout and stderr.
func command(t *testing.T, env []string, stdin []byte, argv ...string) (int, []byte, string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	var stdout, stderr bytes.Buffer
	cmd.Env, cmd.Stdin, cmd.Stdout, cmd.Stderr = append(os.Environ(), env...), bytes.NewReader(stdin), &stdout, &stderr
	if err := cmd.Run(); err != nil {
		if exit := new(exec.ExitError); !errors.As(err, &exit) || !exit.Exited() {
			t.Fatalf("%v: %v\n%s", argv, err, stderr.String())
		}
	}
	return cmd.ProcessState.ExitCode(), stdout.Bytes(), stderr.String()
}

// ---------------------------------------------------------------------- etcd

type etcd struct {
	*process
	dir, url string
	client   *clientv3.Client
}

// startEtcd starts an empty etcd, or one on the data that is already in dir/data.
func startEtcd(t *testing.T, dir string) *etcd {
	t.Helper()
	e := &etcd{dir: dir, url: fmt.Sprintf("http://127.0.0.1:%d", freePort(t))}
	peer := fmt.Sprintf("http://127.0.0.1:%d", freePort(t))
	// Without fsync: these data outlive no power failure, and need not.
	e.process = spawn(t, dir, "etcd", nil, nil, filepath.Join(programs, "etcd"), "--data-dir="+dir+"/data", "--log-level=warn",
		"--listen-client-urls="+e.url, "--advertise-client-urls="+e.url, "--listen-peer-urls="+peer,
		"--initial-advertise-peer-urls="+peer, "--initial-cluster=default="+peer, "--unsafe-no-fsync")
	e.connect(t)
	return e
}

// connect waits until it answers.
func (e *etcd) connect(t *testing.T) {
	t.Helper()
	e.client = must(clientv3.New(clientv3.Config{Endpoints: []string{e.url}, Logger: zap.NewNop(), DialTimeout: 5 * time.Second}))(t)
	t.Cleanup(func() { e.client.Close() })
	eventually(t, 30*time.Second, "etcd", func() error {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_, err := e.client.Get(ctx, "x")
		return err
	})
}

// ctl runs etcdctl, as an operator would, and wants it to succeed.
func (e *etcd) ctl(t *testing.T, stdin []byte, args ...string) []byte {
	t.Helper()
	code, stdout, stderr := command(t, nil, stdin, append([]string{filepath.Join(programs, "etcdctl"), "--endpoints=" + e.url}, args...)...)
	if code != 0 {
		t.Fatalf("etcdctl %v: exit %d\n%s", args, code, stderr)
	}
	return stdout
}

// ---------------------------------------------------------------- the plugin

// kek is a key as KMS_KEK takes it.
type kek string

func newKEK() kek {
	key := make([]byte, 32)
	rand.Read(key)
	return kek(base64.StdEncoding.EncodeToString(key))
}

// id computes the key_id from its definition.
func (k kek) id() string {
	key, _ := base64.StdEncoding.DecodeString(string(k))
	mac := hmac.New(sha256.New, key)
	mac.Write([]byte("kmsplugin key_id v1"))
	return hex.EncodeToString(mac.Sum(nil)[:16])
}

func ring(keks ...kek) []string {
	var keys []string
	for _, k := range keks {
		keys = append(keys, string(k))
	}
	return []string{"KMS_KEK=" + strings.Join(keys, ",")}
}

// verb runs a verb of the plugin that ends by itself.
func verb(t *testing.T, keks []kek, stdin []byte, args ...string) (int, []byte, string) {
	t.Helper()
	return command(t, ring(keks...), stdin, append([]string{binary}, args...)...)
}

// plugin is `kmsplugin serve` on one endpoint, over restarts.
type plugin struct {
	*process
	dir, endpoint string
	activation    *os.File // a listening socket that is passed on, as systemd does
}

func newPlugin(t *testing.T) *plugin {
	dir := tempDir(t)
	return &plugin{dir: dir, endpoint: "unix://" + dir + "/kms.sock"}
}

// listen makes the socket here, so that it never disappears.
func (p *plugin) listen(t *testing.T) {
	t.Helper()
	l := must(net.ListenUnix("unix", &net.UnixAddr{Name: p.socket(), Net: "unix"}))(t)
	p.activation = must(l.File())(t)
	l.SetUnlinkOnClose(false)
	l.Close()
	t.Cleanup(func() { p.activation.Close() })
}

func (p *plugin) socket() string {
	path := strings.TrimPrefix(p.endpoint, "unix://")
	return strings.Replace(path, "/@", "@", 1)
}

// start starts the plugin, in the place of one that has ended or that it ends now, and returns when it is ready.
func (p *plugin) start(t *testing.T, keks ...kek) {
	t.Helper()
	p.stop(t)
	before := len(tail(filepath.Join(p.dir, "plugin.log"), 1<<30))
	argv, files := []string{binary, "serve", "--listen", p.endpoint}, []*os.File(nil)
	if p.activation != nil { // LISTEN_PID is the plugin's own pid, which only a shell knows before exec
		argv = []string{"/bin/sh", "-c", `LISTEN_PID=$$ LISTEN_FDS=1 exec "$0" serve`, binary}
		files = []*os.File{p.activation}
	}
	p.process = spawn(t, p.dir, "plugin", ring(keks...), files, argv...)
	eventually(t, 10*time.Second, "the plugin", func() error {
		switch log := tail(p.log, 1<<30)[before:]; {
		case strings.Contains(log, "msg=ready"):
			return nil
		case p.ended():
			t.Fatalf("the plugin ended before it was ready:\n%s", log)
		}
		return errors.New("no msg=ready")
	})
}

// stop ends the plugin as systemd and the kubelet do, and wants a clean exit.
func (p *plugin) stop(t *testing.T) {
	t.Helper()
	if p.process == nil {
		return
	}
	err := p.end(syscall.SIGTERM)
	if status := p.cmd.ProcessState; err != nil || !status.Success() {
		t.Errorf("SIGTERM: %v, %v", err, status)
	}
	p.process = nil
}

func (p *plugin) kill() {
	p.end(syscall.SIGKILL)
	p.process = nil
}

// calls reads GET /metrics on the socket: how often each method was called with each outcome.
func (p *plugin) calls(t *testing.T) map[string]int {
	t.Helper()
	transport := &http.Transport{
		Protocols: new(http.Protocols),
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", p.socket())
		},
	}
	transport.Protocols.SetUnencryptedHTTP2(true)
	defer transport.CloseIdleConnections()
	response := must((&http.Client{Transport: transport, Timeout: 5 * time.Second}).Get("http://localhost/metrics"))(t)
	defer response.Body.Close()
	body := string(must(io.ReadAll(response.Body))(t))
	calls := map[string]int{}
	rows := callsRE.FindAllStringSubmatch(body, -1)
	for _, m := range rows {
		n, _ := strconv.Atoi(m[4])
		if n > 0 {
			calls[m[1]+" "+m[2]+" "+m[3]] = n
		}
	}
	if len(rows) == 0 {
		t.Errorf("no calls in /metrics:\n%s", body)
	}
	return calls
}

var callsRE = regexp.MustCompile(`(?m)^kmsplugin_grpc_requests_total\{service="(\w+)",method="(\w+)",code="(\w+)"\} (\d+)$`)

// ------------------------------------------------------------ kube-apiserver

type apiserver struct {
	*process
	dir, url string
	etcd     string // its URL
	args     []string
	client   kubernetes.Interface
	rest     *rest.Config
}

const token, nodeToken = "a-token-of-this-test", "a-token-of-its-kubelet"

// newAPIServer prepares a kube-apiserver on an etcd; start starts it.
func newAPIServer(t *testing.T, e *etcd, args ...string) *apiserver {
	t.Helper()
	dir, port := tempDir(t), freePort(t)
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))(t)
	der := must(x509.MarshalECPrivateKey(key))(t)
	for name, content := range map[string][]byte{
		"sa.key": pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}),
		"tokens": []byte(token + `,admin,1,"system:masters"` + "\n" + nodeToken + ",system:node:" + nodeName + `,2,"system:nodes"` + "\n"),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return &apiserver{dir: dir, url: fmt.Sprintf("https://127.0.0.1:%d", port), etcd: e.url, args: append([]string{
		filepath.Join(programs, "kube-apiserver"), "--etcd-servers=" + e.url,
		"--bind-address=127.0.0.1", fmt.Sprintf("--secure-port=%d", port), "--cert-dir=" + dir + "/tls",
		"--advertise-address=192.0.2.1", "--endpoint-reconciler-type=none", "--service-cluster-ip-range=10.0.0.0/24",
		"--service-account-issuer=https://kubernetes", "--service-account-key-file=" + dir + "/sa.key",
		"--service-account-signing-key-file=" + dir + "/sa.key", "--token-auth-file=" + dir + "/tokens",
		"--authorization-mode=AlwaysAllow", "--disable-admission-plugins=ServiceAccount",
		"--encryption-provider-config=" + dir + "/encryption.yaml",
	}, args...)}
}

// configure writes the EncryptionConfiguration. A block is "resource: provider, provider…".
func (a *apiserver) configure(t *testing.T, blocks ...string) {
	t.Helper()
	config := "apiVersion: apiserver.config.k8s.io/v1\nkind: EncryptionConfiguration\nresources:\n"
	for _, block := range blocks {
		resource, providers, _ := strings.Cut(block, ": ")
		config += fmt.Sprintf("  - {resources: [%s], providers: [%s]}\n", resource, providers)
	}
	// In one step: the apiserver may be watching it.
	file := a.dir + "/encryption.yaml"
	err := os.WriteFile(file+".new", []byte(config), 0o600)
	if err = errors.Join(err, os.Rename(file+".new", file)); err != nil {
		t.Fatal(err)
	}
}

// launch starts the apiserver without waiting for more than its port.
func (a *apiserver) launch(t *testing.T) {
	t.Helper()
	a.stop(t)
	a.process = spawn(t, a.dir, "kube-apiserver", nil, nil, a.args...)
	eventually(t, 60*time.Second, "kube-apiserver's port", func() error {
		if a.ended() {
			t.Fatalf("kube-apiserver ended:\n%s", tail(a.log, 3000))
		}
		conn, err := net.DialTimeout("tcp", strings.TrimPrefix(a.url, "https://"), time.Second)
		if err == nil {
			conn.Close()
		}
		return err
	})
	a.rest = &rest.Config{
		Host: a.url, BearerToken: token, QPS: -1, Timeout: 20 * time.Second,
		TLSClientConfig: rest.TLSClientConfig{CAFile: a.dir + "/tls/apiserver.crt", ServerName: "kubernetes"},
		ContentConfig:   rest.ContentConfig{ContentType: "application/vnd.kubernetes.protobuf"},
	}
	a.client = must(kubernetes.NewForConfig(a.rest))(t)
}

func (a *apiserver) start(t *testing.T) time.Duration {
	t.Helper()
	a.launch(t)
	return eventually(t, 60*time.Second, "/readyz", a.ready)
}

func (a *apiserver) stop(t *testing.T) {
	t.Helper()
	if a.process == nil {
		return
	}
	if err := a.end(syscall.SIGTERM); err != nil {
		t.Error(err)
	}
	a.process = nil
}

// ready is nil, or what /readyz says.
func (a *apiserver) ready() error {
	_, err := a.get("/readyz")
	return err
}

// get returns a page that is no resource; an error holds its body.
func (a *apiserver) get(path string) (string, error) {
	client, err := rest.HTTPClientFor(a.rest)
	if err != nil {
		return "", err
	}
	response, err := client.Get(a.url + path)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode != 200 {
		err = fmt.Errorf("%s: %d %s", path, response.StatusCode, body)
	}
	return string(body), err
}

// version is kube-apiserver's own word.
func (a *apiserver) version(t *testing.T) string {
	t.Helper()
	return must(a.client.Discovery().ServerVersion())(t).GitVersion
}

// version is etcd's own word.
func (e *etcd) version(t *testing.T) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	return must(e.client.Status(ctx, e.url))(t).Version
}
