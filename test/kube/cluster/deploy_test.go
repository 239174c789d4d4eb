package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/yaml"
)

// The pods of deploy/kubeadm, in a dry run of kube-apiserver: what it says of a
// pod that a kubelet reports, it says without a kubelet and without storing it.

const (
	deploy     = "../../../deploy/kubeadm/"
	kubeSystem = "kube-system"
	nodeName   = "cp-1"
)

// manifest is a pod as it stands in the file, unknown fields and all.
type manifest map[string]any

func parse(t *testing.T, text string) manifest {
	t.Helper()
	var m manifest
	if err := yaml.Unmarshal([]byte(text), &m); err != nil {
		t.Fatal(err)
	}
	return m
}

// at walks down a manifest: names are keys, numbers are indices.
func at[T any](m manifest, path ...any) T {
	var v any = map[string]any(m)
	for _, p := range path {
		switch p := p.(type) {
		case string:
			v = v.(map[string]any)[p]
		case int:
			v = v.([]any)[p]
		}
	}
	return v.(T)
}

// controlPlane is a kube-apiserver with the admission of a kubeadm cluster, and a node.
func controlPlane(t *testing.T) (*apiserver, *corev1.Node) {
	t.Helper()
	a := newAPIServer(t, startEtcd(t, tempDir(t)), "--enable-admission-plugins=NodeRestriction")
	a.args = slices.DeleteFunc(a.args, func(arg string) bool { return strings.HasPrefix(arg, "--disable-admission-plugins=") })
	a.configure(t, "secrets: "+identity)
	a.start(t)
	eventually(t, 30*time.Second, kubeSystem, func() error {
		_, err := a.client.CoreV1().Namespaces().Get(context.Background(), kubeSystem, metav1.GetOptions{})
		return err
	})
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: nodeName}}
	return a, must(a.client.CoreV1().Nodes().Create(context.Background(), node, metav1.CreateOptions{}))(t)
}

// mirror makes of a static pod what its kubelet sends (kubelet/config/common.go, kubelet/pod/mirror_client.go).
func mirror(m manifest, node *corev1.Node) manifest {
	meta, spec := at[map[string]any](m, "metadata"), at[map[string]any](m, "spec")
	meta["name"] = fmt.Sprint(meta["name"], "-", node.Name)
	annotations, _ := meta["annotations"].(map[string]any)
	if annotations == nil {
		annotations = map[string]any{}
	}
	for _, name := range []string{"hash", "mirror"} {
		annotations["kubernetes.io/config."+name] = "0123456789abcdef0123456789abcdef"
	}
	annotations["kubernetes.io/config.source"] = "file"
	meta["annotations"] = annotations
	meta["ownerReferences"] = []any{map[string]any{
		"apiVersion": "v1", "kind": "Node", "name": node.Name, "uid": string(node.UID), "controller": true}}
	spec["nodeName"] = node.Name
	spec["tolerations"] = []any{map[string]any{"operator": "Exists", "effect": "NoExecute"}}
	return m
}

// dryRun creates the pod as the kubelet, up to the moment at which it would be stored.
func (a *apiserver) dryRun(t *testing.T, m manifest) (manifest, *corev1.Pod, error) {
	t.Helper()
	kubelet := *a.rest
	kubelet.BearerToken = nodeToken
	client := must(rest.HTTPClientFor(&kubelet))(t)
	body := must(json.Marshal(m))(t)
	response := must(client.Post(a.url+"/api/v1/namespaces/"+kubeSystem+"/pods?dryRun=All&fieldValidation=Strict",
		"application/json", bytes.NewReader(body)))(t)
	defer response.Body.Close()
	body = must(io.ReadAll(response.Body))(t)
	if response.StatusCode != http.StatusCreated {
		return nil, nil, fmt.Errorf("%d: %s", response.StatusCode, body)
	}
	pod, back := new(corev1.Pod), manifest{}
	if err := json.Unmarshal(body, pod); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(body, &back); err != nil {
		t.Fatal(err)
	}
	return back, pod, nil
}

// lost are the fields that were sent and did not come back as they were.
func lost(path string, sent, got any) (paths []string) {
	switch s := sent.(type) {
	case map[string]any:
		g, _ := got.(map[string]any)
		for key, v := range s {
			paths = append(paths, lost(path+"."+key, v, g[key])...)
		}
	case []any:
		g, _ := got.([]any)
		for i, v := range s {
			if i >= len(g) {
				return append(paths, fmt.Sprintf("%s[%d]", path, i))
			}
			paths = append(paths, lost(fmt.Sprintf("%s[%d]", path, i), v, g[i])...)
		}
	case nil:
	default:
		if !reflect.DeepEqual(sent, got) {
			paths = append(paths, fmt.Sprintf("%s: %v, not %v", path, got, sent))
		}
	}
	return paths
}

// admitted wants the pod to be taken as it stands, in the highest class, and nothing to be stored.
func (a *apiserver) admitted(t *testing.T, m manifest) *corev1.Pod {
	t.Helper()
	back, pod, err := a.dryRun(t, m)
	if err != nil {
		t.Fatal(err)
	}
	if paths := lost("", map[string]any(m), map[string]any(back)); len(paths) > 0 {
		t.Errorf("not as sent: %s", strings.Join(paths, "; "))
	}
	if pod.Spec.Priority == nil || *pod.Spec.Priority != 2000001000 || pod.UID == "" {
		t.Errorf("not the highest priority: class %q, uid %q", pod.Spec.PriorityClassName, pod.UID)
	}
	if pods := must(a.client.CoreV1().Pods("").List(context.Background(), metav1.ListOptions{}))(t); len(pods.Items) > 0 {
		t.Errorf("a dry run has stored %v", pods.Items)
	}
	return pod
}

// mounted says where in a pod's first container a path of the host appears.
func mounted(pod *corev1.Pod, host string) (at string, kind corev1.HostPathType) {
	for _, v := range pod.Spec.Volumes {
		if v.HostPath == nil || v.HostPath.Path != host {
			continue
		}
		for _, m := range pod.Spec.Containers[0].VolumeMounts {
			if m.Name == v.Name {
				return m.MountPath, *v.HostPath.Type
			}
		}
	}
	return "", ""
}

// The plugin's static pod, as it comes back from kube-apiserver, has the confinement that is
// promised. What kube-apiserver does not take, it says: a mistake in the file would be found.
func TestDeployStaticPod(t *testing.T) {
	t.Parallel()
	a, node := controlPlane(t)
	text := string(must(os.ReadFile(deploy + "kmsplugin.yaml"))(t))
	pod := a.admitted(t, mirror(parse(t, text), node))
	spec, c := pod.Spec, pod.Spec.Containers[0]
	socket, socketKind := mounted(pod, "/run/kmsplugin")
	key, keyKind := mounted(pod, "/etc/kmsplugin")
	for want, got := range map[string]bool{
		"one container":           len(spec.Containers) == 1 && len(spec.InitContainers) == 0,
		"system-node-critical":    spec.PriorityClassName == "system-node-critical",
		"the host's network":      spec.HostNetwork,
		"no other of its spaces":  !spec.HostPID && !spec.HostIPC,
		"no service account":      spec.ServiceAccountName == "",
		"user 0":                  *spec.SecurityContext.RunAsUser == 0 && c.SecurityContext.RunAsUser == nil,
		"seccomp RuntimeDefault":  spec.SecurityContext.SeccompProfile.Type == corev1.SeccompProfileTypeRuntimeDefault,
		"not privileged":          c.SecurityContext.Privileged == nil,
		"no new privileges":       !*c.SecurityContext.AllowPrivilegeEscalation,
		"a read-only root":        *c.SecurityContext.ReadOnlyRootFilesystem,
		"no capability":           slices.Equal(c.SecurityContext.Capabilities.Drop, []corev1.Capability{"ALL"}) && len(c.SecurityContext.Capabilities.Add) == 0,
		"what the image has":      slices.Equal(c.Command, []string{"/kmsplugin", "serve", "--sandbox", "require"}) && len(c.Args) == 0,
		"no registry":             strings.HasPrefix(c.Image, "localhost/kmsplugin:") && c.ImagePullPolicy == corev1.PullIfNotPresent,
		"a probe by exec":         slices.Equal(c.LivenessProbe.Exec.Command, []string{"/kmsplugin", "probe"}),
		"five seconds for it":     c.LivenessProbe.TimeoutSeconds == 5,
		"at most 64 MiB":          c.Resources.Limits.Memory().Value() <= 64<<20,
		"no key in a variable":    slices.Equal(c.Env, []corev1.EnvVar{{Name: "KMS_KEK_FILE", Value: key + "/kek"}}) && len(c.EnvFrom) == 0,
		"the key's directory":     key != "" && keyKind == corev1.HostPathDirectory,
		"the socket's directory":  socket == "/run/kmsplugin" && socketKind == corev1.HostPathDirectoryOrCreate,
		"host paths and no other": !slices.ContainsFunc(spec.Volumes, func(v corev1.Volume) bool { return v.HostPath == nil }),
	} {
		if !got {
			t.Errorf("not so: %s", want)
		}
	}
	refused := 0
	for want, mistake := range map[string]func(m manifest){
		`unknown field \"spec.containers[0].securityContext.readOnlyRootFileSystem\"`: func(m manifest) {
			at[map[string]any](m, "spec", "containers", 0, "securityContext")["readOnlyRootFileSystem"] = true
		},
		"no PriorityClass with name":              func(m manifest) { at[map[string]any](m, "spec")["priorityClassName"] = "system-critical" },
		"spec.securityContext.runAsUser":          func(m manifest) { at[map[string]any](m, "spec", "securityContext")["runAsUser"] = -1 },
		"spec.volumes[0].hostPath.type":           func(m manifest) { at[map[string]any](m, "spec", "volumes", 0, "hostPath")["type"] = "Folder" },
		"spec.containers[0].volumeMounts[0].name": func(m manifest) { at[map[string]any](m, "spec", "volumes", 0)["name"] = "sockets" },
		"spec.containers[0].livenessProbe.timeoutSeconds": func(m manifest) {
			at[map[string]any](m, "spec", "containers", 0, "livenessProbe")["timeoutSeconds"] = -5
		},
		"a mirror pod may not reference secrets": func(m manifest) {
			at[map[string]any](m, "spec", "volumes", 1)["secret"] = map[string]any{"secretName": "kek"}
			delete(at[map[string]any](m, "spec", "volumes", 1), "hostPath")
		},
	} {
		m := mirror(parse(t, text), node)
		mistake(m)
		if _, _, err := a.dryRun(t, m); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("want %s, got %v", want, err)
		} else {
			refused++
		}
	}
	figures(t, "Kubernetes %s: server-side dry run of the plugin's pod as a mirror pod: taken as sent, priority %d; refused with each of %d mistakes",
		a.version(t), *pod.Spec.Priority, refused)
}

// kubeadm itself takes the ClusterConfiguration, and the patch, and makes of both the
// same manifest, which kube-apiserver takes and in which it has what it needs.
func TestDeployKubeadm(t *testing.T) {
	t.Parallel()
	needsNamespaces(t)
	kubeadm := filepath.Join(programs, "kubeadm")
	patches := must(filepath.Abs(deploy + "patches"))(t)
	release := strings.TrimSpace(string(must(exec.Command(kubeadm, "version", "-o", "short").Output())(t)))
	const node = `
---
apiVersion: kubeadm.k8s.io/v1beta4
kind: InitConfiguration
localAPIEndpoint: {advertiseAddress: 192.0.2.1}
nodeRegistration: {criSocket: "unix:///run/containerd/containerd.sock"}
`
	look := guide(t, "look-manifest")
	manifests := func(config string) (text string, looked bool) {
		t.Helper()
		dir := tempDir(t)
		file := filepath.Join(dir, "config.yaml")
		if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
			t.Fatal(err)
		}
		code, _, stderr := command(t, nil, nil, "unshare", "--mount", "sh", "-euc", ownEtc+`
			"$1" config validate --config "$2"
			"$1" init phase control-plane apiserver --config "$2"
			cp /etc/kubernetes/manifests/kube-apiserver.yaml "$0/manifest.yaml"
			if sh -euc "$3" >&2; then echo yes; else echo no; fi >"$0/looked"`, dir, kubeadm, file, look)
		if code != 0 {
			t.Fatalf("kubeadm: exit %d\n%s", code, stderr)
		}
		return string(must(os.ReadFile(dir + "/manifest.yaml"))(t)), string(must(os.ReadFile(dir+"/looked"))(t)) == "yes\n"
	}
	release = "kubernetesVersion: " + release + "\n"
	ours := string(must(os.ReadFile(deploy + "cluster-configuration.yaml"))(t))
	plainConfig := "apiVersion: kubeadm.k8s.io/v1beta4\nkind: ClusterConfiguration\n" + release + node
	configured, found := manifests(ours + release + node)
	plain, foundInPlain := manifests(plainConfig)
	patched, foundInPatched := manifests(plainConfig + "patches: {directory: " + patches + "}\n")
	if !found || foundInPlain || !foundInPatched {
		t.Errorf("the guide's look at the manifest finds ours: %v, finds it without: %v, in the patched one: %v", found, foundInPlain, foundInPatched)
	}

	a, control := controlPlane(t)
	pods := map[string]*corev1.Pod{}
	for name, text := range map[string]string{"configured": configured, "plain": plain, "patched": patched} {
		pods[name] = a.admitted(t, mirror(parse(t, text), control))
	}
	pod := pods["patched"]
	if uid := pod.Spec.SecurityContext.RunAsUser; uid != nil && *uid != 0 {
		t.Errorf("kubeadm's API server runs as uid %d, doc/operate.md says root", *uid)
	}
	// doc/operate.md: without the plugin it is restarted every four minutes.
	if s := pod.Spec.Containers[0].StartupProbe; s.HTTPGet.Path != "/livez" || s.PeriodSeconds*s.FailureThreshold != 240 {
		t.Errorf("startup probe: %v", s)
	}
	var config string
	for _, arg := range pod.Spec.Containers[0].Command {
		if value, found := strings.CutPrefix(arg, "--encryption-provider-config="); found {
			config = value
		}
	}
	for _, host := range []string{filepath.Dir(config), "/run/kmsplugin"} {
		if where, _ := mounted(pod, host); where != host {
			t.Errorf("%s is not mounted in\n%s", host, patched)
		}
	}
	if len(pods["plain"].Spec.Volumes)+2 != len(pod.Spec.Volumes) {
		t.Errorf("%d volumes without and %d with our patch", len(pods["plain"].Spec.Volumes), len(pod.Spec.Volumes))
	}
	if got, want := summary(pod), summary(pods["configured"]); got != want {
		t.Errorf("the patch gives\n%s\nthe configuration\n%s", got, want)
	}

	// On an existing cluster: from the ConfigMap, edited as the page says. (Nobody starts that API server.)
	stored := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "kubeadm-config"}, Data: map[string]string{"ClusterConfiguration": "apiServer: {}\n" +
		"apiVersion: kubeadm.k8s.io/v1beta4\nkind: ClusterConfiguration\n" + release}}
	must(a.client.CoreV1().ConfigMaps(kubeSystem).Create(context.Background(), stored, metav1.CreateOptions{}))(t)
	dir := tempDir(t)
	added := "    " + strings.ReplaceAll(strings.TrimSpace(ours[strings.Index(ours, "apiServer:"):]), "\n", "\n    ")
	if err := os.WriteFile(dir+"/added", []byte(added+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if code, out := a.operator(t, dir, "edit", `export KUBE_EDITOR="sed -i -e '/^    apiServer: {}$/{r $0/added' -e 'd;}'"`); code != 0 {
		t.Errorf("edit: exit %d\n%s", code, out)
	}
	if code, out := a.operator(t, dir, "apiserver", inEtc+`trap 'cp /etc/kubernetes/manifests/kube-apiserver.yaml "$0"' EXIT
		kubectl() { [ "$*" = "get --raw /readyz/kms-providers" ] || command kubectl "$@"; }`); code != 0 {
		t.Errorf("apiserver: exit %d\n%s", code, out)
	}
	again := a.admitted(t, mirror(parse(t, string(must(os.ReadFile(dir+"/kube-apiserver.yaml"))(t))), control))
	address := regexp.MustCompile(`(?m)^--advertise-address=.*\n`) // which kubeadm finds out here
	if got, want := address.ReplaceAllString(summary(again), ""), address.ReplaceAllString(summary(pod), ""); got != want {
		t.Errorf("from the ConfigMap comes\n%s\nnot\n%s", got, want)
	}

	m := mirror(parse(t, patched), control)
	volumes := at[[]any](m, "spec", "volumes")
	at[map[string]any](m, "spec")["volumes"] = volumes[:len(volumes)-1]
	if _, _, err := a.dryRun(t, m); err == nil || !strings.Contains(err.Error(), "volumeMounts") {
		t.Errorf("a patch that forgets a volume: %v", err)
	}
	figures(t, "kubeadm, %s: dry run of its kube-apiserver pod with the patch of deploy/kubeadm: taken as sent, the same as with the ClusterConfiguration",
		strings.TrimSpace(release))
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
