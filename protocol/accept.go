package protocol

import (
	"bufio"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/coder/websocket"
)

// CheckUpgrade reports how a request for PathTunnel asks for the tunnel:
// "upgrade", "websocket", or a refusal that tells what is wrong with it.
func CheckUpgrade(r *http.Request) (transport string, refusal *Refusal) {
	if r.Method != http.MethodGet {
		return "", Refusef(http.StatusMethodNotAllowed, CodeMethod, "%s %s: the tunnel starts with GET", r.Method, PathTunnel)
	}
	asked := strings.ToLower(strings.Join(r.Header.Values("Upgrade"), ","))
	if !r.ProtoAtLeast(1, 1) || !headerHasToken(r.Header, "Connection", "upgrade") || asked == "" {
		return "", noUpgrade("the request came without its Upgrade header")
	}
	webSocket, otherVersion := false, ""
	for token := range strings.SplitSeq(asked, ",") {
		switch token = strings.TrimSpace(token); {
		case token == UpgradeToken:
			return "upgrade", nil
		case token == "websocket":
			webSocket = true
		case strings.HasPrefix(token, "culvert/"):
			otherVersion = token
		}
	}
	switch {
	case webSocket && r.Header.Get("Sec-WebSocket-Key") != "":
		if headerHasToken(r.Header, "Sec-WebSocket-Protocol", Subprotocol) {
			return "websocket", nil
		}
		return "", Refusef(http.StatusUpgradeRequired, CodeVersion,
			"the WebSocket subprotocols %q are not ours; this proxy speaks %s", r.Header.Get("Sec-WebSocket-Protocol"), Subprotocol)
	case otherVersion != "":
		return "", Refusef(http.StatusUpgradeRequired, CodeVersion,
			"this proxy speaks %s, not %s; install a matching culvert-client", UpgradeToken, otherVersion)
	}
	return "", noUpgrade(fmt.Sprintf("the Upgrade header was replaced by %q", asked))
}

func noUpgrade(what string) *Refusal {
	return Refusef(http.StatusBadRequest, CodeNoUpgrade,
		"%s: something between agent and proxy took it away; nginx needs proxy_http_version 1.1, "+
			"proxy_set_header Upgrade $http_upgrade and proxy_set_header Connection \"upgrade\"", what)
}

func headerHasToken(h http.Header, name, token string) bool {
	for _, v := range h.Values(name) {
		for t := range strings.SplitSeq(v, ",") {
			if strings.EqualFold(strings.TrimSpace(t), token) {
				return true
			}
		}
	}
	return false
}

// Accept answers 101 to a request that CheckUpgrade found good, and returns the
// session. On an error the connection is closed or answered already.
func Accept(w http.ResponseWriter, r *http.Request, transport, proxyID string, config SessionConfig) (*Session, error) {
	if config.PingInterval == 0 {
		config.PingInterval = -1 // the agent pings
	}
	var conn *frameConn
	var err error
	if transport == "websocket" {
		w.Header().Set(HeaderProxy, proxyID)
		var ws *websocket.Conn
		tap := &hijackTap{ResponseWriter: w}
		ws, err = websocket.Accept(tap, r, &websocket.AcceptOptions{
			Subprotocols: []string{Subprotocol},
			// Agents send no Origin, and a page in a browser can't set Culvert-Agent,
			// without which there is no tunnel.
			InsecureSkipVerify: true,
		})
		if err == nil {
			conn = &frameConn{rw: newMessageConn(ws), socket: socketOf(tap.conn)}
		}
	} else {
		conn, err = acceptRaw(w, proxyID)
	}
	if err != nil {
		return nil, fmt.Errorf("accept tunnel: %w", err)
	}
	s, err := newSession(conn, config, false)
	if err != nil {
		return nil, err
	}
	s.Agent = NormalizeName(r.Header.Get(HeaderAgent))
	s.Instance = r.Header.Get(HeaderInstance)
	s.Proxy = proxyID
	s.Transport = transport
	s.RemoteAddr = r.RemoteAddr
	return s, nil
}

func acceptRaw(w http.ResponseWriter, proxyID string) (*frameConn, error) {
	conn, buffered, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return nil, err
	}
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	head := "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: " + UpgradeToken +
		"\r\n" + HeaderProxy + ": " + proxyID + "\r\n\r\n"
	if _, err := io.WriteString(conn, head); err != nil {
		conn.Close()
		return nil, err
	}
	conn.SetDeadline(time.Time{})
	c := &frameConn{rw: conn, socket: socketOf(conn)}
	c.tcp, _ = conn.(*net.TCPConn)
	if n := buffered.Reader.Buffered(); n > 0 {
		c.rw = &prefixConn{Conn: conn, buffered: buffered.Reader, left: n}
	}
	return c, nil
}

// hijackTap tells which connection a handler takes over.
type hijackTap struct {
	http.ResponseWriter
	conn net.Conn
}

func (t *hijackTap) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, buffered, err := http.NewResponseController(t.ResponseWriter).Hijack()
	t.conn = conn
	return conn, buffered, err
}

// socketOf returns the TCP connection below conn, or nil. What wraps one has NetConn, as
// *tls.Conn does.
func socketOf(conn net.Conn) *net.TCPConn {
	for {
		wrapper, ok := conn.(interface{ NetConn() net.Conn })
		if !ok {
			break
		}
		conn = wrapper.NetConn()
	}
	socket, _ := conn.(*net.TCPConn)
	return socket
}

// prefixConn reads what net/http had buffered before it reads on.
type prefixConn struct {
	net.Conn
	buffered *bufio.Reader
	left     int
}

func (c *prefixConn) Read(p []byte) (int, error) {
	if c.left == 0 {
		return c.Conn.Read(p)
	}
	n, err := c.buffered.Read(p[:min(len(p), c.left)])
	c.left -= n
	if c.left == 0 {
		c.buffered = nil
	}
	return n, err
}

// Reset closes conn, a Stream, TCP or TLS over TCP, with a reset instead of an orderly
// end, so that the other side sees a broken transfer. A TLS connection is closed
// below TLS, which would say goodbye in good order.
func Reset(conn net.Conn) {
	if st, ok := conn.(*Stream); ok {
		st.Reset()
		return
	}
	if socket := socketOf(conn); socket != nil {
		socket.SetLinger(0)
		socket.Close()
		return
	}
	if t, ok := conn.(*tls.Conn); ok {
		conn = t.NetConn()
	}
	conn.Close()
}

// IsSessionEnd reports whether err came from the end of a session, and not from
// the stream's own end.
func IsSessionEnd(err error) bool {
	return errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, ErrClosed) || errors.Is(err, ErrPeerClosed) ||
		errors.Is(err, ErrSilent) || errors.Is(err, ErrStuck) || errors.Is(err, ErrProtocol)
}
