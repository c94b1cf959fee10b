package boltstore_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/culvert-io/culvert/gateway"
	"github.com/culvert-io/culvert/gateway/boltstore"
)

// store is a push store in files.
type store struct {
	t    *testing.T
	path string
	*gateway.Gateway
	stop func()
}

func open(t *testing.T, path string) *store {
	t.Helper()
	backend, err := boltstore.Open(path, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	groups, err := gateway.OpenStore(gateway.StoreConfig{Logger: slog.New(slog.DiscardHandler)}, backend)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- groups.Run(ctx) }()
	s := &store{t: t, path: path, Gateway: gateway.New(gateway.Config{}, groups)}
	s.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(s.stop)
	return s
}

func (s *store) push(method, path, body string) {
	s.t.Helper()
	r := httptest.NewRequest(method, "/metrics/job"+path, strings.NewReader(body))
	rest, _, _ := strings.Cut(path, "?")
	w := httptest.NewRecorder()
	if method == http.MethodDelete {
		s.ServeDelete(w, r, rest)
	} else {
		s.ServePush(w, r, rest)
	}
	if w.Code/100 != 2 {
		s.t.Errorf("%s %s: %d %s", method, path, w.Code, w.Body)
	}
}

func (s *store) exposition() string {
	w := httptest.NewRecorder()
	s.ServeMetrics(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	return w.Body.String()
}

// crashed returns the path of a copy of the files as they are now: what a process
// leaves behind that is killed.
func (s *store) crashed() string {
	s.t.Helper()
	dir := s.t.TempDir()
	files, err := filepath.Glob(s.path + "*")
	if err != nil {
		s.t.Fatal(err)
	}
	for _, file := range files {
		content, err := os.ReadFile(file)
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, filepath.Base(file)), content, 0o600)
		}
		if err != nil {
			s.t.Fatal(err)
		}
	}
	return filepath.Join(dir, filepath.Base(s.path))
}

// expectAfterCrash compares the exposition with that after a crash, and after that
// with the one after an orderly end.
func (s *store) expectAfterCrash(what string) {
	s.t.Helper()
	want := s.exposition()
	path := s.crashed()
	for _, end := range []string{"a crash", "an orderly end"} {
		again := open(s.t, path)
		if got := again.exposition(); got != want {
			s.t.Fatalf("%s: after %s got\n%.3000s\nwant\n%.3000s", what, end, got, want)
		}
		again.stop()
	}
}

func TestCrash(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "push.db"))
	plain := func(n int) string {
		return fmt.Sprintf("# TYPE c counter\nc{x=\"2\"} %d\nc{x=\"1\"} %d.5\n# HELP b about b\n# TYPE b gauge\nb %d\n", n, n, -n)
	}
	for _, p := range []struct{ method, path, body string }{
		{"PUT", "/a", plain(1)},
		{"PUT", "/a", plain(2)},  // other values
		{"POST", "/a", plain(3)}, // the same by POST
		{"PUT", "/a/instance/b", plain(4)},
		{"POST", "/a", "# TYPE b gauge\nb 5\n"}, // one family of two
		{"POST", "/a", plain(6)},
		{"POST", "/a", plain(7)},
		{"PUT", "/a?interval=1h&ttl=2h", plain(8)},
		{"PUT", "/a", plain(9)},
		{"PUT", "/a?interval=1h", plain(10)},
		{"PUT", "/a?interval=0", plain(11)},
		{"DELETE", "/a", ""},
		{"PUT", "/a", plain(12)},
		{"PUT", "/a", plain(13)},
		{"PUT", "/a", "# TYPE h histogram\nh_bucket{le=\"1\"} 1\nh_count 2\nh_sum 3\n"},
		{"PUT", "/a", "# TYPE h histogram\nh_bucket{le=\"1\"} 2\nh_count 3\nh_sum 4\n"},
		{"PUT", "/a", "{\"utf.8\"} 1\n"},
		{"PUT", "/a", "{\"utf.8\"} 2\n"},
	} {
		s.push(p.method, p.path, p.body)
		s.expectAfterCrash(p.method + " " + p.path + " " + p.body)
	}
}

// The log's files are written several times over, while the database is written in the
// background; whenever the process is killed nothing is missing.
func TestCrashBetweenSaves(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "push.db"))
	random := rand.New(rand.NewPCG(1, 2))
	var large strings.Builder
	for n := range 20_000 {
		fmt.Fprintf(&large, "large{n=\"%d\"} %d\n", n, random.Int64())
	}
	for n := range 50 { // of a megabyte and more each
		if n%7 == 6 {
			s.push(http.MethodDelete, fmt.Sprint("/large/group/", random.IntN(10)), "")
		}
		s.push(http.MethodPut, fmt.Sprint("/large/group/", n%10), fmt.Sprintf("changes{push=\"%d\"} 1\n", n)+large.String())
		s.push(http.MethodPut, "/small", fmt.Sprintf("small %d\n", n))
		if n%25 == 24 {
			s.expectAfterCrash(fmt.Sprint("push ", n))
		}
	}
}

func TestDamagedLog(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "push.db"))
	for n := range 5 {
		s.push(http.MethodPut, "/a", fmt.Sprintf("a{n=\"%d\"} 1\n", n))
	}
	path := s.crashed()
	content, err := os.ReadFile(path + ".log0")
	if err != nil {
		t.Fatal(err)
	}
	content[600] ^= 1 // of the second change
	if err := os.WriteFile(path+".log0", content, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := boltstore.Open(path, nil); !errors.Is(err, boltstore.ErrDamaged) || !strings.Contains(err.Error(), "push.db.log0") {
		t.Errorf("got %v, want ErrDamaged and the file", err)
	}
	if now, err := os.ReadFile(path + ".log0"); err != nil || !bytes.Equal(now, content) {
		t.Errorf("the log was changed: %v", err)
	}

	// Without its database the log says nothing; it is moved away, not overwritten.
	if err := os.Rename(path, path+".damaged"); err != nil {
		t.Fatal(err)
	}
	again := open(t, path)
	again.push(http.MethodPut, "/b", "b 1\n")
	again.expectAfterCrash("a new database")
	kept, err := filepath.Glob(path + ".log0.of-*")
	if err != nil || len(kept) != 1 {
		t.Fatalf("the log was kept as %q, %v", kept, err)
	}
	if now, err := os.ReadFile(kept[0]); err != nil || !bytes.Equal(now, content) {
		t.Errorf("the log that was moved away was changed: %v", err)
	}
}
