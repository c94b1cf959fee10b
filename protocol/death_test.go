package protocol_test

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/culvert-io/culvert/protocol"
)

const shortDeath = 800 * time.Millisecond

func smallBuffer(c net.Conn) net.Conn {
	c.(*net.TCPConn).SetWriteBuffer(16 << 10)
	return c
}

// jam writes to a session whose connection takes nothing, until a frame is stuck
// in its write.
func jam(t testing.TB, s *protocol.Session) {
	t.Helper()
	var writes sync.WaitGroup
	progress := make(chan struct{}, 1)
	for range 16 {
		writes.Go(func() {
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			defer cancel()
			stream, err := s.Open(ctx)
			if err != nil {
				return
			}
			defer stream.Close()
			for {
				if _, err := stream.Write(make([]byte, 32<<10)); err != nil {
					return
				}
				select {
				case progress <- struct{}{}:
				default:
				}
			}
		})
	}
	t.Cleanup(func() { s.Close(); writes.Wait() })
	for quiet := false; !quiet; {
		select {
		case <-progress:
		case <-time.After(100 * time.Millisecond):
			quiet = true
		}
	}
}

func TestSilenceEndsASession(t *testing.T) {
	for _, transport := range transports {
		t.Run(transport, func(t *testing.T) {
			t.Parallel()
			config := protocol.SessionConfig{DeadAfter: shortDeath, PingInterval: -1}
			p := tunnel{transport: transport, relayed: true, agent: config, proxy: config}.open(t)
			p.relay.toProxy.stop()
			p.relay.toAgent.stop()
			awaitEnd(t, p.agent, protocol.ErrSilent)
			awaitEnd(t, p.proxy, protocol.ErrSilent)
			if word := protocol.EndReason(p.agent.Err()); word != "silent" {
				t.Errorf("EndReason is %q", word)
			}
		})
	}
}

func TestPingsKeepASessionAlive(t *testing.T) {
	t.Parallel()
	p := tunnel{
		agent: protocol.SessionConfig{DeadAfter: shortDeath, PingInterval: shortDeath / 10},
		proxy: protocol.SessionConfig{DeadAfter: shortDeath},
	}.open(t)
	select {
	case <-p.agent.Done():
		t.Errorf("the agent's end: %v", p.agent.Err())
	case <-p.proxy.Done():
		t.Errorf("the proxy's end: %v", p.proxy.Err())
	case <-time.After(4 * shortDeath):
	}
	if p.agent.RTT() == 0 {
		t.Error("the agent did not measure the round trip")
	}
	if p.proxy.RTT() != 0 {
		t.Error("the proxy pinged too")
	}
}

// stuckTunnel is a tunnel to an agent that reads nothing and pings on.
func stuckTunnel(transport string) tunnel {
	return tunnel{
		transport: transport, relayed: true, wrap: smallBuffer,
		agent: protocol.SessionConfig{PingInterval: shortDeath / 10, DeadAfter: time.Hour},
		proxy: protocol.SessionConfig{DeadAfter: shortDeath},
	}
}

func TestStuckWriteEndsTheSession(t *testing.T) {
	for _, transport := range transports {
		t.Run(transport, func(t *testing.T) {
			t.Parallel()
			p := stuckTunnel(transport).open(t)
			p.relay.toAgent.stop()
			jam(t, p.proxy)
			awaitEnd(t, p.proxy, protocol.ErrStuck)
			if word := protocol.EndReason(p.proxy.Err()); word != "stuck" {
				t.Errorf("EndReason is %q", word)
			}
		})
	}
}

// TestStuckSessionIsNoticedByThoseWhoGiveUp: scrapes have timeouts shorter than
// DeadAfter, so nobody waits for the write that is stuck.
func TestStuckSessionIsNoticedByThoseWhoGiveUp(t *testing.T) {
	calls := map[string]func(context.Context, *protocol.Session, *protocol.Stream){
		"open": func(ctx context.Context, s *protocol.Session, _ *protocol.Stream) { s.Open(ctx) },
		"ping": func(ctx context.Context, s *protocol.Session, _ *protocol.Stream) { s.Ping(ctx) },
		"write, then close": func(ctx context.Context, s *protocol.Session, stream *protocol.Stream) {
			context.AfterFunc(ctx, func() { stream.Close() })
			stream.Write([]byte("a request"))
		},
		"close":        func(_ context.Context, _ *protocol.Session, stream *protocol.Stream) { stream.Close() }, // its FIN is lost
		"answer pings": func(context.Context, *protocol.Session, *protocol.Stream) {},
	}
	for name, call := range calls {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			stop := make(chan struct{})
			p := tunnel{
				wrap:  func(c net.Conn) net.Conn { return &stoppable{Conn: c, stop: stop, closed: make(chan struct{})} },
				agent: protocol.SessionConfig{PingInterval: shortDeath / 10, DeadAfter: time.Hour},
				proxy: protocol.SessionConfig{DeadAfter: shortDeath},
			}.open(t)
			near, _ := streams(t, p.proxy, p.agent)
			close(stop)
			ctx, cancel := context.WithTimeout(t.Context(), shortDeath/8)
			defer cancel()
			call(ctx, p.proxy, near)
			awaitEnd(t, p.proxy, protocol.ErrStuck)
		})
	}
}

// stoppable is a connection whose writes wait for its Close once it is stopped.
type stoppable struct {
	net.Conn
	stop   <-chan struct{}
	once   sync.Once
	closed chan struct{}
}

func (c *stoppable) Write(p []byte) (int, error) {
	select {
	case <-c.stop:
		<-c.closed
		return 0, net.ErrClosed
	default:
		return c.Conn.Write(p)
	}
}

func (c *stoppable) Close() error {
	c.once.Do(func() { close(c.closed) })
	return c.Conn.Close()
}

// TestCloseOfAStuckSession: nothing of Close may wait for the connection.
func TestCloseOfAStuckSession(t *testing.T) {
	for _, tu := range []tunnel{{transport: "upgrade"}, {transport: "websocket"}, {tls: true}, {transport: "websocket", tls: true}} {
		name := tu.transport
		if tu.tls {
			name += ",tls"
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			tu.relayed, tu.wrap = true, smallBuffer
			p := tu.open(t)
			p.relay.toAgent.stop()
			jam(t, p.proxy)
			closed := make(chan struct{})
			go func() { p.proxy.Close(); close(closed) }()
			select {
			case <-closed:
			case <-time.After(2 * time.Second):
				t.Error("Close waits")
				<-closed
			}
			awaitEnd(t, p.proxy, protocol.ErrClosed)
		})
	}
}

// TestCloseWithBlockedStreams leaves readers and writers blocked on both sides;
// TestMain finds what stays behind.
func TestCloseWithBlockedStreams(t *testing.T) {
	for _, transport := range transports {
		for _, closer := range []string{"agent", "proxy"} {
			t.Run(transport+","+closer, func(t *testing.T) {
				t.Parallel()
				p := tunnel{transport: transport}.open(t)
				var blocked sync.WaitGroup
				ended := func(what string, err error) {
					if !protocol.IsSessionEnd(err) {
						t.Errorf("%s: %v", what, err)
					}
				}
				for range 10 {
					near, far := streams(t, p.agent, p.proxy)
					for _, s := range []*protocol.Stream{near, far} {
						blocked.Go(func() { _, err := s.Write(make([]byte, 32<<20)); ended("write", err) })
					}
					near, far = streams(t, p.proxy, p.agent)
					for _, s := range []*protocol.Stream{near, far} {
						blocked.Go(func() { _, err := s.Read(make([]byte, 1)); ended("read", err) })
					}
				}
				blocked.Go(func() { _, err := p.agent.Accept(context.Background()); ended("accept", err) })
				if closer == "agent" {
					p.agent.Close()
				} else {
					p.proxy.Close()
				}
				done := make(chan struct{})
				go func() { blocked.Wait(); close(done) }()
				await(t, "all that was blocked", done)
				p.agent.Close()
				p.proxy.Close()
				p.proxy.Close() // again is harmless
			})
		}
	}
}

func TestEndReason(t *testing.T) {
	for err, want := range map[error]string{
		protocol.ErrClosed: "closed", protocol.ErrPeerClosed: "lost", protocol.ErrSilent: "silent",
		protocol.ErrStuck: "stuck", errors.New("other"): "error", io.EOF: "error",
	} {
		if got := protocol.EndReason(err); got != want {
			t.Errorf("EndReason(%v) is %q, want %q", err, got, want)
		}
	}
}
