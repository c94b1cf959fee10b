package gateway_test

import (
	"errors"
	"fmt"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/culvert-io/culvert/gateway"
	"github.com/culvert-io/culvert/gateway/boltstore"
)

const spoolA, spoolB = "spool-a_0123456789", "spool-b_0123456789"

// request is one with a push ID: a batch where the path starts with "?".
type request struct {
	method, path, body, id string
	status                 int
	repeated               bool
	seq                    string // that the answer tells
}

func (s server) expectAnswer(r request, header ...string) string {
	s.t.Helper()
	header = append(header, gateway.HeaderPushID, r.id)
	var w *httptest.ResponseRecorder
	if strings.HasPrefix(r.path, "?") {
		req := httptest.NewRequest(r.method, "/api/v1/push"+r.path, strings.NewReader(r.body))
		for i := 0; i < len(header); i += 2 {
			req.Header.Set(header[i], header[i+1])
		}
		w = httptest.NewRecorder()
		s.ServeBatch(w, req)
	} else {
		w = s.do(r.method, r.path, r.body, header...)
	}
	repeated := ""
	if r.repeated {
		repeated = "true"
	}
	if w.Code != r.status || w.Header().Get(gateway.HeaderPushRepeated) != repeated || w.Header().Get(gateway.HeaderPushSeq) != r.seq {
		s.t.Errorf("%s %s %s: got %d, %s %q, %s %q, want %d, %q, %q: %s", r.id, r.method, r.path, w.Code,
			gateway.HeaderPushRepeated, w.Header().Get(gateway.HeaderPushRepeated), gateway.HeaderPushSeq, w.Header().Get(gateway.HeaderPushSeq),
			r.status, repeated, r.seq, w.Body)
	}
	return w.Body.String()
}

// TestPushID is the header field itself: what is malformed is refused on each route.
func TestPushID(t *testing.T) {
	s := start(t, gateway.StoreConfig{}, gateway.Memory())
	for id, word := range map[string]string{
		"":                              "slash",
		spoolA:                          "slash",
		"/1":                            "0 characters",
		"0123456789abcde/1":             "15 characters",
		"0123456789abcdef/1":            "",
		strings.Repeat("x", 64) + "/1":  "",
		strings.Repeat("x", 65) + "/1":  "65 characters",
		"0123456789abcde./1":            "letters",
		"0123456789abcdeä/1":            "letters",
		"0123456 89abcdef/1":            "letters",
		spoolA + "/":                    "decimal",
		spoolA + "/0":                   "decimal",
		spoolA + "/-1":                  "decimal",
		spoolA + "/+1":                  "decimal",
		spoolA + "/0x1":                 "decimal",
		spoolA + "/1_0":                 "decimal",
		spoolA + "/1.0":                 "decimal",
		spoolA + "/1/2":                 "decimal",
		spoolA + "/ 1":                  "decimal",
		spoolA + "/9223372036854775807": "",
		spoolA + "/9223372036854775808": "decimal",
	} {
		status, deleted, seq := 400, 400, ""
		if word == "" {
			_, seq, _ = strings.Cut(id, "/")
			status, deleted = 200, 202
		}
		for _, r := range []request{
			{"PUT", "/j", "m 1\n", id, status, false, seq},
			{"POST", "/j", "m 1\n", id, status, word == "", seq},
			{"DELETE", "/j", "", id, deleted, word == "", seq},
			{"PUT", "?group_by=job", "m{job=\"j\"} 1\n", id, status, word == "", seq},
		} {
			if body := s.expectAnswer(r); word != "" {
				wantWords(t, body, gateway.HeaderPushID, fmt.Sprintf("%q", id), word)
			}
		}
	}
	r := httptest.NewRequest("PUT", "/metrics/job/j", strings.NewReader("m 1\n"))
	r.Header[gateway.HeaderPushID] = []string{spoolA + "/1", spoolB + "/1"}
	w := httptest.NewRecorder()
	s.ServePush(w, r, "/j")
	if w.Code != 400 {
		t.Errorf("two IDs: got %d %s", w.Code, w.Body)
	}
	wantWords(t, w.Body.String(), "more than once")
	if w := s.do("PUT", "/j", "m 1\n"); w.Header().Get(gateway.HeaderPushSeq) != "" {
		t.Errorf("an answer without an ID has %s", gateway.HeaderPushSeq)
	}
}

// What is sent again changes nothing.
func TestPushOnce(t *testing.T) {
	c := newClock()
	s := start(t, gateway.StoreConfig{Now: c.now, MaxGroups: 3, MaxSeriesPerGroup: 2}, gateway.Memory())
	const sum = "/j?aggregate=sum"
	for _, r := range []struct {
		request
		want string // the samples
	}{
		{request{"POST", sum, "# TYPE c counter\nc 1\n", spoolA + "/1", 200, false, "1"}, `c{instance="",job="j"} 1`},
		{request{"POST", sum, "# TYPE c counter\nc 1\n", spoolA + "/1", 200, true, "1"}, `c{instance="",job="j"} 1`},
		{request{"POST", sum, "# TYPE c counter\nc 1\n", spoolB + "/1", 200, false, "1"}, `c{instance="",job="j"} 2`},
		{request{"POST", sum, "# TYPE c counter\nc 1\n", spoolA + "/5", 200, false, "5"}, `c{instance="",job="j"} 3`},
		{request{"POST", sum, "# TYPE c counter\nc 1\n", spoolA + "/4", 200, true, "5"}, `c{instance="",job="j"} 3`},
		{request{"DELETE", "/j", "", spoolA + "/5", 202, true, "5"}, `c{instance="",job="j"} 3`},
		{request{"DELETE", "/j", "", spoolA + "/6", 202, false, "6"}, ``},
		{request{"PUT", "/j", "m 1\n", spoolA + "/7", 200, false, "7"}, `m{instance="",job="j"} 1`},
		{request{"DELETE", "/j", "", spoolA + "/6", 202, true, "7"}, `m{instance="",job="j"} 1`},
		// A deletion of what is not there is noted too.
		{request{"DELETE", "/nobody", "", spoolA + "/8", 202, false, "8"}, `m{instance="",job="j"} 1`},
		{request{"PUT", "/j", "m 2\n", spoolA + "/9", 200, false, "9"}, `m{instance="",job="j"} 2`},
		{request{"PUT", "/j", "m 1\n", spoolA + "/9", 200, true, "9"}, `m{instance="",job="j"} 2`}, // of the same layout
		// What can't be read is not noted, and holds up nothing.
		{request{"PUT", "/j", "m\n", spoolA + "/10", 400, false, "9"}, `m{instance="",job="j"} 2`},
		{request{"PUT", "/j?ttl=x", "m 1\n", spoolA + "/10", 400, false, "9"}, `m{instance="",job="j"} 2`},
		{request{"PUT", "/j/x", "m 1\n", spoolA + "/10", 400, false, "9"}, `m{instance="",job="j"} 2`},
		{request{"DELETE", "/j/x", "", spoolA + "/10", 400, false, "9"}, `m{instance="",job="j"} 2`},
		{request{"PUT", "?group_by=instance", "", spoolA + "/10", 400, false, "9"}, `m{instance="",job="j"} 2`},
		// A batch is one change.
		{request{"PUT", "?group_by=job", "m{job=\"j\"} 5\nm{job=\"k\"} 6\n", spoolA + "/11", 200, false, "11"}, "m{instance=\"\",job=\"j\"} 5\nm{instance=\"\",job=\"k\"} 6"},
		{request{"PUT", "?group_by=job", "m{job=\"j\"} 7\nm{job=\"k\"} 8\n", spoolA + "/11", 200, true, "11"}, "m{instance=\"\",job=\"j\"} 5\nm{instance=\"\",job=\"k\"} 6"},
		{request{"DELETE", "/k", "", spoolA + "/12", 202, false, "12"}, `m{instance="",job="j"} 5`},
		{request{"PUT", "?group_by=job", "", spoolA + "/13", 200, false, "13"}, `m{instance="",job="j"} 5`},
		// What there is no room for is not noted.
		{request{"PUT", "?group_by=job", "m{job=\"k\"} 1\nm{job=\"l\"} 1\nm{job=\"m\"} 1\n", spoolA + "/14", 507, false, "13"}, `m{instance="",job="j"} 5`},
		{request{"PUT", "?group_by=job", "m{job=\"j\"} 2\nm{job=\"l\"} 1\n", spoolA + "/14", 200, false, "14"}, "m{instance=\"\",job=\"j\"} 2\nm{instance=\"\",job=\"l\"} 1"},
	} {
		s.expectAnswer(r.request)
		if s.expect(strings.Split(r.want, "\n")...); t.Failed() {
			t.Fatalf("after %s: %s %s", r.id, r.method, r.path)
		}
	}

	// Who did not hear why a push was refused is told again; it failed when it was made.
	s.want(202, "DELETE", "/l", "")
	for range 2 {
		body := s.expectAnswer(request{"PUT", "/j", "m 1 5\n", spoolA + "/15", 400, false, "14"}, gateway.HeaderPushTime, "1899999999.5")
		wantWords(t, body, "timestamp")
		s.expectPush(`push_failure_time_seconds{instance="",job="j"} 1.8999999995e+09`, `push_time_seconds{instance="",job="j"} 1.9e+09`)
		c.advance(time.Hour)
	}
	s.expectAnswer(request{"PUT", "/j", "m 1\nn 1\no 1\n", spoolA + "/16", 413, false, "14"})
	s.expectPush(`push_failure_time_seconds{instance="",job="j"} 1.9000072e+09`, `push_time_seconds{instance="",job="j"} 1.9e+09`)
	s.expectAnswer(request{"PUT", "/j", "m 1\n", spoolA + "/17", 200, false, "17"})
}

// A clock that is ahead costs no push that waited in a spool, nor does one that waited long
// pass for new.
func TestPushIDTime(t *testing.T) {
	c := newClock()
	s := start(t, gateway.StoreConfig{Now: c.now}, gateway.Memory())
	s.expectAnswer(request{"PUT", "/j?interval=1h", "m 1\n", spoolA + "/1", 200, false, "1"}, gateway.HeaderPushTime, "1899990000.5")
	s.expectPush(`push_failure_time_seconds{instance="",job="j"} 0`, `push_time_seconds{instance="",job="j"} 1.8999900005e+09`, `push_up{instance="",job="j"} 0`)
	s.expectAnswer(request{"PUT", "/j", "m 1\n", spoolA + "/2", 200, false, "2"}, gateway.HeaderPushTime, "1900010000")
	s.expectPush(`push_failure_time_seconds{instance="",job="j"} 0`, `push_time_seconds{instance="",job="j"} 1.9e+09`, `push_up{instance="",job="j"} 1`)
	s.expectAnswer(request{"PUT", "/j", "m 1\n", spoolA + "/3", 400, false, "2"}, gateway.HeaderPushTime, "soon")
	wantWords(t, s.want(400, "PUT", "/j", "m 1\n", gateway.HeaderPushTime, "1900010000"), gateway.HeaderPushTime, "is the clock wrong?")
}

// However many senders send a push at the same time, and whatever fails meanwhile, it is
// made once.
func TestPushOnceAtATime(t *testing.T) {
	backend := newStored()
	s := start(t, gateway.StoreConfig{}, backend)
	push := func(seq int) int {
		return s.do("POST", "/j?aggregate=sum", "# TYPE c counter\nc 1\n", gateway.HeaderPushID, fmt.Sprint(spoolA, "/", seq)).Code
	}
	for seq := 1; seq <= 20; seq++ {
		backend.fails.Store(seq == 10)
		var all sync.WaitGroup
		for range 30 {
			all.Go(func() {
				want := 200
				if seq == 10 {
					want = 503
				}
				if code := push(seq); code != want {
					t.Errorf("push %d: got %d, want %d", seq, code, want)
				}
			})
		}
		all.Wait()
		if seq == 10 {
			break
		}
	}
	s.expect(`c{instance="",job="j"} 9`)
	s.expectAnswer(request{"POST", "/j?aggregate=sum", "# TYPE c counter\nc 1\n", spoolA + "/10", 503, false, "9"})
	// What was made before is told to be there while nothing can be written.
	s.expectAnswer(request{"POST", "/j?aggregate=sum", "# TYPE c counter\nc 1\n", spoolA + "/9", 200, true, "9"})
	s.expectAnswer(request{"DELETE", "/j", "", spoolA + "/10", 503, false, "9"})
	s.expect(`c{instance="",job="j"} 9`)
}

// What is noted survives a restart, and is forgotten after its time.
func TestSpools(t *testing.T) {
	path, c := t.TempDir()+"/push.db", newClock()
	backends := map[string]func() gateway.Backend{
		"memory of its own": func() func() gateway.Backend { b := newStored(); return func() gateway.Backend { return b } }(),
		"bbolt": func() gateway.Backend {
			b, err := boltstore.Open(path, nil)
			if err != nil {
				t.Fatal(err)
			}
			return b
		},
	}
	body, old := "# TYPE c counter\nc 1\n", "spool-old-enough"
	for name, open := range backends {
		t.Run(name, func(t *testing.T) {
			started := func(config gateway.StoreConfig, f func(t *testing.T, s server)) {
				t.Helper()
				config.Now = c.now
				t.Run("", func(t *testing.T) { f(t, start(t, config, open())) })
			}
			started(gateway.StoreConfig{}, func(t *testing.T, s server) {
				s.expectAnswer(request{"POST", "/j?aggregate=sum", body, old + "/3", 200, false, "3"})
				c.advance(4 * 24 * time.Hour)
				s.expectAnswer(request{"POST", "/j?aggregate=sum", body, spoolA + "/1", 200, false, "1"})
				s.expectAnswer(request{"POST", "/j?aggregate=sum", body, spoolB + "/7", 200, false, "7"})
			})
			started(gateway.StoreConfig{}, func(t *testing.T, s server) {
				s.expectAnswer(request{"POST", "/j?aggregate=sum", body, spoolA + "/1", 200, true, "1"})
				s.expectAnswer(request{"POST", "/j?aggregate=sum", body, spoolB + "/7", 200, true, "7"})
				s.expectAnswer(request{"POST", "/j?aggregate=sum", body, old + "/3", 200, true, "3"})
				c.advance(4 * 24 * time.Hour) // 8 days for the old one, and what is repeated does not count
				s.expectAnswer(request{"POST", "/j?aggregate=sum", body, spoolA + "/2", 200, false, "2"})
				s.expectAnswer(request{"PUT", "/j", "m\n", old + "/1", 400, false, "0"})
				s.expect(`c{instance="",job="j"} 4`)
			})
			started(gateway.StoreConfig{ForgetAfter: 30 * 24 * time.Hour}, func(t *testing.T, s server) {
				c.advance(29 * 24 * time.Hour)
				s.expectAnswer(request{"POST", "/j?aggregate=sum", body, spoolA + "/2", 200, true, "2"})
				c.advance(24 * time.Hour)
				s.expectAnswer(request{"POST", "/j?aggregate=sum", body, spoolA + "/3", 200, false, "3"})
				s.expectAnswer(request{"POST", "/j?aggregate=sum", body, spoolB + "/2", 200, false, "2"})
			})
			started(gateway.StoreConfig{}, func(t *testing.T, s server) {
				s.expectAnswer(request{"POST", "/j?aggregate=sum", body, spoolA + "/3", 200, true, "3"})
				s.expectAnswer(request{"PUT", "/j", "m\n", old + "/1", 400, false, "0"})
				s.expect(`c{instance="",job="j"} 6`)
			})
		})
	}
}

// Strangers who make spools push out those that are silent, and make the store no larger.
func TestMaxSpools(t *testing.T) {
	c, backend := newClock(), newStored()
	config := gateway.StoreConfig{Now: c.now, MaxSpools: 3}
	push := func(s server, spool, seq int, repeated bool) {
		t.Helper()
		c.advance(time.Second)
		s.expectAnswer(request{"POST", "/j", "m 1\n", fmt.Sprintf("%016d/%d", spool, seq), 200, repeated, fmt.Sprint(seq)})
	}
	t.Run("first", func(t *testing.T) {
		s := start(t, config, backend)
		for n := range 4 {
			push(s, 1, n+1, false)
			push(s, 10+n, 1, false)
		}
		push(s, 12, 1, true)
		push(s, 1, 4, true)
		push(s, 10, 1, false) // it was forgotten, and 12 goes
	})
	if len(backend.marks) != 3 {
		t.Errorf("%d marks are stored", len(backend.marks))
	}
	t.Run("second", func(t *testing.T) {
		config.MaxSpools = 2
		s := start(t, config, backend)
		push(s, 1, 4, true)
		push(s, 13, 1, true)
		push(s, 10, 2, false) // now there are as many as now may be, and 1 is older than 13
		push(s, 13, 1, true)
		push(s, 1, 4, false)
	})
	if len(backend.marks) != 2 {
		t.Errorf("%d marks are stored", len(backend.marks))
	}
}

// A mark is stored in the same call as what its push changed.
func TestMarkIsStoredWithPush(t *testing.T) {
	backend := &applied{Backend: gateway.Memory()}
	s := start(t, gateway.StoreConfig{}, backend)
	s.expectAnswer(request{"PUT", "?group_by=job", "m{job=\"a\"} 1\nm{job=\"b\"} 2\n", spoolA + "/4", 200, false, "4"})
	s.expectAnswer(request{"PUT", "/a", "m 5\n", spoolA + "/4", 200, true, "4"})
	s.expectAnswer(request{"DELETE", "/nobody", "", spoolA + "/5", 202, false, "5"})
	s.want(202, "DELETE", "/nobody", "")
	s.expectAnswer(request{"PUT", "/c", "m 5 5\n", spoolA + "/6", 400, false, "5"}) // no mark: it may be sent again
	if got, want := strings.Join(backend.calls, "; "), "2 changes, seq 4; 0 changes, seq 5; 1 changes, no mark"; got != want {
		t.Errorf("the backend got %s, want %s", got, want)
	}
}

// applied notes what a backend is asked for.
type applied struct {
	gateway.Backend
	calls []string
}

func (b *applied) Apply(changes []gateway.Change, marks []gateway.Mark) error {
	seq := "no mark"
	switch {
	case len(marks) > 1 || len(marks) == 1 && marks[0].Spool != spoolA:
		return errors.New("that is not the mark")
	case len(marks) == 1:
		seq = fmt.Sprint("seq ", marks[0].Seq)
	}
	b.calls = append(b.calls, fmt.Sprintf("%d changes, %s", len(changes), seq))
	return nil
}
