package protocol_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/culvert-io/culvert/protocol"
)

func TestHandshakeNamesBothEnds(t *testing.T) {
	for _, transport := range transports {
		t.Run(transport, func(t *testing.T) {
			p := tunnel{transport: transport}.open(t)
			for _, s := range []*protocol.Session{p.agent, p.proxy} {
				if s.Agent != "web-1" || s.Instance != "6f1c" || s.Proxy != "proxy-1" || s.Transport != transport || s.RemoteAddr == "" {
					t.Errorf("agent %q, instance %q, proxy %q, transport %q, address %q", s.Agent, s.Instance, s.Proxy, s.Transport, s.RemoteAddr)
				}
				if err := s.Err(); err != nil {
					t.Errorf("a living session has the error %v", err)
				}
			}
		})
	}
}

// TestManyStreams opens streams from both ends at once; each brings back what
// was sent, however it is cut up.
func TestManyStreams(t *testing.T) {
	for _, tu := range []tunnel{{transport: "upgrade"}, {transport: "websocket"}, {tls: true}, {transport: "websocket", tls: true}} {
		t.Run(fmt.Sprintf("%s,tls=%v", tu.transport, tu.tls), func(t *testing.T) {
			t.Parallel()
			stats := new(protocol.Stats)
			tu.agent.Stats, tu.proxy.Stats = stats, stats
			p := tu.open(t)
			serve(t, p.agent, echo)
			serve(t, p.proxy, echo)
			var tasks sync.WaitGroup
			for _, s := range []*protocol.Session{p.agent, p.proxy} {
				for i := range 50 {
					tasks.Go(func() {
						if err := throughEcho(s, uint64(i)); err != nil {
							t.Errorf("stream %d: %v", i, err)
						}
					})
				}
			}
			tasks.Wait()
			eventually(t, "all streams are closed", func() bool {
				return p.agent.NumStreams() == 0 && p.proxy.NumStreams() == 0 && stats.Streams.Load() == 0
			})
			if r, w := stats.BytesRead.Load(), stats.BytesWritten.Load(); r != w || r == 0 {
				t.Errorf("%d bytes were read and %d written", r, w)
			}
		})
	}
}

func throughEcho(s *protocol.Session, seed uint64) error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
	defer cancel()
	stream, err := s.Open(ctx)
	if err != nil {
		return err
	}
	defer stream.Close()
	stream.SetDeadline(time.Now().Add(2 * patience))
	random := rand.NewChaCha8([32]byte{byte(seed)})
	sent := make([]byte, rand.New(random).IntN(200_000))
	random.Read(sent)
	var tasks sync.WaitGroup
	defer tasks.Wait()
	tasks.Go(func() {
		for rest := sent; len(rest) > 0; {
			n := min(len(rest), 1+rand.IntN(100_000))
			if _, err := stream.Write(rest[:n]); err != nil {
				return
			}
			rest = rest[n:]
		}
		stream.(*protocol.Stream).CloseWrite()
	})
	sum := sha256.New()
	if n, err := io.Copy(sum, stream); err != nil || n != int64(len(sent)) {
		return fmt.Errorf("%d of %d bytes came back: %v", n, len(sent), err)
	}
	if want := sha256.Sum256(sent); !bytes.Equal(sum.Sum(nil), want[:]) {
		return errors.New("other bytes came back")
	}
	return nil
}

func TestFINReadsEOF(t *testing.T) {
	for _, transport := range transports {
		t.Run(transport, func(t *testing.T) {
			p := tunnel{transport: transport}.open(t)
			near, far := streams(t, p.agent, p.proxy)
			io.WriteString(near, "the end")
			if err := near.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			if got, err := io.ReadAll(far); string(got) != "the end" || err != nil {
				t.Errorf("read %q, %v", got, err)
			}
			// The other direction is still open.
			io.WriteString(far, "an answer")
			far.Close()
			if got, err := io.ReadAll(near); string(got) != "an answer" || err != nil {
				t.Errorf("read %q, %v", got, err)
			}
			if _, err := near.Write([]byte("x")); err == nil {
				t.Error("a write after CloseWrite succeeded")
			}
		})
	}
}

// TestEndOfSessionIsNoEOF ends sessions in every way in the middle of streams.
func TestEndOfSessionIsNoEOF(t *testing.T) {
	ways := map[string]struct {
		end         func(pair)
		agent       protocol.SessionConfig
		near, other error
	}{
		"closed here":  {end: func(p pair) { p.agent.Close() }, near: protocol.ErrClosed, other: protocol.ErrPeerClosed},
		"closed there": {end: func(p pair) { p.proxy.Close() }, near: protocol.ErrPeerClosed, other: protocol.ErrClosed},
		"reset":        {end: func(p pair) { p.relay.cut() }, near: protocol.ErrPeerClosed, other: protocol.ErrPeerClosed},
		"silent": {
			end:   func(p pair) { p.relay.toAgent.stop() },
			agent: protocol.SessionConfig{DeadAfter: 2 * time.Second, PingInterval: -1},
			near:  protocol.ErrSilent, other: protocol.ErrPeerClosed,
		},
	}
	for name, way := range ways {
		for _, transport := range transports {
			t.Run(name+","+transport, func(t *testing.T) {
				t.Parallel()
				p := tunnel{transport: transport, relayed: true, agent: way.agent}.open(t)
				var reads sync.WaitGroup
				for range 20 {
					near, far := streams(t, p.agent, p.proxy)
					for _, s := range []*protocol.Stream{near, far} {
						io.WriteString(s, "half a bo")
						reads.Go(func() {
							got, err := io.ReadAll(s)
							if string(got) != "half a bo" && string(got) != "" || err != io.ErrUnexpectedEOF {
								t.Errorf("read %q, %v", got, err)
							}
							if !protocol.IsSessionEnd(err) {
								t.Errorf("IsSessionEnd(%v) is false", err)
							}
							if _, err := s.Write([]byte("x")); !protocol.IsSessionEnd(err) {
								t.Errorf("write after the end: %v", err)
							}
						})
					}
				}
				way.end(p)
				awaitEnd(t, p.agent, way.near)
				awaitEnd(t, p.proxy, way.other)
				reads.Wait()
				for s, want := range map[*protocol.Session]error{p.agent: way.near, p.proxy: way.other} {
					if _, err := s.Open(t.Context()); !errors.Is(err, want) {
						t.Errorf("open after the end: %v, want %v", err, want)
					}
					if _, err := s.Accept(t.Context()); !errors.Is(err, want) {
						t.Errorf("accept after the end: %v, want %v", err, want)
					}
					if _, err := s.Ping(t.Context()); !errors.Is(err, want) {
						t.Errorf("ping after the end: %v, want %v", err, want)
					}
				}
			})
		}
	}
}

// TestBodyWithoutLength reads an HTTP response that the end of the stream
// delimits, over a session that dies in it.
func TestBodyWithoutLength(t *testing.T) {
	p := tunnel{relayed: true}.open(t)
	near, far := streams(t, p.proxy, p.agent)
	go func() {
		http.ReadRequest(bufio.NewReader(far))
		io.WriteString(far, "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nup 1\n")
	}()
	client := &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) { return near, nil }}
	defer client.CloseIdleConnections()
	req, _ := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://web-1/metrics", nil)
	resp, err := client.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	line := make([]byte, 5)
	if _, err := io.ReadFull(resp.Body, line); err != nil {
		t.Fatal(err)
	}
	p.relay.cut()
	// http.Transport closes the stream when it sees the end, and may be first.
	if rest, err := io.ReadAll(resp.Body); !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, net.ErrClosed) {
		t.Errorf("the body ended with %q, %v", rest, err)
	}
}

// TestHalfClosedStreamNeverLooksComplete: 10 s after CloseWrite a stream that
// the other side still writes to is given up. That is no end of its body.
func TestHalfClosedStreamNeverLooksComplete(t *testing.T) {
	if testing.Short() {
		t.Skip("takes 10 s")
	}
	t.Parallel()
	p := tunnel{}.open(t)
	near, far := streams(t, p.proxy, p.agent)
	near.CloseWrite()
	if _, err := io.ReadAll(far); err != nil {
		t.Fatal(err)
	}
	far.Write([]byte("half a bo"))
	near.SetReadDeadline(time.Now().Add(3 * patience))
	if got, err := io.ReadAll(near); err == nil {
		t.Errorf("read %q and a clean end, and the other side did not end it", got)
	}
}

func TestOpenGivesUp(t *testing.T) {
	t.Run("the other side accepts nothing", func(t *testing.T) {
		p := tunnel{}.open(t)
		var opened []net.Conn
		for range 256 { // so many may wait for the other side's Accept
			s, err := p.proxy.Open(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			opened = append(opened, s)
		}
		givesUp(t, p.proxy)
		for _, s := range opened {
			s.Close()
		}
	})
	t.Run("the connection takes no data", func(t *testing.T) {
		p := tunnel{relayed: true, wrap: smallBuffer}.open(t)
		p.relay.toAgent.stop()
		jam(t, p.proxy)
		givesUp(t, p.proxy)
	})
}

func givesUp(t *testing.T, s *protocol.Session) {
	t.Helper()
	cause := errors.New("the scrape's timeout")
	ctx, cancel := context.WithTimeoutCause(t.Context(), 50*time.Millisecond, cause)
	defer cancel()
	opened := make(chan error, 1)
	go func() {
		_, err := s.Open(ctx)
		opened <- err
	}()
	if err := await(t, "open", opened); !errors.Is(err, cause) {
		t.Errorf("open returned %v, want %v", err, cause)
	}
	if err := s.Err(); err != nil {
		t.Errorf("the session ended: %v", err)
	}
}

// TestGivenUpOpensAreBounded: an agent that accepts no streams must not make the
// proxy collect what waits for them.
func TestGivenUpOpensAreBounded(t *testing.T) {
	const limit = 300
	p := tunnel{proxy: protocol.SessionConfig{MaxStreams: limit}}.open(t)
	before := runtime.NumGoroutine()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	var refused error
	for range 2 * limit {
		_, err := p.proxy.Open(ctx)
		if errors.Is(err, protocol.ErrTooManyStreams) {
			refused = err
		}
	}
	if refused == nil {
		t.Errorf("ErrTooManyStreams never came in %d opens, the limit is %d", 2*limit, limit)
	}
	eventually(t, "the goroutines of opens that gave up end, but for those that yamux holds", func() bool {
		return runtime.NumGoroutine()-before <= limit/2
	})
}

func TestMaxStreams(t *testing.T) {
	const limit = 8
	t.Run("opened here", func(t *testing.T) {
		p := tunnel{proxy: protocol.SessionConfig{MaxStreams: limit}}.open(t)
		serve(t, p.agent, echo)
		var opened []net.Conn
		for range limit {
			s, err := p.proxy.Open(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			opened = append(opened, s)
		}
		if _, err := p.proxy.Open(t.Context()); !errors.Is(err, protocol.ErrTooManyStreams) {
			t.Errorf("at the limit open returned %v", err)
		}
		opened[0].Close()
		eventually(t, "a place is free again", func() bool { return p.proxy.NumStreams() < limit })
		s, err := p.proxy.Open(t.Context())
		if err != nil {
			t.Errorf("below the limit: %v", err)
		}
		s.Close()
		for _, s := range opened {
			s.Close()
		}
	})
	t.Run("opened here at once", func(t *testing.T) {
		p := tunnel{proxy: protocol.SessionConfig{MaxStreams: limit}}.open(t)
		serve(t, p.agent, echo)
		var tasks sync.WaitGroup
		var mu sync.Mutex // protects opened
		var opened []net.Conn
		start := make(chan struct{})
		for range 20 * limit {
			tasks.Go(func() {
				<-start
				if s, err := p.proxy.Open(t.Context()); err == nil {
					mu.Lock()
					opened = append(opened, s)
					mu.Unlock()
				}
			})
		}
		close(start)
		tasks.Wait()
		if len(opened) > limit {
			t.Errorf("%d streams were opened, the limit is %d", len(opened), limit)
		}
		for _, s := range opened {
			s.Close()
		}
	})
	t.Run("of both sides together", func(t *testing.T) {
		p := tunnel{proxy: protocol.SessionConfig{MaxStreams: limit}}.open(t)
		serve(t, p.proxy, echo)
		for range limit {
			s, err := p.agent.Open(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
		}
		p.agent.Ping(t.Context()) // comes after all the opens
		if _, err := p.proxy.Open(t.Context()); !errors.Is(err, protocol.ErrTooManyStreams) {
			t.Errorf("with %d streams of the other side open returned %v", limit, err)
		}
	})
	t.Run("opened there", func(t *testing.T) {
		p := tunnel{proxy: protocol.SessionConfig{MaxStreams: limit}}.open(t)
		serve(t, p.proxy, echo)
		var opened []net.Conn
		for range 10 * limit {
			s, err := p.agent.Open(t.Context())
			if err != nil {
				break
			}
			opened = append(opened, s)
		}
		// The ping comes after all the opens.
		p.agent.Ping(t.Context())
		if n := p.proxy.NumStreams(); n > 2*limit { // as many again may wait for Accept
			t.Errorf("the other side has %d streams here, the limit is twice %d", n, limit)
		}
		for _, s := range opened {
			s.Close()
		}
	})
}

func TestDeadlines(t *testing.T) {
	p := tunnel{}.open(t)
	near, far := streams(t, p.agent, p.proxy)
	timedOut := func(what string, err error) {
		t.Helper()
		var timeout net.Error
		if !errors.As(err, &timeout) || !timeout.Timeout() {
			t.Errorf("%s: %v is no timeout", what, err)
		}
	}
	near.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
	_, err := near.Read(make([]byte, 1))
	timedOut("read", err)
	near.SetReadDeadline(time.Time{})
	near.SetWriteDeadline(time.Now().Add(20 * time.Millisecond))
	_, err = near.Write(make([]byte, 32<<20)) // more than the window
	timedOut("write", err)
	near.SetWriteDeadline(time.Time{})
	// The stream lives on.
	go io.WriteString(far, "later")
	if _, err := io.ReadFull(near, make([]byte, 5)); err != nil {
		t.Errorf("after the deadline: %v", err)
	}
}

func TestCloseWakesReaderAndWriter(t *testing.T) {
	p := tunnel{}.open(t)
	near, _ := streams(t, p.agent, p.proxy)
	read, written := make(chan error, 1), make(chan error, 1)
	go func() { _, err := near.Read(make([]byte, 1)); read <- err }()
	go func() { _, err := near.Write(make([]byte, 4<<20)); written <- err }()
	near.Close()
	if err := await(t, "read", read); !errors.Is(err, net.ErrClosed) {
		t.Errorf("read: %v", err)
	}
	if err := await(t, "write", written); !errors.Is(err, net.ErrClosed) {
		t.Errorf("write: %v", err)
	}
	if err := near.Close(); err != nil {
		t.Errorf("the second Close: %v", err)
	}
	if _, err := near.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("read after Close: %v", err)
	}
}

func TestClosedStreamTakesNothing(t *testing.T) {
	p := tunnel{}.open(t)
	serve(t, p.proxy, echo)
	for range 100 {
		s, err := p.agent.Open(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		s.Close()
		if _, err := s.Write([]byte("late")); !errors.Is(err, net.ErrClosed) {
			t.Fatalf("a write after Close returned %v", err)
		}
	}
}

func TestListener(t *testing.T) {
	p := tunnel{}.open(t)
	l := p.proxy.Listener()
	accepted := make(chan error, 1)
	go func() { _, err := l.Accept(); accepted <- err }()
	l.Close()
	if err := await(t, "accept", accepted); !errors.Is(err, net.ErrClosed) {
		t.Errorf("accept on a closed listener: %v", err)
	}
	near, far := streams(t, p.agent, p.proxy) // the session lives on
	go io.WriteString(near, "x")
	if _, err := io.ReadFull(far, make([]byte, 1)); err != nil {
		t.Error(err)
	}
}

func TestPing(t *testing.T) {
	for _, transport := range transports {
		t.Run(transport, func(t *testing.T) {
			p := tunnel{transport: transport, relayed: true, agent: protocol.SessionConfig{PingInterval: -1}}.open(t)
			if p.proxy.RTT() != 0 {
				t.Errorf("round trip %s before the first ping", p.proxy.RTT())
			}
			before := p.agent.LastHeard()
			rtt, err := p.proxy.Ping(t.Context())
			if err != nil || rtt <= 0 || rtt > patience || p.proxy.RTT() != rtt {
				t.Errorf("round trip %s, remembered %s: %v", rtt, p.proxy.RTT(), err)
			}
			if !p.agent.LastHeard().After(before) {
				t.Error("the ping was no sign of life")
			}
			p.relay.toAgent.stop()
			ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
			defer cancel()
			if _, err := p.proxy.Ping(ctx); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("without an answer: %v", err)
			}
		})
	}
}

// TestIdleStreamsAreShrunk: yamux keeps the largest receive buffer that a stream
// ever had, and pooled streams are idle most of the time, after each use anew.
func TestIdleStreamsAreShrunk(t *testing.T) {
	const n, size = 24, 1 << 20
	p := tunnel{}.open(t)
	body := make([]byte, size)
	type side struct{ near, far *protocol.Stream }
	var open []side
	for range n {
		near, far := streams(t, p.proxy, p.agent)
		open = append(open, side{near, far})
	}
	for range 2 {
		var writes sync.WaitGroup
		for _, s := range open {
			writes.Go(func() { s.far.Write(body) })
		}
		writes.Wait() // now all of it waits in the receive buffers
		for _, s := range open {
			if _, err := io.ReadFull(s.near, body); err != nil {
				t.Fatal(err)
			}
		}
		full := heap()
		eventually(t, "the buffers are given back", func() bool { return heap() < full-n*size*3/4 })
	}
}

func heap() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// TestHTTPOverStreams has a transport reuse streams as the proxy does.
func TestHTTPOverStreams(t *testing.T) {
	for _, transport := range transports {
		t.Run(transport, func(t *testing.T) {
			p := tunnel{transport: transport}.open(t)
			server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				io.WriteString(w, r.RequestURI)
			})}
			served := make(chan error, 1)
			go func() { served <- server.Serve(p.agent.Listener()) }()
			client := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return p.proxy.Open(ctx) }}
			for range 10 {
				req, _ := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://agent/", nil)
				req.URL.Opaque = "http://web-1:9100/metrics"
				resp, err := client.RoundTrip(req)
				if err != nil {
					t.Fatal(err)
				}
				body, err := io.ReadAll(resp.Body)
				resp.Body.Close()
				if string(body) != "http://web-1:9100/metrics" || err != nil {
					t.Fatalf("%q, %v", body, err)
				}
			}
			if n := p.proxy.NumStreams(); n != 1 {
				t.Errorf("%d streams for requests one after the other", n)
			}
			client.CloseIdleConnections()
			eventually(t, "no stream is left", func() bool { return p.agent.NumStreams() == 0 && p.proxy.NumStreams() == 0 })
			p.agent.Close()
			if err := await(t, "Serve", served); !protocol.IsSessionEnd(err) {
				t.Errorf("Serve returned %v", err)
			}
			server.Close()
		})
	}
}

// TestHandle: every stream of the other side is passed on, those too that were
// opened before; the end of the session is told once, whenever it is asked for.
func TestHandle(t *testing.T) {
	for _, transport := range transports {
		t.Run(transport, func(t *testing.T) {
			p := tunnel{transport: transport}.open(t)
			const number = 50
			open := func() {
				c, err := p.agent.Open(t.Context())
				if err != nil {
					t.Error(err)
					return
				}
				if _, err := c.Write([]byte{1}); err != nil {
					t.Error(err)
				}
			}
			for range number / 2 {
				open()
			}
			handled := make(chan *protocol.Stream, number)
			p.proxy.Handle(func(st *protocol.Stream) { handled <- st })
			var opening sync.WaitGroup
			for range number / 2 {
				opening.Go(open)
			}
			for range number {
				st := await(t, "a stream", handled)
				if _, err := io.ReadFull(st, make([]byte, 1)); err != nil {
					t.Error(err)
				}
			}
			opening.Wait()
			open() // after a while without any
			await(t, "one more stream", handled)

			ended := make(chan error, 2)
			p.proxy.AfterEnd(func() { ended <- p.proxy.Err() })
			p.agent.Close()
			if err := await(t, "the end", ended); !errors.Is(err, protocol.ErrPeerClosed) {
				t.Errorf("the session ended with %v", err)
			}
			p.proxy.AfterEnd(func() { ended <- p.proxy.Err() })
			await(t, "the end, asked for late", ended)
		})
	}
}
