package agent

import (
	"bufio"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/culvert-io/culvert/protocol"
)

// FuzzRequest has what comes through a stream be anything. A named target gets what it
// was declared with and nothing else, a port that is not allowed gets nothing, and nothing
// between scraper and proxy goes further.
func FuzzRequest(f *testing.F) {
	var mu sync.Mutex // protects named and open
	var named, open []*http.Request
	record := func(list *[]*http.Request) *httptest.Server {
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			io.Copy(io.Discard, r.Body)
			mu.Lock()
			*list = append(*list, r)
			mu.Unlock()
			if to := r.URL.Query().Get("to"); to != "" {
				w.Header()["Location"] = []string{strings.Map(func(c rune) rune {
					if c < ' ' || c == 0x7f {
						return '?'
					}
					return c
				}, to)}
				w.WriteHeader(http.StatusFound)
			}
		}))
		f.Cleanup(func() { s.CloseClientConnections(); s.Close() })
		return s
	}
	target, host := record(&named), record(&open)
	u, _ := url.Parse(host.URL)
	port, _ := strconv.ParseUint(u.Port(), 10, 16)
	at := strings.TrimPrefix(target.URL, "http://")
	a, err := New(Config{
		Name: "web-1", ProxyURLs: []string{"proxy"}, LocalHost: "127.0.0.1",
		Hosts:   []Host{{Name: "db.lan", Address: "127.0.0.1"}, {Name: "*.wild.test"}},
		Allow:   []PortRange{{uint16(port), uint16(port)}},
		Targets: []Target{{Name: "tree", URL: "http://joe:pw@" + at + "/tree/*"}, {Name: "exact", URL: "http://joe:pw@" + at + "/exact?m=declared"}},
		Logger:  slog.New(slog.DiscardHandler),
	})
	if err != nil {
		f.Fatal(err)
	}
	drained := make(chan protocol.Drain, 1)
	handler := &sessionHandler{agent: a, drained: drained}
	// PORT stands for the port that is allowed: the number differs from run to run.
	for _, seed := range []string{
		"GET http://tree.web-1/tree/a?b=c HTTP/1.1\r\nHost: x\r\nConnection: X-A, close\r\nX-A: 1\r\nProxy-Foo: 1\r\nTe: trailers\r\nAuthorization: mine\r\n\r\n",
		"GET http://tree.web-1/tree/%2e%2e/secret HTTP/1.1\r\nHost: x\r\n\r\n",
		"GET http://tree.web-1/tree/..;a=b/secret HTTP/1.1\r\nHost: x\r\n\r\n",
		"GET http://tree.web-1/tree/..%5csecret%252f%c0%af HTTP/1.1\r\nHost: x\r\n\r\n",
		"GET http://tree.web-1/tree/a?to=/tree/%252e%252e/secret HTTP/1.1\r\nHost: x\r\n\r\n",
		"GET http://exact.web-1/exact?m=mine&m=other HTTP/1.1\r\nHost: x\r\n\r\n",
		"HEAD http://EXACT.web-1.:80/ex%61ct HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nabcd",
		"POST http://web-1:PORT/x HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\nGET http://tree.web-1/secret HTTP/1.1\r\nHost: x\r\n\r\n",
		"GET http://db.lan:PORT/x HTTP/1.1\r\nHost: x\r\nProxy: y\r\nUpgrade: z\r\nConnection: Upgrade\r\n\r\n",
		"GET https://a.wild.test:PORT/x HTTP/1.1\r\nHost: x\r\n\r\n",
		"CONNECT web-1:PORT HTTP/1.1\r\nHost: x\r\n\r\n", "CONNECT tree.web-1:80 HTTP/1.1\r\nHost: x\r\n\r\n", "CONNECT [::1]:PORT HTTP/1.1\r\nHost: x\r\n\r\n",
		"POST /v1/drain HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}", "POST http://web-1/v1/drain HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}",
		"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n", "GET http://agent.web-1/metrics HTTP/1.1\r\nHost: x\r\n\r\n", "GET ftp://web-1/ HTTP/1.0\r\n\r\n", "GET http://[::1%25eth0]:PORT/ HTTP/1.1\r\nHost: x\r\n\r\n",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, raw string) {
		mu.Lock()
		named, open = nil, nil
		mu.Unlock()
		reader := bufio.NewReader(strings.NewReader(strings.ReplaceAll(raw, "PORT", u.Port())))
		for range 4 {
			r, err := http.ReadRequest(reader)
			if err != nil {
				break
			}
			answer := httptest.NewRecorder()
			func() {
				defer func() {
					if p := recover(); p != nil && p != any(http.ErrAbortHandler) {
						panic(p)
					}
				}()
				handler.ServeHTTP(answer, r.WithContext(t.Context()))
			}()
			if answer.Code < 200 || answer.Code > 599 {
				t.Errorf("%s %s: status %d", r.Method, r.RequestURI, answer.Code)
			}
			select {
			case <-drained:
				if r.Method != http.MethodPost || !strings.HasPrefix(r.RequestURI, "/v1/drain") {
					t.Errorf("%s %s drained the session", r.Method, r.RequestURI)
				}
			default:
			}
			if _, err := io.Copy(io.Discard, r.Body); err != nil && !errors.Is(err, http.ErrBodyReadAfterClose) {
				break
			}
		}
		mu.Lock()
		defer mu.Unlock()
		for _, r := range named {
			if r.Method != http.MethodGet && r.Method != http.MethodHead {
				t.Errorf("the target got %s", r.Method)
			}
			if user, password, _ := r.BasicAuth(); user != "joe" || password != "pw" || len(r.Header["Authorization"]) != 1 {
				t.Errorf("the target got the credentials %q", r.Header["Authorization"])
			}
			if r.URL.Path == "/exact" {
				if m := r.URL.Query()["m"]; len(m) != 1 || m[0] != "declared" {
					// A redirect within the path brings its own query.
					if !strings.Contains(raw, "to=") {
						t.Errorf("the target got %s", r.RequestURI)
					}
				}
				continue
			}
			// However a server reads it, it is below /tree.
			read := r.RequestURI
			read, _, _ = strings.Cut(read, "?")
			for range 5 {
				segments := strings.Split(strings.ReplaceAll(read, `\`, "/"), "/")
				for i := range segments {
					segments[i], _, _ = strings.Cut(segments[i], ";")
				}
				if clean := path.Clean(strings.Join(segments, "/")); clean != "/tree" && !strings.HasPrefix(clean, "/tree/") {
					t.Errorf("the target got %s, which reads as %s", r.RequestURI, clean)
				}
				plain, err := url.PathUnescape(read)
				if err != nil {
					break
				}
				read = plain
			}
		}
		for _, r := range append(named, open...) {
			for name := range r.Header {
				switch {
				case strings.HasPrefix(name, "Proxy-"), name == "Proxy", name == "Connection", name == "Keep-Alive", name == "Te", name == "Upgrade":
					t.Errorf("the target got %s: %q", name, r.Header[name])
				}
			}
		}
	})
}
