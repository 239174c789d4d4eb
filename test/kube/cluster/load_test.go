package cluster

import (
	"context"
	"fmt"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// load is a client that makes one kind of request without a pause, and notes
// how it fared: what its user would have noticed.
type load struct {
	name      string
	good, bad int
	gap, slow time.Duration // longest time from one success to the next; slowest success
	errs      []string      // all of them
	end       chan struct{}
	done      sync.WaitGroup
	lastTime  time.Time
	mutex     sync.Mutex
}

func startLoad(t *testing.T, name string, request func(ctx context.Context, i int) error) *load {
	l := &load{name: name, end: make(chan struct{}), lastTime: time.Now()}
	l.done.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-l.end:
				return
			default:
			}
			ctx, cancel := context.WithTimeout(context.Background(), 15*time.Second)
			start := time.Now()
			err := request(ctx, i)
			cancel()
			l.note(start, err)
			time.Sleep(5 * time.Millisecond) // two cores have to serve it
		}
	})
	t.Cleanup(func() { l.stop() })
	return l
}

func (l *load) note(start time.Time, err error) {
	l.mutex.Lock()
	defer l.mutex.Unlock()
	now := time.Now()
	if err != nil {
		l.bad++
		l.errs = append(l.errs, err.Error())
		return
	}
	l.good++
	l.gap = max(l.gap, now.Sub(l.lastTime))
	l.slow = max(l.slow, now.Sub(start))
	l.lastTime = now
}

func (l *load) stop() *load {
	select {
	case <-l.end:
	default:
		close(l.end)
		l.done.Wait()
	}
	return l
}

func (l *load) String() string {
	return fmt.Sprintf("%s %d ok, %d failed, longest gap %v", l.name, l.good, l.bad, l.gap.Round(time.Millisecond))
}

func (l *load) first() string { return strings.Join(l.errs[:min(len(l.errs), 3)], "\n") }

// cutOff are the calls that a SIGKILL ended half-way. Nobody can answer those,
// and a client has one at a time: any other failure, or more of them than kills,
// is one that a user need not have seen.
var cutOff = regexp.MustCompile(`code = Unavailable desc = error reading from server: .*(EOF|connection reset by peer)`)

func (l *load) survived(t *testing.T, kills int) {
	t.Helper()
	l.stop()
	for _, err := range l.errs {
		if !cutOff.MatchString(err) {
			t.Errorf("%s: %s", l.name, err)
		}
	}
	if l.bad > kills || l.good < 100 {
		t.Errorf("%v, with %d kills: %s", l, kills, l.first())
	}
}

// flawless wants no failure at all.
func (l *load) flawless(t *testing.T) {
	t.Helper()
	l.stop()
	if l.bad > 0 || l.good == 0 {
		t.Errorf("%v: %s", l, l.first())
	}
}

// readers read these Secrets from etcd over and over, and now and then all in a list.
func readers(t *testing.T, name string, a *apiserver, names []string) *load {
	return startLoad(t, name, func(ctx context.Context, i int) error {
		if i%100 == 99 {
			_, err := a.client.CoreV1().Secrets(namespace).List(ctx, metav1.ListOptions{})
			return err
		}
		secret, err := a.client.CoreV1().Secrets(namespace).Get(ctx, names[i%len(names)], metav1.GetOptions{})
		if err == nil && !strings.HasPrefix(string(secret.Data["password"]), marker) {
			err = fmt.Errorf("read %v", secret)
		}
		return err
	})
}

// updates write one object over and over. Each is a real change, which no apiserver may skip.
func updates(t *testing.T, name string, a *apiserver, resource string) *load {
	core := a.client.CoreV1()
	meta := metav1.ObjectMeta{Namespace: namespace, Name: "load-" + resource}
	return startLoad(t, name, func(ctx context.Context, i int) error {
		patch := fmt.Appendf(nil, `{"metadata":{"annotations":{"n":"%d"}}}`, i)
		var err error
		switch {
		case i == 0 && resource == "secrets":
			_, err = core.Secrets(namespace).Create(ctx, &corev1.Secret{ObjectMeta: meta}, metav1.CreateOptions{})
		case i == 0:
			_, err = core.ConfigMaps(namespace).Create(ctx, &corev1.ConfigMap{ObjectMeta: meta}, metav1.CreateOptions{})
		case resource == "secrets":
			_, err = core.Secrets(namespace).Patch(ctx, meta.Name, types.MergePatchType, patch, metav1.PatchOptions{})
		default:
			_, err = core.ConfigMaps(namespace).Patch(ctx, meta.Name, types.MergePatchType, patch, metav1.PatchOptions{})
		}
		return err
	})
}
