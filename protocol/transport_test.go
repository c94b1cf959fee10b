package protocol_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/culvert-io/culvert/protocol"
)

// roundTrip sends a request and reads the whole response.
func roundTrip(ctx context.Context, tr *protocol.Transport, method string, body io.Reader) (*http.Response, string, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://agent", body)
	if err != nil {
		return nil, "", err
	}
	req.URL.Opaque = "http://web-1:9100/metrics"
	resp, err := tr.RoundTrip(req)
	if err != nil {
		return nil, "", err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	return resp, string(text), err
}

// TestTransport sends requests of all kinds to a server of net/http.
func TestTransport(t *testing.T) {
	for _, transport := range transports {
		t.Run(transport, func(t *testing.T) {
			p := tunnel{transport: transport}.open(t)
			opened := new(atomic.Int64)
			server := &http.Server{
				ConnContext: func(ctx context.Context, _ net.Conn) context.Context { opened.Add(1); return ctx },
				Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					body, err := io.ReadAll(r.Body)
					if err != nil || r.RequestURI != "http://web-1:9100/metrics" {
						t.Errorf("%s %s: %v", r.Method, r.RequestURI, err)
					}
					switch r.Method {
					case "GET":
						w.Header().Set("Content-Length", "200000")
						io.WriteString(w, strings.Repeat("x", 200_000))
					case "TRACE":
						w.Header().Set("Trailer", "Late")
						w.WriteHeader(http.StatusEarlyHints)
						io.WriteString(w, "one")
						http.NewResponseController(w).Flush()
						io.WriteString(w, "two")
						w.Header().Set("Late", "yes")
					case "PUT":
						fmt.Fprintf(w, "%d %d", r.ContentLength, len(body))
					case "DELETE":
						w.WriteHeader(http.StatusNoContent)
					}
				}),
			}
			go server.Serve(p.agent.Listener())
			t.Cleanup(func() { server.Close() })
			tr := &protocol.Transport{Session: p.proxy}
			for range 3 {
				for _, c := range []struct {
					method string
					body   io.Reader
					status int
					text   string
				}{
					{"GET", nil, 200, strings.Repeat("x", 200_000)},
					{"HEAD", nil, 200, ""},
					{"TRACE", nil, 200, "onetwo"},
					{"PUT", strings.NewReader(strings.Repeat("y", 300_000)), 200, "300000 300000"},
					{"PUT", struct{ io.Reader }{strings.NewReader("of unknown length")}, 200, "-1 17"},
					{"DELETE", nil, 204, ""},
				} {
					resp, text, err := roundTrip(t.Context(), tr, c.method, c.body)
					if err != nil || resp.StatusCode != c.status || text != c.text {
						t.Fatalf("%s: %v with %d bytes, %v", c.method, resp, len(text), err)
					}
					if c.method == "TRACE" && resp.Trailer.Get("Late") != "yes" {
						t.Errorf("the trailer is %v", resp.Trailer)
					}
				}
			}
			// What can't be sent twice gets a stream of its own; it may be kept afterwards.
			if n := opened.Load(); n < 2 || n > 1+3*4 {
				t.Errorf("18 requests took %d streams", n)
			}
			before := opened.Load()
			for range 20 {
				if _, _, err := roundTrip(t.Context(), tr, "GET", nil); err != nil {
					t.Fatal(err)
				}
			}
			if n := opened.Load(); n != before {
				t.Errorf("scrapes one after the other opened %d streams", n-before)
			}
			tr.CloseIdle(patience)
			if n := p.proxy.NumStreams(); n == 0 {
				t.Error("no stream waits")
			}
			tr.CloseIdleConnections()
			eventually(t, "no stream waits", func() bool { return p.proxy.NumStreams() == 0 })
			if _, _, err := roundTrip(t.Context(), tr, "GET", nil); err != nil {
				t.Fatal(err)
			}
			eventually(t, "none is kept any more", func() bool { return p.proxy.NumStreams() == 0 })
		})
	}
}

// answerEach has the agent's end answer each request on each stream as f does,
// which is told how many came before; it returns whether the stream is to go on.
func answerEach(t *testing.T, s *protocol.Session, f func(n int, c net.Conn) bool) {
	var n atomic.Int64
	serve(t, s, func(c net.Conn) {
		defer c.Close()
		for r := bufio.NewReader(c); ; {
			req, err := http.ReadRequest(r)
			if err != nil {
				return
			}
			io.Copy(io.Discard, req.Body)
			if !f(int(n.Add(1)-1), c) {
				return
			}
		}
	})
}

// TestTransportStale: a stream that the other side closed while it waited is
// replaced, where the request can be sent again.
func TestTransportStale(t *testing.T) {
	p := tunnel{}.open(t)
	closed := make(chan struct{})
	answerEach(t, p.agent, func(n int, c net.Conn) bool {
		fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n%d", n)
		if n == 0 {
			c.Close()
			close(closed)
		}
		return n > 0
	})
	tr := &protocol.Transport{Session: p.proxy}
	if _, text, err := roundTrip(t.Context(), tr, "GET", nil); err != nil || text != "0" {
		t.Fatal(text, err)
	}
	await(t, "the close", closed)
	if _, err := p.agent.Ping(t.Context()); err != nil { // comes back behind the FIN
		t.Fatal(err)
	}
	for _, want := range []string{"1", "2"} {
		if _, text, err := roundTrip(t.Context(), tr, "GET", nil); err != nil || text != want {
			t.Fatal(text, err)
		}
	}
}

// TestTransportBadAnswers: what breaks off or never ends is an error, and the
// stream is not used again.
func TestTransportBadAnswers(t *testing.T) {
	const whole = "whole"
	for name, c := range map[string]struct{ answer, text string }{ // no text: an error
		"nothing":           {"", ""},
		"no HTTP":           {"SSH-2.0-x\r\n\r\n", ""},
		"cut head":          {"HTTP/1.1 200 OK\r\nContent-", ""},
		"long head":         {"HTTP/1.1 200 OK\r\nA: " + strings.Repeat("x", 80_000) + "\r\nContent-Length: 0\r\n\r\n", ""},
		"endless interim":   {strings.Repeat("HTTP/1.1 103 Early Hints\r\nA: "+strings.Repeat("x", 1000)+"\r\n\r\n", 100), ""},
		"cut body":          {"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n" + whole, ""},
		"cut chunks":        {"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n" + whole + "\r\n", ""},
		"more than it says": {"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n" + whole + "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil", whole},
		"closing":           {"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 5\r\n\r\n" + whole, whole},
		"no length":         {"HTTP/1.1 200 OK\r\n\r\n" + whole, whole},
		"no status":         {"HTTP/1.1 099 Low\r\nContent-Length: 5\r\n\r\n" + whole, whole},
	} {
		t.Run(name, func(t *testing.T) {
			p := tunnel{}.open(t)
			answerEach(t, p.agent, func(n int, w net.Conn) bool {
				if n == 0 {
					io.WriteString(w, c.answer)
					return false
				}
				io.WriteString(w, "HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nsecond")
				return true
			})
			tr := &protocol.Transport{Session: p.proxy}
			_, text, err := roundTrip(t.Context(), tr, "GET", nil)
			if c.text == "" && err == nil || c.text != "" && (err != nil || text != c.text) {
				t.Errorf("got %q, %v", text, err)
			}
			for range 2 {
				if _, text, err := roundTrip(t.Context(), tr, "GET", nil); err != nil || text != "second" {
					t.Errorf("after it: got %q, %v", text, err)
				}
			}
		})
	}
}

// TestTransportGivesUp: the end of the context ends the exchange wherever it is,
// and the end of the session does.
func TestTransportGivesUp(t *testing.T) {
	for _, where := range []string{"head", "body", "request"} {
		for _, end := range []string{"context", "session"} {
			t.Run(where+" "+end, func(t *testing.T) {
				p := tunnel{}.open(t)
				arrived, gone := make(chan struct{}), make(chan error, 1)
				serve(t, p.agent, func(c net.Conn) {
					req, err := http.ReadRequest(bufio.NewReader(c))
					if err != nil {
						t.Error(err)
					}
					if where == "body" {
						io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nhalf")
					}
					close(arrived)
					_, err = io.Copy(io.Discard, req.Body)
					if where != "request" {
						_, err = c.Read(make([]byte, 1))
					}
					gone <- err
				})
				var body io.Reader
				if where == "request" {
					r, w := io.Pipe()
					t.Cleanup(func() { w.Close() })
					go w.Write(make([]byte, 100_000)) // and no more
					body = r
				}
				ctx, cancel := context.WithCancelCause(t.Context())
				defer cancel(nil)
				reason := errors.New("it takes too long")
				ended := make(chan error, 1)
				go func() {
					_, _, err := roundTrip(ctx, &protocol.Transport{Session: p.proxy}, "GET", body)
					ended <- err
				}()
				await(t, "the request", arrived)
				if end == "context" {
					cancel(reason)
				} else {
					p.proxy.Close()
				}
				err := await(t, "the end", ended)
				if end == "context" && !errors.Is(err, reason) || err == nil {
					t.Errorf("got %v", err)
				}
				if err := await(t, "the agent's end", gone); err == nil {
					t.Error("the agent took it for the end of the request")
				}
			})
		}
	}
}

// TestTransportBodyFails: a request whose body can't be read to its end does not
// pass for a whole one.
func TestTransportBodyFails(t *testing.T) {
	p := tunnel{}.open(t)
	got := make(chan error, 1)
	serve(t, p.agent, func(c net.Conn) {
		req, err := http.ReadRequest(bufio.NewReader(c))
		if err == nil {
			_, err = io.Copy(io.Discard, req.Body)
		}
		got <- err
	})
	reason := errors.New("the scraper went away")
	r, w := io.Pipe()
	go func() {
		w.Write(make([]byte, 10_000))
		w.CloseWithError(reason)
	}()
	if _, _, err := roundTrip(t.Context(), &protocol.Transport{Session: p.proxy}, "POST", r); err == nil || !strings.Contains(err.Error(), reason.Error()) {
		t.Errorf("got %v", err)
	}
	if err := await(t, "the agent's end", got); err == nil {
		t.Error("the agent took half a body for a whole one")
	}
}
