package gateway_test

import (
	"context"
	"log/slog"
	"maps"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/culvert-io/culvert/gateway"
)

// gated is a server whose writes wait for pass. It runs in a bubble.
type gated struct {
	server
	backend *stored
	clock   *clock
}

// withGate runs f in a bubble, with a server whose backend is what wrap makes of a
// *stored.
func withGate(t *testing.T, wrap func(*stored) gateway.Backend, f func(t *testing.T, s gated)) {
	synctest.Test(t, func(t *testing.T) {
		backend, c := newStored(), newClock()
		backend.gate = make(chan struct{})
		f(t, gated{start(t, gateway.StoreConfig{Now: c.now}, wrap(backend)), backend, c})
	})
}

func asIs(b *stored) gateway.Backend { return b }

// send sends a request and returns when it waits, or is answered.
func (s gated) send(method, path, body string, header ...string) <-chan *httptest.ResponseRecorder {
	answer := make(chan *httptest.ResponseRecorder, 1)
	go func() { answer <- s.do(method, path, body, header...) }()
	synctest.Wait()
	return answer
}

// pass lets one write end, and returns when all wait again.
func (s gated) pass(succeeds bool) {
	s.backend.fails.Store(!succeeds)
	s.backend.gate <- struct{}{}
	synctest.Wait()
}

func (s gated) wantAnswer(answer <-chan *httptest.ResponseRecorder, status int, word string) {
	s.t.Helper()
	select {
	case w := <-answer:
		if w.Code != status || !strings.Contains(w.Body.String(), word) {
			s.t.Errorf("got %d %s, want %d %s", w.Code, w.Body, status, word)
		}
	default:
		s.t.Errorf("there is no answer, want %d", status)
	}
}

func (s gated) wantNone(answer <-chan *httptest.ResponseRecorder) {
	s.t.Helper()
	select {
	case w := <-answer:
		s.t.Errorf("got %d %s while it should wait", w.Code, w.Body)
	default:
	}
}

// stored pushes and waits until that is stored.
func (s gated) stored(path, body string) {
	s.t.Helper()
	answer := s.send("PUT", path, body)
	s.pass(true)
	s.wantAnswer(answer, 200, "")
}

// Where a write fails, what was made on top of it meanwhile is undone with it.
func TestFailedWriteUndoesWhatWaits(t *testing.T) {
	withGate(t, asIs, func(t *testing.T, s gated) {
		s.stored("/kept", "m 1\nn 1\n")
		s.stored("/deleted", "m 1\n")
		s.clock.advance(time.Second)
		samples, records := s.samples(true), maps.Clone(s.backend.records)

		answers := []<-chan *httptest.ResponseRecorder{s.send("PUT", "/kept", "m 2\nn 2\n")}
		for _, r := range [][3]string{
			{"PUT", "/kept", "m 3\nn 3\n"}, {"POST", "/kept", "n{x=\"1\"} 4\n"}, {"PUT", "/new", "m 1\n"}, {"DELETE", "/deleted", ""},
			{"PUT", "/deleted", "other 1\n"}, {"DELETE", "/new", ""}, {"PUT", "/new", "m 2\n"}, {"PUT", "/refused", "m 1 1\n"},
			{"PUT", "/short?ttl=1m", "m 5\n"}, {"PUT", "/kept?interval=1h", "m 6\n"},
		} {
			answers = append(answers, s.send(r[0], r[1], r[2]))
		}
		s.expect(`m{instance="",job="kept"} 6`, `m{instance="",job="new"} 2`, `m{instance="",job="short"} 5`, `other{instance="",job="deleted"} 1`)
		for _, answer := range answers {
			s.wantNone(answer)
		}
		s.pass(false)
		for _, answer := range answers {
			s.wantAnswer(answer, 503, "disk full")
		}
		if got := s.samples(true); got != samples {
			t.Errorf("got\n%s\nwant\n%s", got, samples)
		}
		if !maps.EqualFunc(records, s.backend.records, func(a, b []byte) bool { return string(a) == string(b) }) {
			t.Errorf("stored is %q, and was %q", s.backend.records, records)
		}
		s.wantAnswer(s.send("PUT", "/kept", "m 7\n"), 503, "disk full")

		s.backend.fails.Store(false)
		time.Sleep(time.Minute) // of the bubble's clock: until the store has tried
		s.stored("/kept", "m 8\nn 8\n")
		s.stored("/new", "m 9\n")
		s.expect(`m{instance="",job="deleted"} 1`, `m{instance="",job="kept"} 8`, `m{instance="",job="new"} 9`, `n{instance="",job="kept"} 8`)
		restarted := newStored()
		restarted.records = s.backend.records
		again := start(t, gateway.StoreConfig{Now: s.clock.now}, restarted)
		if got, want := again.samples(true), s.samples(true); got != want {
			t.Errorf("after a restart: got\n%s\nwant\n%s", got, want)
		}
	})
}

// A group may expire before its push is stored.
func TestExpiryBeforeAFailedWrite(t *testing.T) {
	withGate(t, asIs, func(t *testing.T, s gated) {
		s.stored("/old?ttl=1m", "m 1\n")
		first := s.send("PUT", "/j", "m 1\n")
		created, repeated := s.send("PUT", "/short?ttl=1s", "m 1\n"), s.send("PUT", "/old?ttl=1s", "m 2\n")
		s.clock.advance(2 * time.Minute)
		s.pass(true)
		s.wantAnswer(first, 200, "")
		s.expect(`m{instance="",job="j"} 1`)
		s.pass(false)
		s.wantAnswer(created, 503, "")
		s.wantAnswer(repeated, 503, "")
		s.pass(true) // the old group expires once more
		time.Sleep(time.Minute)
		s.expect(`m{instance="",job="j"} 1`)
		s.stored("/short", "m 3\n")
		s.stored("/old", "m 4\n")
		s.expect(`m{instance="",job="j"} 1`, `m{instance="",job="old"} 4`, `m{instance="",job="short"} 3`)
	})
}

// What repeats a push that is not stored yet is answered as that is, and not before it.
func TestPushIDInFlight(t *testing.T) {
	const path, body = "/j?aggregate=sum", "# TYPE c counter\nc 1\n"
	for name, succeeds := range map[string]bool{"stored": true, "not stored": false} {
		t.Run(name, func(t *testing.T) {
			withGate(t, asIs, func(t *testing.T, s gated) {
				send := func(id string) <-chan *httptest.ResponseRecorder {
					return s.send("POST", path, body, gateway.HeaderPushID, spoolA+id)
				}
				first, again := send("/5"), send("/5")
				s.wantNone(first)
				s.wantNone(again)
				s.pass(succeeds)
				for answer, repeated := range map[<-chan *httptest.ResponseRecorder]string{first: "", again: "true"} {
					status, seq := 200, "5"
					if !succeeds {
						status, repeated, seq = 503, "", "0"
					}
					w := <-answer
					if w.Code != status || w.Header().Get(gateway.HeaderPushRepeated) != repeated || w.Header().Get(gateway.HeaderPushSeq) != seq {
						t.Errorf("got %d %v", w.Code, w.Header())
					}
				}
				if succeeds {
					s.expect(`c{instance="",job="j"} 1`)
					return
				}
				s.expect()
				s.backend.fails.Store(false)
				time.Sleep(time.Minute)
				third := send("/5")
				s.pass(true)
				if w := <-third; w.Code != 200 || w.Header().Get(gateway.HeaderPushRepeated) != "" {
					t.Errorf("got %d %v", w.Code, w.Header())
				}
				s.expect(`c{instance="",job="j"} 1`)
			})
		})
	}
}

// A store that is stopped stores what it has taken, answers that, and takes no more.
func TestStopWithWritesInFlight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		backend := newStored()
		backend.gate = make(chan struct{})
		store, err := gateway.OpenStore(gateway.StoreConfig{Logger: slog.New(slog.DiscardHandler)}, backend)
		if err != nil {
			t.Fatal(err)
		}
		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- store.Run(ctx) }()
		s := gated{server: server{t, gateway.New(gateway.Config{}, store), store}, backend: backend}
		inFlight, waits := s.send("PUT", "/a", "m 1\n"), s.send("PUT", "/b", "m 2\n")
		stop()
		synctest.Wait()
		s.wantNone(inFlight)
		s.pass(true)
		s.wantAnswer(inFlight, 200, "")
		s.wantNone(waits)
		s.wantAnswer(s.send("PUT", "/c", "m 3\n"), 503, "closed")
		s.pass(true)
		s.wantAnswer(waits, 200, "")
		if err := <-ended; err != nil {
			t.Error(err)
		}
		s.wantAnswer(s.send("PUT", "/c", "m 3\n"), 503, "closed")
		again := newStored()
		again.records = backend.records
		start(t, gateway.StoreConfig{}, again).expect(`m{instance="",job="a"} 1`, `m{instance="",job="b"} 2`)
	})
}

type inTurn struct{ *stored }

func (inTurn) InTurn() bool { return true }

// A backend that wants changes in turn gets none that was made of what is not stored.
func TestInTurn(t *testing.T) {
	withGate(t, func(b *stored) gateway.Backend { return inTurn{b} }, func(t *testing.T, s gated) {
		first := s.send("PUT", "/j", "m 1\n")
		s.expect(`m{instance="",job="j"} 1`)
		second, third := s.send("POST", "/j", "n 1\n"), s.send("PUT", "/k", "m 1\n")
		s.expect(`m{instance="",job="j"} 1`)
		s.pass(true)
		s.wantAnswer(first, 200, "")
		s.wantNone(second)
		s.expect(`m{instance="",job="j"} 1`, `m{instance="",job="k"} 1`, `n{instance="",job="j"} 1`)
		fourth := s.send("DELETE", "/k", "")
		s.pass(false)
		for _, answer := range []<-chan *httptest.ResponseRecorder{second, third, fourth} {
			s.wantAnswer(answer, 503, "")
		}
		s.expect(`m{instance="",job="j"} 1`)
		if got := strings.Count(s.samples(true), "push_time_seconds"); got != 1 {
			t.Errorf("there are %d groups", got)
		}
		s.backend.fails.Store(false)
	})
}
