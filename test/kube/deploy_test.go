package kube

// The files in deploy/, given to what reads them in earnest, and the sentences
// that doc/operate.md promises in kube-apiserver's log.

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/server/options/encryptionconfig"
	"sigs.k8s.io/yaml"
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

// TestDeployStaticPod: the manifest is a Pod without an unknown field, has the
// confinement that is promised, and runs the plugin on the endpoint of the configurations.
func TestDeployStaticPod(t *testing.T) {
	var pod corev1.Pod
	if err := yaml.UnmarshalStrict([]byte(read(t, deploy+"kubeadm/kmsplugin.yaml")), &pod); err != nil {
		t.Fatal(err)
	}
	spec, c := pod.Spec, pod.Spec.Containers[0]
	for want, got := range map[string]bool{
		"one container":           len(spec.Containers) == 1,
		"kube-system":             pod.Namespace == "kube-system",
		"system-node-critical":    spec.PriorityClassName == "system-node-critical",
		"the host's network":      spec.HostNetwork,
		"user 0":                  *spec.SecurityContext.RunAsUser == 0,
		"seccomp RuntimeDefault":  spec.SecurityContext.SeccompProfile.Type == corev1.SeccompProfileTypeRuntimeDefault,
		"no new privileges":       !*c.SecurityContext.AllowPrivilegeEscalation,
		"a read-only root":        *c.SecurityContext.ReadOnlyRootFilesystem,
		"no capability":           slices.Equal(c.SecurityContext.Capabilities.Drop, []corev1.Capability{"ALL"}) && len(c.SecurityContext.Capabilities.Add) == 0,
		"a probe by exec":         slices.Equal(c.LivenessProbe.Exec.Command, []string{"/kmsplugin", "probe"}),
		"five seconds for it":     c.LivenessProbe.TimeoutSeconds == 5,
		"at most 64 MiB":          c.Resources.Limits.Memory().Value() <= 64<<20,
		"no key in a variable":    !slices.ContainsFunc(c.Env, func(e corev1.EnvVar) bool { return e.Name == "KMS_KEK" }),
		"the key in a file":       slices.Contains(c.Env, corev1.EnvVar{Name: "KMS_KEK_FILE", Value: mounted(&pod, "/etc/kmsplugin/kek")}),
		"the socket's directory":  mounted(&pod, path.Dir(strings.TrimPrefix(deployEndpoint, "unix://"))) != "",
		"host paths and no other": !slices.ContainsFunc(spec.Volumes, func(v corev1.Volume) bool { return v.HostPath == nil }),
	} {
		if !got {
			t.Errorf("not so: %s", want)
		}
	}
	for _, container := range pod.Spec.Containers { // what it is started with is a command line of the plugin
		if container.Command[0] != "/kmsplugin" || container.Command[1] != "serve" || len(container.Command) != 2 {
			t.Errorf("command %q", container.Command)
		}
	}
}

// mounted says where in a pod's first container a path of the host appears.
func mounted(pod *corev1.Pod, host string) string {
	for _, v := range pod.Spec.Volumes {
		if v.HostPath == nil || v.HostPath.Path != host {
			continue
		}
		for _, m := range pod.Spec.Containers[0].VolumeMounts {
			if m.Name == v.Name {
				return m.MountPath
			}
		}
	}
	return ""
}

// TestDeployKubeadm: kubeadm itself takes the ClusterConfiguration, and the patch,
// and makes of both the same manifest, in which the API server has what it needs.
func TestDeployKubeadm(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to give kubeadm an /etc/kubernetes of its own")
	}
	kubeadm, err := filepath.Abs("../../build/kube/kubeadm")
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("go", "build", "-C", "kubeadm", "-o", kubeadm, "k8s.io/kubernetes/cmd/kubeadm").CombinedOutput(); err != nil {
		t.Fatalf("go build kubeadm: %v\n%s", err, out)
	}
	patches, err := filepath.Abs(deploy + "kubeadm/patches")
	if err != nil {
		t.Fatal(err)
	}
	const node = `
---
apiVersion: kubeadm.k8s.io/v1beta4
kind: InitConfiguration
localAPIEndpoint: {advertiseAddress: 192.0.2.1}
nodeRegistration: {criSocket: "unix:///run/containerd/containerd.sock"}
`
	const release = "kubernetesVersion: v1.37.2\n"
	manifest := func(config string) (pod corev1.Pod, text string) {
		t.Helper()
		dir := t.TempDir()
		file := filepath.Join(dir, "config.yaml")
		if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command("unshare", "--mount", "sh", "-euc", `
			# An /etc of which nothing is left: kubeadm writes to /etc/kubernetes and nowhere else.
			mkdir "$3/etc"
			mount -t tmpfs tmpfs "$3/etc"
			mkdir "$3/etc/up" "$3/etc/work"
			mount -t overlay -o "lowerdir=/etc,upperdir=$3/etc/up,workdir=$3/etc/work" overlay /etc
			"$1" config validate --config "$2"
			"$1" init phase control-plane apiserver --config "$2"
			cp /etc/kubernetes/manifests/kube-apiserver.yaml "$3/manifest.yaml"`, "sh", kubeadm, file, dir)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("kubeadm: %v\n%s", err, out)
		}
		text = read(t, filepath.Join(dir, "manifest.yaml"))
		if err := yaml.UnmarshalStrict([]byte(text), &pod); err != nil {
			t.Fatal(err)
		}
		return pod, text
	}
	configured, text := manifest(read(t, deploy+"kubeadm/cluster-configuration.yaml") + release + node)
	plain, _ := manifest("apiVersion: kubeadm.k8s.io/v1beta4\nkind: ClusterConfiguration\n" + release + node)
	patched, _ := manifest("apiVersion: kubeadm.k8s.io/v1beta4\nkind: ClusterConfiguration\n" + release + node +
		"patches: {directory: " + patches + "}\n")

	if uid := configured.Spec.SecurityContext.RunAsUser; uid != nil && *uid != 0 {
		t.Errorf("kubeadm's API server runs as uid %d, doc/operate.md says root", *uid)
	}
	var config string
	for _, arg := range configured.Spec.Containers[0].Command {
		if value, found := strings.CutPrefix(arg, "--encryption-provider-config="); found {
			config = value
		}
	}
	for _, host := range []string{path.Dir(config), path.Dir(strings.TrimPrefix(deployEndpoint, "unix://"))} {
		if mounted(&configured, host) != host {
			t.Errorf("%s is not mounted in\n%s", host, text)
		}
	}
	if len(plain.Spec.Volumes)+2 != len(configured.Spec.Volumes) {
		t.Errorf("%d volumes without and %d with our configuration", len(plain.Spec.Volumes), len(configured.Spec.Volumes))
	}
	if got, want := summary(&patched), summary(&configured); got != want {
		t.Errorf("the patch gives\n%s\nthe configuration\n%s", got, want)
	}
}

// summary is what the two ways must agree on, in any order.
func summary(pod *corev1.Pod) string {
	var lines []string
	c := pod.Spec.Containers[0]
	lines = append(lines, c.Command...)
	for _, m := range c.VolumeMounts {
		lines = append(lines, fmt.Sprintf("mount %s %s %v", m.Name, m.MountPath, m.ReadOnly))
	}
	for _, v := range pod.Spec.Volumes {
		lines = append(lines, fmt.Sprintf("volume %s %s %s", v.Name, v.HostPath.Path, *v.HostPath.Type))
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
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
			"failed to perform encrypt section of the healthz check for KMS Provider", "connect: no such file or directory")
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
