package protocol_test

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/culvert-io/culvert/protocol"
)

type halfConn interface {
	net.Conn
	CloseWrite() error
}

// tcpPair returns two ends of a TCP connection.
func tcpPair(t testing.TB) (near, far halfConn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	a, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	b, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	return a.(halfConn), b.(halfConn)
}

// spliced is scraper ═ a·Splice·b ═ target.
type spliced struct {
	scraper, target halfConn
	tunnel          pair // where b and target are the ends of a stream
	result          <-chan spliceResult
}

type spliceResult struct {
	n   int64
	err error
}

func splice(t testing.TB, kind string, idle time.Duration) spliced {
	t.Helper()
	var s spliced
	var a, b net.Conn
	s.scraper, a = tcpPair(t)
	if kind == "stream" {
		s.tunnel = tunnel{relayed: true}.open(t)
		b, s.target = streams(t, s.tunnel.proxy, s.tunnel.agent)
	} else {
		b, s.target = tcpPair(t)
	}
	result := make(chan spliceResult, 1)
	s.result = result
	go func() {
		n, err := protocol.Splice(a, b, idle)
		// Both have to be closed now.
		for _, c := range []net.Conn{a, b} {
			if _, err := c.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
				t.Errorf("a connection is still open after Splice: %v", err)
			}
		}
		result <- spliceResult{n, err}
	}()
	return s
}

func eachKind(t *testing.T, f func(t *testing.T, kind string)) {
	for _, kind := range []string{"tcp", "stream"} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			f(t, kind)
		})
	}
}

func TestSpliceHalfClose(t *testing.T) {
	eachKind(t, func(t *testing.T, kind string) {
		s := splice(t, kind, patience)
		request, response := strings.Repeat("question ", 50_000), strings.Repeat("answer ", 100_000)
		go func() {
			io.WriteString(s.scraper, request)
			s.scraper.CloseWrite()
		}()
		if got, err := io.ReadAll(s.target); string(got) != request || err != nil {
			t.Errorf("the target read %d bytes, %v", len(got), err)
		}
		go func() { // only now, with the one direction closed
			io.WriteString(s.target, response)
			s.target.CloseWrite()
		}()
		if got, err := io.ReadAll(s.scraper); string(got) != response || err != nil {
			t.Errorf("the scraper read %d bytes, %v", len(got), err)
		}
		if r := await(t, "Splice", s.result); r.err != nil || r.n != int64(len(response)) {
			t.Errorf("Splice returned %d, %v, want %d", r.n, r.err, len(response))
		}
	})
}

// TestSpliceEndAfterSilence: servers close connections that were idle for long.
// That is an end in good order, and leaves the other side its time to end too.
func TestSpliceEndAfterSilence(t *testing.T) {
	if testing.Short() {
		t.Skip("takes 11 s")
	}
	eachKind(t, func(t *testing.T, kind string) {
		s := splice(t, kind, time.Minute)
		select {
		case r := <-s.result:
			t.Fatalf("Splice returned %d, %v", r.n, r.err)
		case <-time.After(11 * time.Second):
		}
		s.target.CloseWrite()
		if got, err := io.ReadAll(s.scraper); len(got) != 0 || err != nil {
			t.Errorf("the scraper read %q, %v", got, err)
		}
		io.WriteString(s.scraper, "goodbye")
		s.scraper.CloseWrite()
		if got, err := io.ReadAll(s.target); string(got) != "goodbye" || err != nil {
			t.Errorf("the target read %q, %v", got, err)
		}
		if r := await(t, "Splice", s.result); r.err != nil {
			t.Errorf("Splice returned %v", r.err)
		}
	})
}

func TestSpliceIdle(t *testing.T) {
	eachKind(t, func(t *testing.T, kind string) {
		s := splice(t, kind, 100*time.Millisecond)
		io.WriteString(s.target, "hello")
		if r := await(t, "Splice", s.result); !errors.Is(r.err, protocol.ErrIdle) || r.n != 5 {
			t.Errorf("Splice returned %d, %v", r.n, r.err)
		}
	})
}

// TestSpliceIsBusyWithOneDirection: a long response needs no more requests.
func TestSpliceIsBusyWithOneDirection(t *testing.T) {
	eachKind(t, func(t *testing.T, kind string) {
		const idle = 400 * time.Millisecond
		s := splice(t, kind, idle)
		for end := time.Now().Add(3 * idle); time.Now().Before(end); {
			if _, err := s.target.Write([]byte("a")); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(s.scraper, make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
			select {
			case r := <-s.result:
				t.Fatalf("Splice returned %d, %v", r.n, r.err)
			case <-time.After(idle / 20):
			}
		}
		s.scraper.CloseWrite()
		s.target.CloseWrite()
		if r := await(t, "Splice", s.result); r.err != nil {
			t.Errorf("Splice returned %v", r.err)
		}
	})
}

func TestSpliceErrors(t *testing.T) {
	t.Run("the scraper resets", func(t *testing.T) {
		eachKind(t, func(t *testing.T, kind string) {
			s := splice(t, kind, patience)
			protocol.Reset(s.scraper)
			s.scraper.Close()
			if r := await(t, "Splice", s.result); r.err == nil {
				t.Error("Splice returned no error")
			}
			if _, err := s.target.Read(make([]byte, 1)); err == nil {
				t.Error("the target's connection is still open")
			}
		})
	})
	t.Run("the target resets", func(t *testing.T) {
		s := splice(t, "tcp", patience)
		protocol.Reset(s.target)
		s.target.Close()
		if r := await(t, "Splice", s.result); r.err == nil || protocol.IsSessionEnd(r.err) {
			t.Errorf("Splice returned %v", r.err)
		}
	})
	t.Run("the session ends", func(t *testing.T) {
		s := splice(t, "stream", patience)
		io.WriteString(s.target, "half")
		if _, err := io.ReadFull(s.scraper, make([]byte, 4)); err != nil {
			t.Fatal(err)
		}
		s.tunnel.relay.cut()
		if r := await(t, "Splice", s.result); !protocol.IsSessionEnd(r.err) || r.n != 4 {
			t.Errorf("Splice returned %d, %v", r.n, r.err)
		}
	})
	t.Run("the scraper reads nothing", func(t *testing.T) {
		eachKind(t, func(t *testing.T, kind string) {
			s := splice(t, kind, 300*time.Millisecond)
			written := make(chan struct{})
			go func() {
				defer close(written)
				for {
					if _, err := s.target.Write(make([]byte, 64<<10)); err != nil {
						return
					}
				}
			}()
			if r := await(t, "Splice", s.result); r.err == nil {
				t.Error("Splice returned no error")
			}
			s.target.Close() // where it is a stream, it would notice after 10 s
			await(t, "the target's write", written)
		})
	})
}

func TestPassAhead(t *testing.T) {
	r := bufio.NewReader(strings.NewReader("head\nbody"))
	if _, err := r.ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	var got bytes.Buffer
	if err := protocol.PassAhead(&got, r); err != nil || got.String() != "body" {
		t.Errorf("%q, %v", &got, err)
	}
	got.Reset()
	if err := protocol.PassAhead(&got, bufio.NewReader(strings.NewReader("unread"))); err != nil || got.Len() != 0 {
		t.Errorf("%q, %v: nothing was buffered", &got, err)
	}
}

func TestBuffers(t *testing.T) {
	b := protocol.Buffers.Get()
	if len(b) != 64<<10 {
		t.Errorf("%d bytes", len(b))
	}
	protocol.Buffers.Put(b[:10])
	protocol.Buffers.Put(make([]byte, 5)) // not from there: left alone
	for range 10 {
		if b := protocol.Buffers.Get(); len(b) != 64<<10 {
			t.Errorf("%d bytes", len(b))
		}
	}
}
