package protocol_test

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/culvert-io/culvert/protocol"
)

// upgradeRequest is the example of SPEC.md.
const upgradeRequest = "GET /tunnel HTTP/1.1\r\n" +
	"Host: proxy.example.net:8080\r\n" +
	"Connection: Upgrade\r\n" +
	"Upgrade: culvert/1\r\n" +
	"Culvert-Agent: web-1.example.net\r\n" +
	"Culvert-Instance: 6f1c0a5b9d3e4f708192a3b4c5d6e7f8\r\n" +
	"\r\n"

// frame types and flags of yamux.
const (
	typeData, typeWindow, typePing, typeGoAway = 0, 1, 2, 3
	flagSYN, flagACK, flagFIN, flagRST         = 1, 2, 4, 8
)

func frame(kind byte, flags uint16, stream, length uint32, body ...byte) []byte {
	f := append([]byte{0, kind}, make([]byte, 10, 10+len(body))...)
	binary.BigEndian.PutUint16(f[2:], flags)
	binary.BigEndian.PutUint32(f[4:], stream)
	binary.BigEndian.PutUint32(f[8:], length)
	return append(f, body...)
}

func frames(all ...[]byte) []byte { return bytes.Join(all, nil) }

// byHand does the handshake without the Dialer, and returns the connection and
// the proxy's session.
func (tu tunnel) byHand(t testing.TB) (net.Conn, *bufio.Reader, *protocol.Session) {
	t.Helper()
	server, accepted := tu.serve(t)
	conn, err := net.Dial("tcp", server.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(2 * patience))
	io.WriteString(conn, upgradeRequest)
	r := bufio.NewReader(conn)
	resp, err := http.ReadResponse(r, nil)
	if err != nil || resp.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("%v, %v", resp, err)
	}
	return conn, r, session(t, accepted)
}

// TestExamplesOfTheSpecification checks the bytes that SPEC.md shows.
func TestExamplesOfTheSpecification(t *testing.T) {
	server, accepted := tunnel{}.serve(t)
	conn, err := net.Dial("tcp", server.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	io.WriteString(conn, upgradeRequest)
	answer := "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: culvert/1\r\nCulvert-Proxy: proxy-1\r\n\r\n"
	expect := func(what, want string) {
		t.Helper()
		got := make([]byte, len(want))
		if _, err := io.ReadFull(conn, got); err != nil || string(got) != want {
			t.Fatalf("%s: %v\ngot  %x\nwant %x", what, err, got, want)
		}
	}
	expect("answer", answer)
	s := session(t, accepted)
	if s.Agent != "web-1.example.net" || s.Instance != "6f1c0a5b9d3e4f708192a3b4c5d6e7f8" {
		t.Errorf("agent %q, instance %q", s.Agent, s.Instance)
	}

	done := make(chan struct{})
	go func() {
		defer close(done)
		stream, err := s.Open(t.Context())
		if err != nil {
			t.Error(err)
			return
		}
		io.WriteString(stream, "GET http://web-1.example.net:9100/metrics HTTP/1.1\r\n")
		stream.Close()
	}()
	bytesOf := func(text string) string {
		b, err := hex.DecodeString(strings.ReplaceAll(text, " ", ""))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	expect("the proxy's SYN", bytesOf("00 01 0001 00000002 005c0000"))
	expect("request", bytesOf("00 00 0000 00000002 00000034")+"GET http://web-1.example.net:9100/metrics HTTP/1.1\r\n")
	expect("FIN", bytesOf("00 01 0004 00000002 00000000"))
	conn.Write([]byte(bytesOf("00 02 0001 00000000 00000007")))
	expect("ping's answer", bytesOf("00 02 0002 00000000 00000007"))
	<-done
}

// TestFramesBehindTheUpgrade: an agent may send frames before it has read 101.
func TestFramesBehindTheUpgrade(t *testing.T) {
	server, accepted := tunnel{}.serve(t)
	conn, err := net.Dial("tcp", server.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	body := bytes.Repeat([]byte("early "), 100)
	conn.Write(frames([]byte(upgradeRequest), frame(typeWindow, flagSYN, 1, 0), frame(typeData, 0, 1, 600, body...)))
	s := session(t, accepted)
	stream, err := s.Accept(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	got := make([]byte, len(body))
	if _, err := io.ReadFull(stream, got); err != nil || !bytes.Equal(got, body) {
		t.Errorf("%q, %v", got, err)
	}
}

// TestFramesLeaveInOneWrite counts what reaches the connection: the header of a
// frame never goes alone.
func TestFramesLeaveInOneWrite(t *testing.T) {
	sizes := []int{1, 11, 12, 13, 5000, 64 << 10, 200_000}
	t.Run("joined", func(t *testing.T) {
		var writes writeLog
		p := tunnel{wrap: func(c net.Conn) net.Conn { return &loggedConn{c, &writes} }}.open(t)
		serve(t, p.agent, echo)
		writes.reset()
		exchange(t, p.proxy, sizes)
		var data int
		for _, w := range writes.all() {
			if len(w) < 12 || len(w) != 12+dataLength(w) {
				t.Fatalf("a write of %d bytes starts with %x", len(w), w[:min(12, len(w))])
			}
			if dataLength(w) > 64<<10 {
				t.Errorf("a frame of %d bytes", dataLength(w))
			}
			data += dataLength(w)
		}
		total := 0
		for _, n := range sizes {
			total += n
		}
		if data != total {
			t.Errorf("%d bytes of data were written, want %d", data, total)
		}
	})
	t.Run("vectored", func(t *testing.T) {
		p := tunnel{relayed: true}.open(t)
		serve(t, p.agent, echo)
		var chunks writeLog
		p.relay.toAgent.watch(chunks.add)
		p.relay.toProxy.watch(chunks.add) // the other end's way is the same
		for range 200 {
			exchange(t, p.proxy, []int{100})
		}
		for _, c := range chunks.all() {
			for rest := c; len(rest) > 0; rest = rest[12+dataLength(rest):] {
				if len(rest) < 12 || len(rest) < 12+dataLength(rest) {
					t.Fatalf("one read brought %d bytes that end in %x", len(c), rest[:min(12, len(rest))])
				}
			}
		}
	})
	t.Run("websocket", func(t *testing.T) {
		server, accepted := tunnel{}.serve(t)
		ws, resp, err := websocket.Dial(t.Context(), server.URL+"/tunnel", &websocket.DialOptions{
			Subprotocols: []string{"chat", "culvert.v1"},
			HTTPHeader:   http.Header{"Culvert-Agent": {"Web-1.Example.Net."}, "Culvert-Instance": {"6f1c"}},
		})
		if err != nil {
			t.Fatal(err)
		}
		defer ws.CloseNow()
		if got := resp.Header.Get("Culvert-Proxy"); got != "proxy-1" || ws.Subprotocol() != "culvert.v1" {
			t.Errorf("Culvert-Proxy %q, subprotocol %q", got, ws.Subprotocol())
		}
		ws.SetReadLimit(-1)
		s := session(t, accepted)
		if s.Agent != "web-1.example.net" || s.Transport != "websocket" {
			t.Errorf("agent %q, transport %q", s.Agent, s.Transport)
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			stream, err := s.Open(t.Context())
			if err != nil {
				t.Error(err)
				return
			}
			stream.Write(make([]byte, 100_000))
			stream.Close()
		}()
		for _, want := range [][]byte{
			frame(typeWindow, flagSYN, 2, 0x5c0000),
			frame(typeData, 0, 2, 64<<10), frame(typeData, 0, 2, 100_000-64<<10),
			frame(typeWindow, flagFIN, 2, 0),
		} {
			kind, message, err := ws.Read(t.Context())
			if err != nil || kind != websocket.MessageBinary || !bytes.HasPrefix(message, want) || len(message) != 12+dataLength(want) {
				t.Fatalf("a message of %d bytes, %v, %v; want %x", len(message), kind, err, want)
			}
		}
		<-done
	})
}

// dataLength is the length of the body behind a frame's header.
func dataLength(frame []byte) int {
	if len(frame) < 12 || frame[1] != typeData {
		return 0
	}
	return int(binary.BigEndian.Uint32(frame[8:]))
}

// exchange sends messages of the sizes through an echo and back.
func exchange(t testing.TB, s *protocol.Session, sizes []int) {
	t.Helper()
	stream, err := s.Open(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	for _, n := range sizes {
		message := bytes.Repeat([]byte{'m'}, n)
		go stream.Write(message)
		if _, err := io.ReadFull(stream, message); err != nil {
			t.Fatal(err)
		}
	}
}

// writeLog keeps copies of what was written.
type writeLog struct {
	mu     sync.Mutex // protects writes
	writes [][]byte
}

func (l *writeLog) add(p []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.writes = append(l.writes, bytes.Clone(p))
}

func (l *writeLog) reset() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.writes = nil
}

func (l *writeLog) all() [][]byte {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.writes
}

type loggedConn struct {
	net.Conn
	log *writeLog
}

func (c *loggedConn) Write(p []byte) (int, error) {
	c.log.add(p)
	return c.Conn.Write(p)
}

// TestBrokenFrames: what is no yamux ends the session, with a reason that says
// so, and harms nothing else.
func TestBrokenFrames(t *testing.T) {
	open := frame(typeWindow, flagSYN, 1, 0)
	cases := map[string][]byte{
		"text":              []byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
		"TLS":               {0x16, 0x03, 0x01, 0x02, 0x00, 0x01, 0x00, 0x01, 0xfc, 0x03, 0x03, 0x00},
		"another version":   {1, typePing, 0, flagSYN, 0, 0, 0, 0, 0, 0, 0, 1},
		"unknown type":      frame(4, 0, 0, 0),
		"unknown GoAway":    frame(typeGoAway, 0, 0, 77),
		"stream twice":      frames(open, open),
		"beyond the window": frames(open, frame(typeData, 0, 1, 1<<31)),
		"two FINs":          frames(open, frame(typeWindow, flagFIN, 1, 0), frame(typeWindow, flagFIN, 1, 0)),
	}
	for name, sent := range cases {
		t.Run(name, func(t *testing.T) {
			conn, r, s := tunnel{}.byHand(t)
			conn.Write(sent)
			await(t, "end of the session", s.Done())
			if err := s.Err(); err == nil {
				t.Error("the session ended without an error")
			} else if errors.Is(err, protocol.ErrPeerClosed) || protocol.EndReason(err) != "error" {
				t.Errorf("the session ended with %q (%q): nobody closed it, the frames were wrong", err, protocol.EndReason(err))
			}
			if _, err := io.Copy(io.Discard, r); errors.Is(err, net.ErrClosed) {
				t.Errorf("the connection is still open: %v", err)
			}
			if _, err := s.Open(t.Context()); err == nil {
				t.Error("a stream could be opened")
			}
		})
	}
}

// TestGoAway: the tunnel has a message of its own for draining. GoAway means that
// the other side is done with this session, whatever code it carries.
func TestGoAway(t *testing.T) {
	for code := range uint32(3) {
		t.Run(fmt.Sprint(code), func(t *testing.T) {
			conn, r, s := tunnel{}.byHand(t)
			conn.Write(frames(frame(typeGoAway, 0, 0, code), frame(typePing, flagSYN, 0, 1)))
			io.ReadFull(r, make([]byte, 12)) // an answer, or the end: it has read the GoAway
			if _, err := s.Open(t.Context()); err == nil {
				t.Error("a stream could be opened")
			}
			await(t, "end of the session", s.Done())
			if s.Err() == nil {
				t.Error("the session ended without an error")
			}
		})
	}
}

// TestResetStream: a reset is an error, not an end.
func TestResetStream(t *testing.T) {
	conn, _, s := tunnel{}.byHand(t)
	conn.Write(frames(frame(typeWindow, flagSYN, 1, 0), frame(typeData, 0, 1, 4, []byte("half")...), frame(typeWindow, flagRST, 1, 0)))
	stream, err := s.Accept(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	if got, err := io.ReadAll(stream); err == nil {
		t.Errorf("read %q and a clean end of a stream that was reset", got)
	}
	if s.Err() != nil {
		t.Errorf("the session ended with it: %v", s.Err())
	}
}

func TestTextMessagesEndAWebSocketSession(t *testing.T) {
	server, accepted := tunnel{}.serve(t)
	ws, _, err := websocket.Dial(t.Context(), server.URL+"/tunnel", &websocket.DialOptions{Subprotocols: []string{"culvert.v1"}})
	if err != nil {
		t.Fatal(err)
	}
	defer ws.CloseNow()
	s := session(t, accepted)
	ws.Write(t.Context(), websocket.MessageText, frame(typePing, flagSYN, 0, 1))
	await(t, "end of the session", s.Done())
	if s.Err() == nil {
		t.Error("the session ended without an error")
	}
}

// TestMessagesNeedNotBeFrames: a WebSocket relay may cut and join messages.
func TestMessagesNeedNotBeFrames(t *testing.T) {
	server, accepted := tunnel{}.serve(t)
	ws, _, err := websocket.Dial(t.Context(), server.URL+"/tunnel", &websocket.DialOptions{Subprotocols: []string{"culvert.v1"}})
	if err != nil {
		t.Fatal(err)
	}
	defer ws.CloseNow()
	s := session(t, accepted)
	for _, b := range frames(frame(typeWindow, flagSYN, 1, 0), frame(typeData, flagFIN, 1, 5, []byte("hello")...)) {
		ws.Write(t.Context(), websocket.MessageBinary, []byte{b})
		ws.Write(t.Context(), websocket.MessageBinary, nil)
	}
	stream, err := s.Accept(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	if got, err := io.ReadAll(stream); string(got) != "hello" || err != nil {
		t.Errorf("read %q, %v", got, err)
	}
}

// TestBrokenConnection breaks connections while frames are being written.
func TestBrokenConnection(t *testing.T) {
	for range 10 {
		p := tunnel{relayed: true, wrap: smallBuffer}.open(t)
		near, _ := streams(t, p.proxy, p.agent)
		p.relay.toAgent.stop()
		var writes sync.WaitGroup
		writes.Go(func() {
			for {
				if _, err := near.Write(make([]byte, 64<<10)); err != nil {
					if !protocol.IsSessionEnd(err) {
						t.Errorf("write: %v does not tell that the session ended", err)
					}
					return
				}
			}
		})
		jam(t, p.proxy)
		p.relay.cut()
		writes.Wait()
		if t.Failed() {
			return
		}
	}
}
