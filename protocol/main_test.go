package protocol_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/culvert-io/culvert/protocol"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience bounds what should happen at once.
const patience = 10 * time.Second

var transports = []string{"upgrade", "websocket"}

// tunnel is how a test wants its session. The zero value is the raw upgrade over
// TCP with the default settings.
type tunnel struct {
	transport    string
	tls          bool
	agent, proxy protocol.SessionConfig
	relayed      bool                    // put a relay between
	wrap         func(net.Conn) net.Conn // around the connections that the proxy accepts
}

// pair is an open session, seen from both ends.
type pair struct {
	agent, proxy *protocol.Session
	relay        *relay
}

// serve starts a server that takes tunnels through the real CheckUpgrade and
// Accept, and sends each session to the channel.
func (tu tunnel) serve(t testing.TB) (*httptest.Server, <-chan *protocol.Session) {
	t.Helper()
	accepted := make(chan *protocol.Session, 1)
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		transport, refusal := protocol.CheckUpgrade(r)
		if refusal == nil && transport == "upgrade" && tu.transport == "websocket" {
			refusal = protocol.Refusef(http.StatusBadRequest, protocol.CodeNoUpgrade, "not this way")
		}
		if refusal != nil {
			refusal.Write(w)
			return
		}
		s, err := protocol.Accept(w, r, transport, "proxy-1", tu.proxy)
		if err != nil {
			t.Errorf("accept: %v", err)
			close(accepted)
			return
		}
		accepted <- s
	}))
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	if tu.wrap != nil {
		server.Listener = wrapListener{server.Listener, tu.wrap}
	}
	if tu.tls {
		server.StartTLS()
	} else {
		server.Start()
	}
	t.Cleanup(server.Close)
	return server, accepted
}

// open makes a session through the real Dial and Accept.
func (tu tunnel) open(t testing.TB) pair {
	t.Helper()
	server, accepted := tu.serve(t)
	u, _ := url.Parse(server.URL)
	p := pair{}
	if tu.relayed {
		p.relay = newRelay(t, u.Host)
		u.Host = p.relay.addr
	}
	config := &tls.Config{RootCAs: x509.NewCertPool()}
	if tu.tls {
		config.RootCAs.AddCert(server.Certificate())
	}
	dialer := &protocol.Dialer{ProxyURL: u, Agent: "web-1", Instance: "6f1c", TLS: config, Session: tu.agent}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var err error
	if p.agent, err = dialer.Dial(ctx); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.agent.Close() })
	p.proxy = session(t, accepted)
	return p
}

// session returns the session that a server accepted.
func session(t testing.TB, accepted <-chan *protocol.Session) *protocol.Session {
	t.Helper()
	s := await(t, "session", accepted)
	if s == nil {
		t.FailNow()
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// streams opens a stream from the one session to the other.
func streams(t testing.TB, from, to *protocol.Session) (near, far *protocol.Stream) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	a, err := from.Open(ctx)
	if err != nil {
		t.Fatalf("open: %v", err)
	}
	b, err := to.Accept(ctx)
	if err != nil {
		t.Fatalf("accept: %v", err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	return a.(*protocol.Stream), b.(*protocol.Stream)
}

// serve passes each stream that the session accepts to f, until the session ends.
func serve(t testing.TB, s *protocol.Session, f func(net.Conn)) {
	var tasks sync.WaitGroup
	tasks.Go(func() {
		for {
			stream, err := s.Accept(context.Background())
			if err != nil {
				return
			}
			tasks.Go(func() {
				defer stream.Close()
				f(stream)
			})
		}
	})
	t.Cleanup(func() { s.Close(); tasks.Wait() })
}

func echo(c net.Conn) { io.Copy(c, c) }

// await fails the test when the channel isn't closed, or brings nothing, in time.
func await[T any](t testing.TB, what string, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(patience):
		t.Fatalf("%s: nothing within %s", what, patience)
		panic("unreachable")
	}
}

// awaitEnd waits for the end of a session and checks its reason.
func awaitEnd(t testing.TB, s *protocol.Session, want error) {
	t.Helper()
	await(t, "end of the session", s.Done())
	if err := s.Err(); !errors.Is(err, want) {
		t.Errorf("the session ended with %v, want %v", err, want)
	}
}

// eventually polls for what no channel tells.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not within %s", what, patience)
		}
	}
}

type wrapListener struct {
	net.Listener
	wrap func(net.Conn) net.Conn
}

func (l wrapListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return l.wrap(c), nil
}

// relay passes TCP connections on. Each direction can be stopped: bytes that
// come meanwhile stay in the kernel's buffers, which are small here.
type relay struct {
	addr     string
	toProxy  direction
	toAgent  direction
	listener net.Listener
	tasks    sync.WaitGroup

	mu    sync.Mutex // protects conns
	conns []net.Conn
}

type direction struct {
	mu      sync.Mutex // protects what follows
	stopped chan struct{}
	seen    func(chunk []byte)
}

// stop holds back all bytes of the direction until resume.
func (d *direction) stop() (resume func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	c := make(chan struct{})
	d.stopped = c
	return sync.OnceFunc(func() { close(c) })
}

// watch has f see each chunk, as one read brought it.
func (d *direction) watch(f func(chunk []byte)) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.seen = f
}

func (d *direction) get() (stopped chan struct{}, seen func([]byte)) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.stopped, d.seen
}

func newRelay(t testing.TB, target string) *relay {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &relay{addr: l.Addr().String(), listener: l}
	over := make(chan struct{})
	r.tasks.Go(func() {
		for {
			near, err := l.Accept()
			if err != nil {
				return
			}
			far, err := net.Dial("tcp", target)
			if err != nil {
				near.Close()
				continue
			}
			near.(*net.TCPConn).SetReadBuffer(16 << 10)
			far.(*net.TCPConn).SetReadBuffer(16 << 10)
			r.mu.Lock()
			r.conns = append(r.conns, near, far)
			r.mu.Unlock()
			r.tasks.Go(func() { r.toProxy.copy(far, near, over) })
			r.tasks.Go(func() { r.toAgent.copy(near, far, over) })
		}
	})
	t.Cleanup(func() {
		close(over)
		l.Close()
		r.cut()
		r.tasks.Wait()
	})
	return r
}

func (d *direction) copy(dst, src net.Conn, over <-chan struct{}) {
	defer dst.Close()
	defer src.Close()
	buf := make([]byte, 64<<10)
	for {
		n, err := src.Read(buf)
		stopped, seen := d.get()
		if n > 0 && seen != nil {
			seen(buf[:n])
		}
		if stopped != nil {
			select {
			case <-stopped:
			case <-over:
				return
			}
		}
		if err != nil {
			return
		}
		if _, err := dst.Write(buf[:n]); err != nil {
			return
		}
	}
}

// cut resets all connections.
func (r *relay) cut() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, c := range r.conns {
		protocol.Reset(c)
		c.Close()
	}
	r.conns = nil
}
