package agent_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// pushProx is a pushprox-proxy, weak points included: polls are not tied to their
// connection, whole pushes are buffered, and a body that breaks off is passed on as if it
// were whole.
type pushProx struct {
	*httptest.Server
	t    *testing.T
	addr string
	done chan struct{}

	mu      sync.Mutex // protects what follows
	scrapes map[string]chan *http.Request
	results map[string]chan *http.Response
	seen    map[string]bool // names that polled
}

// newPushProx starts a pushprox-proxy at the address, "127.0.0.1:0" for any.
func newPushProx(t *testing.T, address string) *pushProx {
	t.Helper()
	l, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	p := &pushProx{t: t, addr: l.Addr().String(), done: make(chan struct{}), scrapes: map[string]chan *http.Request{}, results: map[string]chan *http.Response{}, seen: map[string]bool{}}
	p.Server = &httptest.Server{Listener: l, Config: &http.Server{Handler: p}}
	p.Start()
	t.Cleanup(p.stop)
	return p
}

// stop ends it at once, as SIGTERM does.
func (p *pushProx) stop() {
	select {
	case <-p.done:
		return
	default:
	}
	close(p.done)
	p.Listener.Close()
	p.CloseClientConnections()
	p.Close()
}

func (p *pushProx) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch {
	case r.URL.Host != "" || r.Method == http.MethodConnect:
		p.scrape(w, r)
	case r.URL.Path == "/poll":
		p.poll(w, r)
	case r.URL.Path == "/push":
		p.push(w, r)
	case r.URL.Path == "/clients":
		type group struct {
			Targets []string          `json:"targets"`
			Labels  map[string]string `json:"labels"`
		}
		groups := []group{}
		p.mu.Lock()
		for _, name := range slices.Sorted(maps.Keys(p.seen)) {
			groups = append(groups, group{Targets: []string{name}})
		}
		p.mu.Unlock()
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(groups)
	default:
		http.Error(w, "404: not found", http.StatusNotFound)
	}
}

func channel[T any](p *pushProx, of map[string]chan T, key string) chan T {
	p.mu.Lock()
	defer p.mu.Unlock()
	if of[key] == nil {
		of[key] = make(chan T)
	}
	return of[key]
}

func timeoutSeconds(h http.Header) time.Duration {
	if seconds, err := strconv.ParseFloat(h.Get("X-Prometheus-Scrape-Timeout-Seconds"), 64); err == nil {
		return time.Duration(seconds * float64(time.Second))
	}
	return 15 * time.Second
}

func (p *pushProx) scrape(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), timeoutSeconds(r.Header))
	defer cancel()
	id := rand.Text()
	out := r.Clone(ctx)
	out.Header.Add("Id", id)
	fail := func(what string) {
		http.Error(w, fmt.Sprintf("Error scraping %q: %s", r.URL, what), http.StatusInternalServerError)
	}
	select {
	case channel(p, p.scrapes, r.URL.Hostname()) <- out:
	case <-ctx.Done():
		fail("nobody polled")
		return
	case <-p.done:
		return
	}
	select {
	case resp := <-channel(p, p.results, id):
		for name, values := range resp.Header {
			if name != "Id" && name != "X-Prometheus-Scrape-Timeout-Seconds" {
				w.Header()[name] = values
			}
		}
		w.WriteHeader(resp.StatusCode)
		io.Copy(w, resp.Body)
	case <-ctx.Done():
		fail("context deadline exceeded")
	case <-p.done:
	}
}

func (p *pushProx) poll(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	name := strings.TrimSpace(string(body))
	scrapes := channel(p, p.scrapes, name)
	p.mu.Lock()
	p.seen[name] = true
	p.mu.Unlock()
	select {
	case scrapes <- nil: // ends the poll that waits
	default:
	}
	for {
		select {
		case scrape := <-scrapes:
			if scrape == nil {
				http.Error(w, "replaced", http.StatusRequestTimeout)
				return
			}
			if scrape.Context().Err() != nil {
				continue
			}
			var b bytes.Buffer
			scrape.WriteProxy(&b)
			w.Write(b.Bytes())
			return
		case <-p.done:
			return
		}
	}
}

func (p *pushProx) push(w http.ResponseWriter, r *http.Request) {
	var b bytes.Buffer
	io.Copy(&b, r.Body)
	resp, err := http.ReadResponse(bufio.NewReader(&b), nil)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	select {
	case channel(p, p.results, resp.Header.Get("Id")) <- resp:
	case <-time.After(timeoutSeconds(resp.Header)):
		http.Error(w, "deadline exceeded", http.StatusInternalServerError)
	case <-p.done:
	}
}

// getThrough scrapes through the proxy at the address with a timeout of its own, as Prometheus
// does. It returns the status, 0 where the answer broke off, and the body.
func getThrough(address, target, timeout string) (int, string, error) {
	transport := &http.Transport{Proxy: http.ProxyURL(&url.URL{Scheme: "http", Host: address}), DisableKeepAlives: true}
	r, err := http.NewRequest(http.MethodGet, target, nil)
	if err != nil {
		return 0, "", err
	}
	r.Header.Set("X-Prometheus-Scrape-Timeout-Seconds", timeout)
	resp, err := (&http.Client{Transport: transport, Timeout: patience}).Do(r)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(body), err
}

// rawProxy takes connections, and lets a test see and answer what comes byte by byte.
type rawProxy struct {
	addr  string
	polls chan *rawRequest
	posts chan *rawRequest // pushes, and all else
}

// rawRequest is one request on its connection.
type rawRequest struct {
	head   string       // as it came
	body   string       // without the framing
	answer func(string) // "Connection: close" in it closes
	cut    func()
}

func newRawProxy(t *testing.T) *rawProxy {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &rawProxy{addr: l.Addr().String(), polls: make(chan *rawRequest, 100), posts: make(chan *rawRequest, 100)}
	ctx, cancel := context.WithCancel(context.Background())
	var tasks sync.WaitGroup
	tasks.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			context.AfterFunc(ctx, func() { conn.Close() })
			tasks.Go(func() { p.serve(conn) })
		}
	})
	t.Cleanup(func() { l.Close(); cancel(); tasks.Wait() })
	return p
}

func (p *rawProxy) serve(conn net.Conn) {
	defer conn.Close()
	r := bufio.NewReader(conn)
	for {
		var head strings.Builder
		for {
			line, err := r.ReadString('\n')
			if err != nil {
				return
			}
			head.WriteString(line)
			if line == "\r\n" {
				break
			}
		}
		parsed, err := http.ReadRequest(bufio.NewReader(io.MultiReader(strings.NewReader(head.String()), r)))
		if err != nil {
			return
		}
		// The parser has read ahead of its body only what belongs to it: nobody sends a
		// second request before the answer.
		body, err := io.ReadAll(parsed.Body)
		answered := make(chan struct{})
		q := &rawRequest{head: head.String(), body: string(body)}
		if err != nil {
			q.body += " (cut: " + err.Error() + ")"
		}
		q.answer = func(text string) {
			io.WriteString(conn, text)
			if strings.Contains(text, "Connection: close") {
				conn.Close()
			}
			close(answered)
		}
		q.cut = func() { conn.Close(); close(answered) }
		if strings.Contains(strings.SplitN(q.head, "\r\n", 2)[0], "/poll") {
			p.polls <- q
		} else {
			p.posts <- q
		}
		gone := make(chan struct{})
		go func() { r.Peek(1); close(gone) }()
		select {
		case <-answered:
		case <-gone:
			return
		}
		<-gone // the next request, or the end
	}
}
