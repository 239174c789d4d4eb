// Package compat has the client halves of several generations of kube-apiserver,
// each with the grpc-go of its time, write and read through one plugin. Each has
// a go.mod of its own here, vX.Y.mod, which cluster.sh completes in a copy.
//
// KMS_COMPAT_APISERVER and KMS_COMPAT_GRPC are the versions (a test cannot find
// them out by itself), KMS_COMPAT_DIR is a folder with the values that earlier generations stored:
// each must read what they wrote, as it would after an upgrade of Kubernetes.
package compat

import (
	"bytes"
	"context"
	"encoding/base64"
	"fmt"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/server/options/encryptionconfig"
	"k8s.io/apiserver/pkg/storage/value"
	utilfeature "k8s.io/apiserver/pkg/util/feature"
)

const (
	object  = "k8s\x00 correct horse battery staple" // what it stands for does not matter here
	keyName = "/registry/secrets/default/database"
)

var etcdKey = value.DefaultContext(keyName)

var kek = base64.StdEncoding.EncodeToString([]byte("\x01 a KEK that all generations share"[:32]))

// refusal is what clients say that know Status version v2beta1 alone.
const refusal = "expected KMSv2 API version v2beta1, got v2"

func serve(t *testing.T, binary, endpoint string) {
	t.Helper()
	log := filepath.Join(t.TempDir(), "log")
	file, err := os.Create(log)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	cmd := exec.Command(binary, "serve", "--listen", endpoint)
	cmd.Env, cmd.Stderr = append(os.Environ(), "KMS_KEK="+kek), file
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
	})
	for start := time.Now(); ; time.Sleep(20 * time.Millisecond) {
		if b, _ := os.ReadFile(log); bytes.Contains(b, []byte("msg=ready")) {
			return
		} else if time.Since(start) > 10*time.Second {
			t.Fatalf("not ready:\n%s", b)
		}
	}
}

// load makes of an EncryptionConfiguration what kube-apiserver makes of it. The
// function has got one more argument over the years.
func load(t *testing.T, api, endpoint string) (value.Transformer, error) {
	t.Helper()
	config := fmt.Sprintf(`{"apiVersion": "apiserver.config.k8s.io/v1", "kind": "EncryptionConfiguration", "resources": [{"resources": ["secrets"],
		"providers": [{"kms": {"apiVersion": "%s", "name": "vault", "endpoint": "%s", "timeout": "3s"}}]}]}`, api, endpoint)
	file := filepath.Join(t.TempDir(), "encryption.json")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	f := reflect.ValueOf(encryptionconfig.LoadEncryptionConfig)
	args := []reflect.Value{reflect.ValueOf(ctx), reflect.ValueOf(file), reflect.ValueOf(false), reflect.ValueOf("compat")}
	results := f.Call(args[:f.Type().NumIn()])
	if err, _ := results[1].Interface().(error); err != nil {
		return nil, err
	}
	loaded := results[0].Interface().(*encryptionconfig.EncryptionConfiguration)
	for _, c := range loaded.HealthChecks {
		if err := c.Check(httptest.NewRequest("GET", "/healthz", nil)); err != nil {
			return nil, err
		}
	}
	return loaded.Transformers[schema.GroupResource{Resource: "secrets"}], nil
}

func TestCompatibility(t *testing.T) {
	binary, err := filepath.Abs(os.Getenv("KMSPLUGIN"))
	if err != nil || os.Getenv("KMSPLUGIN") == "" {
		t.Fatal("KMSPLUGIN is not set")
	}
	// Off by default since 1.29, unknown before 1.28.
	_ = utilfeature.DefaultMutableFeatureGate.Set("KMSv1=true")
	generation, grpc := os.Getenv("KMS_COMPAT_APISERVER"), os.Getenv("KMS_COMPAT_GRPC")
	if generation == "" || grpc == "" {
		t.Fatal("KMS_COMPAT_APISERVER and KMS_COMPAT_GRPC are not set (test/kube/cluster.sh does)")
	}
	sockets, err := os.MkdirTemp("", "kms")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(sockets) })

	seen := map[string]string{} // by API: the same on both sockets, or it is no row of the table
	for _, socket := range []struct{ kind, endpoint string }{
		{"file", "unix://" + sockets + "/kms.sock"},
		{"abstract", "unix:///@" + strings.Trim(strings.ReplaceAll(sockets, "/", "-"), "-")},
	} {
		serve(t, binary, socket.endpoint)
		for _, api := range []string{"v1", "v2"} {
			// 1.28 and before know no other Status version than v2beta1, which we never send.
			refuses := api == "v2" && (strings.HasPrefix(generation, "v0.27.") || strings.HasPrefix(generation, "v0.28."))
			t.Run(api+"/"+socket.kind, func(t *testing.T) {
				says := "works"
				defer func() {
					if t.Failed() {
						says = "FAILED"
					}
					if word := strings.TrimRight(strings.Fields(says)[0], ",:"); seen[api] == "" || seen[api] == word {
						seen[api] = word
					} else {
						seen[api] += ", " + word
					}
					t.Logf("figures %-8s  grpc %-8s  %s  %-8s  %s", generation, grpc, api, socket.kind, says)
				}()
				transformer, err := load(t, api, socket.endpoint)
				if refuses {
					if err == nil || !strings.Contains(err.Error(), refusal) {
						t.Errorf("not refused for its version: %v", err)
					}
					says = fmt.Sprintf("refused by the client: %v", err)
					return
				}
				if err != nil {
					t.Fatal(err)
				}
				stored, err := transformer.TransformToStorage(context.Background(), []byte(object), etcdKey)
				if err != nil || !bytes.HasPrefix(stored, []byte("k8s:enc:kms:"+api+":vault:")) || bytes.Contains(stored, []byte("horse")) {
					t.Fatalf("stored %q, %v", stored, err)
				}
				if again, err := load(t, api, socket.endpoint); err != nil { // with an empty cache
					t.Fatal(err)
				} else {
					read(t, again, stored)
				}
				unseal := exec.Command(binary, "unseal", keyName)
				unseal.Env, unseal.Stdin = append(os.Environ(), "KMS_KEK="+kek), bytes.NewReader(stored)
				if out, err := unseal.Output(); err != nil || string(out) != object {
					t.Errorf("unsealed %q, %v", out, err)
				}
				dir := os.Getenv("KMS_COMPAT_DIR")
				if dir == "" {
					return
				}
				earlier, _ := filepath.Glob(filepath.Join(dir, api+"-*"))
				for _, name := range earlier {
					value, err := os.ReadFile(name)
					if err != nil {
						t.Fatal(err)
					}
					read(t, transformer, value)
				}
				says += fmt.Sprintf(", reads %d values of earlier ones", len(earlier))
				if err := os.WriteFile(filepath.Join(dir, api+"-"+socket.kind+"-"+generation), stored, 0o600); err != nil {
					t.Error(err)
				}
			})
		}
	}
	inGuide(t, generation, grpc, seen["v1"], seen["v2"])
}

// inGuide holds the table to what was seen: this row, and a row for each generation here and for no other.
func inGuide(t *testing.T, generation string, columns ...string) {
	t.Helper()
	text, err := os.ReadFile("../../../doc/contributing.md")
	if err != nil {
		t.Fatal(err)
	}
	guide := string(text)
	minor := strings.Split(generation, ".")[1]
	row := "\n| 1." + minor + " | " + strings.Join(append([]string{generation}, columns...), " | ") + " |\n"
	if !strings.Contains(guide, row) {
		t.Errorf("doc/contributing.md has no row%s", row)
	}
	if !strings.Contains(guide, refusal) {
		t.Errorf("doc/contributing.md does not have %q", refusal)
	}
	var rows, files []string
	for _, m := range regexp.MustCompile(`(?m)^\| 1\.(\d+) \| v0\.`).FindAllStringSubmatch(guide, -1) {
		rows = append(rows, "v0."+m[1]+".mod")
	}
	if files, err = filepath.Glob("v*.mod"); err != nil || !slices.Equal(rows, files) {
		t.Errorf("doc/contributing.md has rows for %v, here are %v", rows, files)
	}
}

func read(t *testing.T, transformer value.Transformer, stored []byte) {
	t.Helper()
	got, _, err := transformer.TransformFromStorage(context.Background(), stored, etcdKey)
	if err != nil || string(got) != object {
		t.Errorf("read %q, %v", got, err)
	}
}
