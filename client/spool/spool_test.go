package spool_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/culvert-io/culvert/client/spool"
	"github.com/culvert-io/culvert/gateway/boltstore"
)

// childName, where it is set, makes the test binary append to the spool of that path.
const childName, childStart = "SPOOL_TEST_CHILD", "SPOOL_TEST_START"

func TestMain(m *testing.M) {
	if path := os.Getenv(childName); path != "" {
		appendForever(path)
		return
	}
	goleak.VerifyTestMain(m)
}

// testSpool is a spool that runs.
type testSpool struct {
	*spool.Spool
	t     *testing.T
	close func()
}

func open(t *testing.T, path string, maxBytes int64, proxies ...string) *testSpool {
	t.Helper()
	s, err := spool.Open(path, spool.Config{MaxBytes: maxBytes, Logger: slog.New(slog.NewTextHandler(t.Output(), nil))})
	if err != nil {
		t.Fatal(err)
	}
	if len(proxies) > 0 {
		s.Configure(maxBytes, proxies...)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	closing := sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run returned %v", err)
		}
	})
	t.Cleanup(closing)
	return &testSpool{s, t, closing}
}

// push is the n-th push of a test, with a body of some size.
func push(n, size int) *spool.Push {
	return &spool.Push{
		Received: time.Unix(1700000000+int64(n), int64(n)), Method: http.MethodPost, Target: fmt.Sprintf("/metrics/job/%d?ttl=1h", n),
		Header: http.Header{"Content-Type": {"text/plain"}, "Culvert-Interval": {"5m"}}, Body: []byte(strings.Repeat("x", size)),
	}
}

func (s *testSpool) add(n, size int) {
	s.t.Helper()
	if err := s.Append(s.t.Context(), push(n, size)); err != nil {
		s.t.Fatalf("push %d: %v", n, err)
	}
}

func (s *testSpool) cursor(name string) *spool.Cursor {
	s.t.Helper()
	c, err := s.Cursor(name)
	if err != nil {
		s.t.Fatal(err)
	}
	return c
}

// waiting returns the numbers of the pushes that a cursor has yet to pass, by their
// targets, and takes the first of them.
func (s *testSpool) waiting(name string, take int) (numbers []int) {
	s.t.Helper()
	c := s.cursor(name)
	last := uint64(0)
	for range s.Stats().Cursors[name].Pushes {
		if len(numbers) == take {
			break
		}
		p, err := c.Next(s.t.Context())
		if err != nil {
			s.t.Fatal(err)
		}
		if p.Seq <= last {
			s.t.Fatalf("push %d comes after %d", p.Seq, last)
		}
		last = p.Seq
		n, _ := strconv.Atoi(strings.TrimSuffix(strings.TrimPrefix(p.Target, "/metrics/job/"), "?ttl=1h"))
		numbers = append(numbers, n)
		c.Done(p.Seq)
	}
	return numbers
}

func sequence(from, to int) (numbers []int) {
	for n := from; n <= to; n++ {
		numbers = append(numbers, n)
	}
	return numbers
}

func (s *testSpool) want(name string, take int, want []int) {
	s.t.Helper()
	if got := s.waiting(name, take); !slices.Equal(got, want) {
		s.t.Errorf("%s gets %v, want %v", name, got, want)
	}
}

// Pushes come out as they went in, in order, once for each proxy, over restarts.
func TestOrder(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "spool.db")
	s := open(t, path, 0, "a", "b")
	id := s.ID()
	for n := 1; n <= 1000; n++ {
		s.add(n, n%50)
	}
	first, err := s.cursor("a").Next(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	want := push(1, 1)
	if first.Method != want.Method || first.Target != want.Target || string(first.Body) != string(want.Body) || !first.Received.Equal(want.Received) ||
		first.Header.Get("Content-Type") != "text/plain" || first.Header.Get("Culvert-Interval") != "5m" || len(first.Header) != 2 {
		t.Errorf("got %+v, want %+v", first, want)
	}
	s.want("a", 400, sequence(1, 400))
	s.want("b", 100, sequence(1, 100))
	s.close()

	s = open(t, path, 0)
	if s.ID() != id || id == "" {
		t.Errorf("the ID is %q after a restart, was %q", s.ID(), id)
	}
	s.Configure(0, "a", "b")
	s.add(1001, 0)
	s.want("a", -1, sequence(401, 1001))
	if n := s.Stats().Cursors["b"]; n.Pushes != 901 || !n.Oldest.Equal(push(101, 0).Received) {
		t.Errorf("b has yet to get %+v", n)
	}
	// A proxy that is new gets what is there; one that is gone is forgotten.
	s.Configure(0, "a", "c")
	s.want("c", 1, sequence(101, 101))
	if _, err := s.Cursor("b"); !errors.Is(err, spool.ErrNoCursor) {
		t.Errorf("the cursor of b: %v", err)
	}
	s.close()
	s = open(t, path, 0, "a", "b", "c")
	s.want("b", -1, sequence(102, 1001))
	s.want("a", -1, nil)
	s.want("c", -1, sequence(102, 1001))
	if got := s.Stats().Bytes; got != 0 {
		t.Errorf("there are %d bytes once everybody has all", got)
	}
}

// Next waits for a push, and for the end.
func TestNextWaits(t *testing.T) {
	t.Parallel()
	s := open(t, filepath.Join(t.TempDir(), "spool.db"), 0, "a", "b")
	got := make(chan error)
	next := func(c *spool.Cursor) { _, err := c.Next(t.Context()); got <- err }
	c := s.cursor("a")
	go next(c)
	s.add(1, 1)
	if err := <-got; err != nil {
		t.Error(err)
	}
	c.Done(^uint64(0) >> 1)
	b := s.cursor("b")
	s.want("b", -1, sequence(1, 1))
	go next(b)
	s.Configure(0, "a")
	if err := <-got; !errors.Is(err, spool.ErrNoCursor) {
		t.Errorf("Next of a cursor that is dropped: %v", err)
	}
	c = s.cursor("a")
	go next(c)
	s.close()
	if err := <-got; err == nil {
		t.Error("Next of a spool that is closed returns a push")
	}
	if err := s.Append(t.Context(), push(2, 1)); !errors.Is(err, spool.ErrUnavailable) {
		t.Errorf("Append to a spool that is closed: %v", err)
	}
}

// When the spool is full, first what only a proxy lacks that is away goes; then new
// pushes are refused.
func TestFull(t *testing.T) {
	t.Parallel()
	const size, most = 1000, 20_000
	const fits = 16
	for _, test := range []struct {
		name    string
		taken   map[string]int // of the first pushes, as many as fit
		away    []string
		keepsUp string // takes all that comes from then on
		more    int    // pushes beyond that are taken, or tried where somebody keeps up
		left    map[string][]int
		trimmed map[string]uint64
	}{
		{"nobody took anything", map[string]int{"a": 0, "b": 0}, []string{"a", "b"}, "", 0,
			map[string][]int{"a": sequence(1, 16), "b": sequence(1, 16)}, nil},
		{"all took some", map[string]int{"a": 3, "b": 3}, []string{"a", "b"}, "", 3,
			map[string][]int{"a": sequence(4, 19), "b": sequence(4, 19)}, nil},
		{"one is away", map[string]int{"a": 16, "b": 0}, []string{"b"}, "a", 50,
			map[string][]int{"a": nil, "b": sequence(51, 66)}, map[string]uint64{"b": 50}},
		{"one is away, and the other stops too", map[string]int{"a": 5, "b": 2}, []string{"a", "b"}, "", 5,
			map[string][]int{"a": sequence(6, 21), "b": sequence(6, 21)}, map[string]uint64{"b": 3}},
		{"one is slow", map[string]int{"a": 16, "b": 2}, nil, "", 2,
			map[string][]int{"a": sequence(17, 18), "b": sequence(3, 18)}, nil},
		{"one is slow, and another away", map[string]int{"a": 16, "b": 4, "c": 0}, []string{"c"}, "", 4,
			map[string][]int{"a": sequence(17, 20), "b": sequence(5, 20), "c": sequence(5, 20)}, map[string]uint64{"c": 4}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(t.TempDir(), "spool.db")
			names := slices.Collect(maps.Keys(test.taken))
			s := open(t, path, most, names...)
			for n := 1; n <= fits; n++ {
				s.add(n, size)
			}
			for name, n := range test.taken {
				s.cursor(name).SetAway(slices.Contains(test.away, name))
				s.waiting(name, n)
			}
			more := 0
			for ; test.keepsUp == "" || more < test.more; more++ {
				err := s.Append(t.Context(), push(fits+more+1, size))
				if errors.Is(err, spool.ErrFull) && strings.Contains(err.Error(), "--push.spool-max-bytes") {
					break
				}
				if err != nil {
					t.Fatal(err)
				}
				if test.keepsUp != "" {
					s.waiting(test.keepsUp, -1)
				}
			}
			if more != test.more {
				t.Errorf("%d pushes beyond the full spool were taken, want %d", more, test.more)
			}
			stats := s.Stats()
			if stats.Bytes > most {
				t.Errorf("there are %d bytes", stats.Bytes)
			}
			for name, c := range stats.Cursors {
				if c.Trimmed != test.trimmed[name] {
					t.Errorf("of %s %d were trimmed, want %d", name, c.Trimmed, test.trimmed[name])
				}
			}
			s.close()
			s = open(t, path, most, names...)
			for name, want := range test.left {
				s.want(name, -1, want)
			}
		})
	}
}

// A push that is larger than the spool never has room.
func TestTooLarge(t *testing.T) {
	t.Parallel()
	s := open(t, filepath.Join(t.TempDir(), "spool.db"), 1000, "a")
	if err := s.Append(t.Context(), push(1, 1001)); !errors.Is(err, spool.ErrTooLarge) {
		t.Errorf("got %v", err)
	}
	s.add(2, 700)
	if err := s.Append(t.Context(), push(3, 700)); !errors.Is(err, spool.ErrFull) {
		t.Errorf("got %v", err)
	}
	s.Configure(2000, "a")
	s.add(4, 700)
	if n := s.Stats().Refused; n != 2 {
		t.Errorf("%d are counted as refused, want 2", n)
	}
}

// A file that a long outage made large is replaced once it is empty; nothing gets lost on
// the way.
func TestRenew(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "spool.db")
	s := open(t, path, 0, "a", "b")
	id := s.ID()
	size := func() int64 {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		return info.Size()
	}
	n := 0
	for ; n < 50; n++ {
		s.add(n+1, 1<<20)
	}
	large := size()
	s.want("a", -1, sequence(1, 50))
	s.want("b", -1, sequence(1, 50))
	for deadline := time.Now().Add(30 * time.Second); size() > large/2; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("the file has %d bytes, had %d", size(), large)
		}
		n++
		s.add(n, 10) // a commit, at least
		s.want("a", -1, []int{n})
		s.want("b", -1, []int{n})
	}
	for i := range 10 {
		s.add(n+1+i, 10)
	}
	s.want("a", -1, sequence(n+1, n+10))
	if _, err := spool.Open(path, spool.Config{}); !errors.Is(err, boltstore.ErrInUse) {
		t.Errorf("opened twice: %v", err)
	}
	s.close()
	s = open(t, path, 0, "a", "b")
	if s.ID() != id {
		t.Errorf("the ID is %q, was %q", s.ID(), id)
	}
	s.want("a", -1, nil)
	s.want("b", -1, sequence(n+1, n+10))
}

// appendForever appends until it is killed, eight at a time, and writes the numbers of
// the pushes that were acknowledged. The proxy "a" takes all, "b" nothing.
func appendForever(path string) {
	ctx := context.Background()
	s, err := spool.Open(path, spool.Config{})
	if err != nil {
		panic(err)
	}
	s.Configure(0, "a", "b")
	go s.Run(ctx)
	go func() {
		a, err := s.Cursor("a")
		for err == nil {
			var p *spool.Push
			if p, err = a.Next(ctx); err == nil {
				a.Done(p.Seq)
			}
		}
		panic(err)
	}()
	start, _ := strconv.Atoi(os.Getenv(childStart))
	for n := start; ; n += 8 {
		var all sync.WaitGroup
		for i := range 8 {
			all.Go(func() {
				if err := s.Append(ctx, push(n+i, (n+i)%3000)); err != nil {
					panic(err)
				}
			})
		}
		all.Wait()
		fmt.Println(n)
	}
}

// A kill -9 loses no push that was acknowledged, and mixes none up.
func TestKill(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "spool.db")
	var acknowledged []int // the first of each eight
	id, next := "", 0
	for round := range 6 {
		child := exec.Command(os.Args[0])
		child.Env = append(os.Environ(), childName+"="+path, childStart+"="+strconv.Itoa(next))
		child.Stderr = t.Output()
		out, err := child.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := child.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		for count := 0; lines.Scan(); count++ {
			n, err := strconv.Atoi(lines.Text())
			if err != nil {
				t.Fatal(err)
			}
			acknowledged = append(acknowledged, n)
			if count == 10+round*7 {
				child.Process.Kill()
			}
		}
		child.Wait()
		next = acknowledged[len(acknowledged)-1] + 80 // beyond what was not acknowledged

		s := open(t, path, 0)
		if id == "" {
			id = s.ID()
		}
		if s.ID() != id {
			t.Errorf("round %d: the ID is %q, was %q", round, s.ID(), id)
		}
		s.close()
	}
	s := open(t, path, 0, "a", "b")
	forA, forB := s.waiting("a", -1), s.waiting("b", -1)
	for i, n := range forB {
		if i > 0 && forB[i-1]/8 > n/8 {
			t.Errorf("push %d comes after %d", n, forB[i-1])
		}
	}
	if len(forA) > len(forB) || !slices.Equal(forA, forB[len(forB)-len(forA):]) {
		t.Errorf("a gets %v, which is not the end of %v", forA, forB)
	}
	slices.Sort(forB)
	for _, first := range acknowledged {
		for n := first; n < first+8; n++ {
			if _, ok := slices.BinarySearch(forB, n); !ok {
				t.Errorf("push %d is missing", n)
			}
		}
	}
	if extra := len(forB) - 8*len(acknowledged); extra < 0 || extra > 6*8 {
		t.Errorf("there are %d pushes, %d were acknowledged", len(forB), 8*len(acknowledged))
	}
}

// A damaged file is told of, and left as it is.
func TestDamage(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "spool.db")
	s := open(t, path, 0, "a")
	for n := range 200 {
		s.add(n, 1000)
	}
	if _, err := spool.Open(path, spool.Config{}); !errors.Is(err, boltstore.ErrInUse) {
		t.Errorf("opened twice: %v", err)
	}
	s.close()
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	at := func(offset int) func([]byte) []byte {
		return func(b []byte) []byte { b[offset] ^= 0x40; return b }
	}
	body := strings.Index(string(whole), "xxxxxxxxxx")
	for name, damage := range map[string]func([]byte) []byte{
		"a bit of a body":   at(body + 5),
		"a bit of a target": at(strings.Index(string(whole), "/metrics/job/") + 3),
		"cut short":         func(b []byte) []byte { return b[:len(b)/2] },
		"cut to nothing":    func(b []byte) []byte { return b[:100] },
		"both metas":        func(b []byte) []byte { clear(b[:8192]); return b },
		"no bbolt":          func(b []byte) []byte { return []byte(strings.Repeat("hello ", 10000)) },
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "spool.db")
			damaged := damage(slices.Clone(whole))
			if err := os.WriteFile(path, damaged, 0o600); err != nil {
				t.Fatal(err)
			}
			_, err := spool.Open(path, spool.Config{})
			if !errors.Is(err, boltstore.ErrDamaged) || !strings.Contains(err.Error(), path) {
				t.Errorf("got %v", err)
			}
			if after, err := os.ReadFile(path); err != nil || !slices.Equal(after, damaged) {
				t.Errorf("the file was changed (%v)", err)
			}
		})
	}
}

// Many appended one by one, and many at a time.
func BenchmarkAppend(b *testing.B) {
	for _, writers := range []int{1, 64} {
		b.Run(fmt.Sprint(writers), func(b *testing.B) {
			s, err := spool.Open(filepath.Join(b.TempDir(), "spool.db"), spool.Config{})
			if err != nil {
				b.Fatal(err)
			}
			s.Configure(0, "a")
			ctx, cancel := context.WithCancel(context.Background())
			ended := make(chan error, 1)
			go func() { ended <- s.Run(ctx) }()
			b.SetParallelism(writers)
			b.ResetTimer()
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					if err := s.Append(ctx, push(1, 500)); err != nil {
						b.Error(err)
					}
				}
			})
			b.StopTimer()
			cancel()
			<-ended
		})
	}
}
