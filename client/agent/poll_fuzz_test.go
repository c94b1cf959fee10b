package agent

import (
	"bufio"
	"bytes"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
)

// FuzzPolled has the answer to a poll be anything. What is a scrape brings one push, of
// one response with the Id; a target that lends credentials is asked for its path alone.
func FuzzPolled(f *testing.F) {
	var beyond atomic.Pointer[string]
	target := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		if user, _, _ := r.BasicAuth(); user == "joe" && (r.URL.Path != "/exact" || r.Method != http.MethodGet && r.Method != http.MethodHead) {
			what := r.Method + " " + r.URL.String()
			beyond.Store(&what)
		}
		io.WriteString(w, "up 1\n")
	}))
	f.Cleanup(func() { target.CloseClientConnections(); target.Close() })
	u, _ := url.Parse(target.URL)
	port, _ := strconv.ParseUint(u.Port(), 10, 16)
	a, err := New(Config{
		Name: "web-1", ProxyURLs: []string{"proxy"}, LocalHost: "127.0.0.1", Protocol: ProtocolPushProx,
		Allow:   []PortRange{{uint16(port), uint16(port)}},
		Targets: []Target{{Name: "exact", URL: "http://joe:pw@" + u.Host + "/exact"}},
		Logger:  slog.New(slog.DiscardHandler),
	})
	if err != nil {
		f.Fatal(err)
	}
	proxy := a.ProxyURLs()[0]
	p, err := newPoller(newLink(a, proxy, netip.Addr{}), a.dialer(proxy), a.current.Load(), nil)
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { close(p.done); p.stop(); p.finish(f.Context()); a.tasks.Wait() })
	var answer string
	var pushes [][]byte
	p.client.Store(&http.Client{Transport: roundTrip(func(r *http.Request) (*http.Response, error) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return nil, err
		}
		resp := &http.Response{StatusCode: http.StatusOK, Header: http.Header{}, Body: http.NoBody, Request: r}
		if r.URL.Path == "/poll" {
			resp.Body = io.NopCloser(strings.NewReader(answer))
		} else {
			pushes = append(pushes, body)
		}
		return resp, nil
	})})

	at := ":" + u.Port()
	for _, seed := range []string{
		"GET http://web-1" + at + "/metrics HTTP/1.1\r\nHost: x\r\nId: 1\r\n\r\n",
		"GET http://exact.web-1/exact?a=b HTTP/1.1\r\nId: 1\r\nId: 2\r\nHost: x\r\n\r\n",
		"DELETE http://exact.web-1/other HTTP/1.1\r\nHost: x\r\nId: 1\r\n\r\n",
		"POST /v1/drain HTTP/1.1\r\nHost: x\r\nId: 1\r\nContent-Length: 2\r\n\r\n{}",
		"POST http://web-1" + at + "/ HTTP/1.1\r\nHost: x\r\nId: 1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n0\r\n\r\n",
		"HEAD https://web-1/?_scheme=https HTTP/1.0\nId: 1\nX-Prometheus-Scrape-Timeout-Seconds: 1e99\n\n",
		"CONNECT web-1" + at + " HTTP/1.1\r\nHost: x\r\nId: 1\r\nConnection: Id, close\r\n\r\n",
		"GET http:///v1/drain HTTP/1.1\r\nHost: x\r\nId: \x00\r\n\r\n",
		"OPTIONS * HTTP/1.1\r\nHost: x\r\nId: 1\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		answer, pushes = text, nil
		scrape, err := p.ask()
		if err != nil {
			return
		}
		// As http.Header.Write has it.
		ids := scrape.Header[headerID]
		id := strings.TrimSpace(strings.NewReplacer("\n", " ", "\r", " ").Replace(ids[len(ids)-1]))
		method := scrape.Method
		p.scrape(scrape)
		if what := beyond.Swap(nil); what != nil {
			t.Fatalf("the target with credentials got %s", *what)
		}
		if len(pushes) != 1 {
			t.Fatalf("%d pushes", len(pushes))
		}
		r := bufio.NewReader(bytes.NewReader(pushes[0]))
		resp, err := http.ReadResponse(r, &http.Request{Method: method})
		if err != nil {
			t.Fatalf("the push %q: %v", pushes[0], err)
		}
		if method == http.MethodConnect {
			resp.Body = io.NopCloser(r)
		}
		if _, err := io.Copy(io.Discard, resp.Body); err != nil {
			t.Fatalf("the push %q: %v", pushes[0], err)
		}
		if got := resp.Header[headerID]; len(got) != 1 || got[0] != id {
			t.Fatalf("the Id is %q, want %q", got, id)
		}
		if rest, _ := io.ReadAll(r); len(rest) > 0 {
			t.Fatalf("%q follows the response", rest)
		}
	})
}

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }
