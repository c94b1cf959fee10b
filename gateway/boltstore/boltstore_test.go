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

	bolt "go.etcd.io/bbolt"

	"github.com/culvert-io/culvert/gateway"
	"github.com/culvert-io/culvert/gateway/boltstore"
)

// store is a push store in files.
type store struct {
	t    *testing.T
	path string
	*gateway.Gateway
	stop   func()
	spools map[string]uint64 // the last number of each that was made
	sent   map[string]uint64 // and that was sent
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
	s := &store{t: t, path: path, Gateway: gateway.New(gateway.Config{}, groups), spools: map[string]uint64{}, sent: map[string]uint64{}}
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
	if w := s.send(method, path, body, ""); w.Code/100 != 2 {
		s.t.Errorf("%s %s: %d %s", method, path, w.Code, w.Body)
	}
}

// send makes a request, with an ID where that is not empty.
func (s *store) send(method, path, body, id string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(method, "/metrics/job"+path, strings.NewReader(body))
	if id != "" {
		r.Header.Set(gateway.HeaderPushID, id)
	}
	rest, _, _ := strings.Cut(path, "?")
	w := httptest.NewRecorder()
	if method == http.MethodDelete {
		s.ServeDelete(w, r, rest)
	} else {
		s.ServePush(w, r, rest)
	}
	return w
}

// pushOnce makes the next request of a spool, and checks the status.
func (s *store) pushOnce(spool, method, path, body string, status int) {
	s.t.Helper()
	s.sent[spool]++
	if status/100 == 2 {
		s.spools[spool] = s.sent[spool]
	}
	if w := s.send(method, path, body, fmt.Sprintf("%s/%d", spool, s.sent[spool])); w.Code != status || w.Header().Get(gateway.HeaderPushRepeated) != "" {
		s.t.Errorf("%s %s: %d %v %s", method, path, w.Code, w.Header(), w.Body)
	}
}

// expectSpools checks how far the spools are, by requests that change nothing, unless
// they do wrongly.
func (s *store) expectSpools(spools map[string]uint64) {
	s.t.Helper()
	for spool, seq := range spools {
		for repeated := max(seq, 2) - 1; repeated <= seq; repeated++ {
			w := s.send(http.MethodPost, "/wrong", "wrong 1\n", fmt.Sprintf("%s/%d", spool, repeated))
			if w.Header().Get(gateway.HeaderPushRepeated) != "true" || w.Header().Get(gateway.HeaderPushSeq) != fmt.Sprint(seq) {
				s.t.Errorf("spool %s: push %d of %d was answered %d %v", spool, repeated, seq, w.Code, w.Header())
			}
		}
	}
}

func (s *store) exposition() string {
	w := httptest.NewRecorder()
	gateway.ServeMetrics(s.Gateway, w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
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

// expectAfterCrash compares the exposition and the spools with those after a crash, and
// after that with those after an orderly end.
func (s *store) expectAfterCrash(what string) {
	s.t.Helper()
	want := s.exposition()
	path := s.crashed()
	for _, end := range []string{"a crash", "an orderly end"} {
		again := open(s.t, path)
		again.expectSpools(s.spools)
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

// What a push with an ID changed, and that it did, are there after a crash together.
func TestCrashWithIDs(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "push.db"))
	const a, b = "spool-a_0123456789", "spool-b_0123456789"
	for _, p := range []struct {
		spool, method, path, body string
		status                    int
	}{
		{a, "POST", "/sum?aggregate=sum", "# TYPE c counter\nc 1\n", 200},
		{b, "POST", "/sum?aggregate=sum", "# TYPE c counter\nc 1\n", 200},
		{a, "POST", "/sum?aggregate=sum", "# TYPE c counter\nc 1\n", 200},
		{a, "PUT", "/plain", "m 1\n", 200},
		{a, "PUT", "/plain", "m 2\n", 200},   // other values
		{a, "PUT", "/plain", "m 3 3\n", 400}, // refused, and its failure time set
		{b, "DELETE", "/nobody", "", 202},    // nothing but the mark
		{b, "DELETE", "/plain", "", 202},
		{a, "POST", "/sum?aggregate=sum", "# TYPE c counter\nc 1\n", 200},
	} {
		s.pushOnce(p.spool, p.method, p.path, p.body, p.status)
		s.expectAfterCrash(p.method + " " + p.path + " " + p.body)
	}
	if got := s.exposition(); !strings.Contains(got, "c{instance=\"\",job=\"sum\"} 4\n") {
		t.Errorf("got\n%s", got)
	}
}

// A file that was written when there were no spools yet gets them.
func TestFileWithoutSpools(t *testing.T) {
	path := filepath.Join(t.TempDir(), "push.db")
	s := open(t, path)
	s.push("PUT", "/a", "m 1\n")
	s.stop()
	change(t, path, func(tx *bolt.Tx) error { return tx.DeleteBucket([]byte("spools")) })
	s = open(t, path)
	s.pushOnce("spool-a_0123456789", "PUT", "/b", "m 1\n", 200)
	s.expectAfterCrash("the first push with an ID")
}

// A mark that was changed or lost would let a push be made twice.
func TestDamagedSpools(t *testing.T) {
	path := filepath.Join(t.TempDir(), "push.db")
	s := open(t, path)
	s.pushOnce("spool-a_0123456789", "PUT", "/a", "m 1\n", 200)
	s.pushOnce("spool-b_0123456789", "PUT", "/a", "m 1\n", 200)
	s.stop()
	for what, damage := range map[string]func(b *bolt.Bucket) error{
		"spool-a_0123456789": func(b *bolt.Bucket) error {
			value := bytes.Clone(b.Get([]byte("spool-a_0123456789")))
			value[len(value)/2] ^= 1
			return b.Put([]byte("spool-a_0123456789"), value)
		},
		"another name": func(b *bolt.Bucket) error {
			value := bytes.Clone(b.Get([]byte("spool-a_0123456789")))
			return b.Put([]byte("spool-b_0123456789"), value)
		},
		"1 spools": func(b *bolt.Bucket) error { return b.Delete([]byte("spool-a_0123456789")) },
	} {
		damaged := s.crashed()
		change(t, damaged, func(tx *bolt.Tx) error { return damage(tx.Bucket([]byte("spools"))) })
		if _, err := boltstore.Open(damaged, nil); !errors.Is(err, boltstore.ErrDamaged) || !strings.Contains(err.Error(), what) {
			t.Errorf("got %v, want ErrDamaged and %q", err, what)
		}
	}
}

// change changes a database behind the store's back.
func change(t *testing.T, path string, f func(*bolt.Tx) error) {
	t.Helper()
	db, err := bolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(db.Update(f), db.Close()); err != nil {
		t.Fatal(err)
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
		// Some spools push once, others again and again.
		s.pushOnce(fmt.Sprintf("spool-%012d", n), http.MethodPost, "/sum?aggregate=sum", "# TYPE c counter\nc 1\n", http.StatusOK)
		s.pushOnce(fmt.Sprintf("spool-often-%d-of-3", n%3), http.MethodPost, "/sum?aggregate=sum", "# TYPE c counter\nc 1\n", http.StatusOK)
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
