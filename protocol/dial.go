package protocol

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/coder/websocket"
)

// Dialer opens sessions to one proxy. It may be used again and again, not at the
// same time; it remembers which transport worked.
type Dialer struct {
	// ProxyURL is the base URL of the proxy, http or https. A path in it stands
	// before /tunnel; user information is sent as basic authorization.
	ProxyURL *url.URL
	// Host is connected to in place of the URL's, where it is not empty. What is said to
	// the proxy, and the name in its certificate, are the URL's all the same. It has no
	// effect where a forward proxy of the environment is used.
	Host string
	// Agent and Instance name who dials.
	Agent, Instance string
	// Header is sent with the upgrade as well.
	Header http.Header
	// Token, where it is not nil, is asked before each handshake for a bearer token, which
	// is sent as authorization.
	Token func() (string, error)
	// Key, where it is not nil, is asked before each handshake for the agent's own secret:
	// see HeaderKey.
	Key func() (string, error)
	// TLS is for https. Nil means the defaults of crypto/tls.
	TLS *tls.Config
	// Timeout bounds the whole handshake, 30 s by default.
	Timeout time.Duration
	// Session tunes the sessions.
	Session SessionConfig

	bearer    string // what Token returned
	key       string // what Key returned
	webSocket bool   // the raw upgrade failed where WebSocket worked
}

// HandshakeError tells why a handshake failed, for each transport that was tried.
type HandshakeError struct {
	// Transport is "upgrade" or "websocket": the last one that was tried.
	Transport string
	// Err is a *Refusal where an HTTP answer came, else an error of the network.
	// The Refusal's Code is empty where the answer was not a culvert-proxy's.
	Err error
	// Before is the failure of the raw upgrade where WebSocket was tried after it.
	Before *HandshakeError
}

func (e *HandshakeError) Error() string {
	if e.Before != nil && e.Before.Err.Error() == e.Err.Error() {
		return fmt.Sprintf("%s and %s: %v", e.Before.Transport, e.Transport, e.Err)
	}
	if e.Before != nil {
		return fmt.Sprintf("%v; then %s: %v", e.Before, e.Transport, e.Err)
	}
	return fmt.Sprintf("%s: %v", e.Transport, e.Err)
}

// Unwrap returns the last failure.
func (e *HandshakeError) Unwrap() error { return e.Err }

// Dial does the handshake. It tries the raw upgrade first, and WebSocket where
// the answer shows that something between refused the upgrade, which is
// remembered for the next time, or where the connection broke off instead of an
// answer. It returns a *HandshakeError, ctx's cause, or the error of Token or
// Key.
// The environment's HTTPS_PROXY, HTTP_PROXY and NO_PROXY are honoured.
func (d *Dialer) Dial(ctx context.Context) (*Session, error) {
	timeout := d.Timeout
	if timeout == 0 {
		timeout = 30 * time.Second
	}
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("no answer within %s", timeout))
	defer cancel()
	if d.Token != nil {
		var err error
		if d.bearer, err = d.Token(); err != nil {
			return nil, fmt.Errorf("token: %w", err)
		}
	}
	if d.Key != nil {
		var err error
		if d.key, err = d.Key(); err != nil {
			return nil, fmt.Errorf("key: %w", err)
		}
	}
	var before *HandshakeError
	remember := true
	if !d.webSocket {
		s, err := d.dialRaw(ctx)
		if err == nil {
			return s, nil
		}
		before = &HandshakeError{Transport: "upgrade", Err: err}
		refusal, answered := AsRefusal(err)
		cut := errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET)
		refused := answered && (refusal.Code == "" || refusal.Code == CodeNoUpgrade)
		if !cut && !refused {
			return nil, before
		}
		remember = refused
	}
	s, err := d.dialWebSocket(ctx)
	if err != nil {
		d.webSocket = false
		return nil, &HandshakeError{Transport: "websocket", Err: err, Before: before}
	}
	d.webSocket = remember
	return s, nil
}

// NoTunnel reports whether a handshake failed because something that is no culvert-proxy
// answered 404 to each try: there is no /tunnel at this URL.
func NoTunnel(err error) bool {
	handshake, ok := errors.AsType[*HandshakeError](err)
	if !ok {
		return false
	}
	for ; handshake != nil; handshake = handshake.Before {
		if refusal, ok := AsRefusal(handshake.Err); !ok || refusal.Status != http.StatusNotFound || refusal.Code != "" {
			return false
		}
	}
	return true
}

// dialRaw returns a *Refusal for any answer but 101.
func (d *Dialer) dialRaw(ctx context.Context) (*Session, error) {
	transport, tcp := d.transport()
	// The context of the request must not end with the handshake: it would take
	// the connection along.
	reqCtx, abort := context.WithCancelCause(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, func() { abort(context.Cause(ctx)) })
	req, err := http.NewRequestWithContext(reqCtx, http.MethodGet, d.tunnelURL(), nil)
	if err != nil {
		stop()
		return nil, err
	}
	req.Header = d.header()
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", UpgradeToken)
	resp, err := transport.RoundTrip(req)
	if err == nil && resp.StatusCode != http.StatusSwitchingProtocols {
		err = readRefusal(resp)
	}
	if !stop() && err == nil {
		resp.Body.Close()
		err = context.Cause(ctx)
	}
	if err != nil {
		abort(err)
		transport.CloseIdleConnections()
		return nil, unwrapCause(reqCtx, err)
	}
	rw, ok := resp.Body.(io.ReadWriteCloser)
	if got := resp.Header.Get("Upgrade"); !ok || !strings.EqualFold(got, UpgradeToken) {
		resp.Body.Close()
		return nil, &Refusal{Status: resp.StatusCode, Message: fmt.Sprintf("the answer upgrades to %q, not to %s", got, UpgradeToken)}
	}
	conn := &frameConn{rw: rw, socket: tcp.Load()}
	if forward, err := http.ProxyFromEnvironment(req); d.ProxyURL.Scheme == "http" && forward == nil && err == nil {
		conn.tcp = tcp.Load() // nothing encrypts above it
	}
	return d.session(conn, resp, "upgrade")
}

func (d *Dialer) dialWebSocket(ctx context.Context) (*Session, error) {
	transport, tcp := d.transport()
	ws, resp, err := websocket.Dial(ctx, d.tunnelURL(), &websocket.DialOptions{
		HTTPClient: &http.Client{
			Transport:     transport,
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
		HTTPHeader:   d.header(),
		Subprotocols: []string{Subprotocol},
	})
	if err != nil {
		defer transport.CloseIdleConnections()
		if resp != nil && resp.StatusCode != http.StatusSwitchingProtocols {
			return nil, readRefusal(resp)
		}
		return nil, unwrapCause(ctx, err)
	}
	if ws.Subprotocol() != Subprotocol {
		ws.CloseNow()
		return nil, &Refusal{Status: resp.StatusCode, Message: "the WebSocket server doesn't speak " + Subprotocol}
	}
	return d.session(&frameConn{rw: newMessageConn(ws), socket: tcp.Load()}, resp, "websocket")
}

func (d *Dialer) session(conn *frameConn, resp *http.Response, transport string) (*Session, error) {
	s, err := newSession(conn, d.Session, true)
	if err != nil {
		return nil, err
	}
	s.Agent, s.Instance = d.Agent, d.Instance
	s.Proxy = resp.Header.Get(HeaderProxy)
	s.Transport = transport
	s.RemoteAddr = d.ProxyURL.Host
	return s, nil
}

func (d *Dialer) tunnelURL() string {
	u := *d.ProxyURL
	u.User = nil
	return u.JoinPath(PathTunnel).String()
}

// Authorization returns the header field that a handshake has, "" for none: for requests
// to the proxy that are not of a session. It returns the error of Token.
func (d *Dialer) Authorization() (string, error) {
	bearer := ""
	if d.Token != nil {
		var err error
		if bearer, err = d.Token(); err != nil {
			return "", fmt.Errorf("token: %w", err)
		}
	}
	return d.authorization(bearer), nil
}

func (d *Dialer) authorization(bearer string) string {
	if bearer != "" {
		return "Bearer " + bearer
	}
	if user := d.ProxyURL.User; user != nil && d.Header.Get("Authorization") == "" {
		password, _ := user.Password()
		r := http.Request{Header: http.Header{}}
		r.SetBasicAuth(user.Username(), password)
		return r.Header.Get("Authorization")
	}
	return d.Header.Get("Authorization")
}

func (d *Dialer) header() http.Header {
	h := d.Header.Clone()
	if h == nil {
		h = http.Header{}
	}
	if authorization := d.authorization(d.bearer); authorization != "" {
		h.Set("Authorization", authorization)
	}
	if d.key != "" {
		h.Set(HeaderKey, d.key)
	}
	h.Set(HeaderAgent, d.Agent)
	h.Set(HeaderInstance, d.Instance)
	return h
}

// Transport returns a transport that reaches the proxy as a handshake does, by HTTP/1.1:
// for requests that are not of a session.
func (d *Dialer) Transport() *http.Transport {
	transport, _ := d.transport()
	return transport
}

// transport returns a transport for one handshake, and where to find the TCP
// connection that it dialled.
func (d *Dialer) transport() (*http.Transport, *atomic.Pointer[net.TCPConn]) {
	dialled := new(atomic.Pointer[net.TCPConn])
	dialer := &net.Dialer{
		Timeout: 30 * time.Second,
		// An answer may take hours, where it is to a poll.
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 30 * time.Second, Interval: 5 * time.Second, Count: 3},
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	if d.TLS != nil {
		config = d.TLS.Clone()
	}
	config.NextProtos = []string{"http/1.1"}
	return &http.Transport{
		Proxy: http.ProxyFromEnvironment,
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			if host, port, err := net.SplitHostPort(addr); err == nil && d.Host != "" && host == d.ProxyURL.Hostname() {
				addr = net.JoinHostPort(d.Host, port)
			}
			conn, err := dialer.DialContext(ctx, network, addr)
			if tcp, ok := conn.(*net.TCPConn); ok {
				dialled.Store(tcp)
			}
			return conn, err
		},
		TLSClientConfig:     config,
		TLSHandshakeTimeout: 10 * time.Second,
		TLSNextProto:        map[string]func(string, *tls.Conn) http.RoundTripper{},
	}, dialled
}

// readRefusal reads an answer that is not 101. Its Code is empty where the
// answer is not one of a culvert-proxy.
func readRefusal(resp *http.Response) *Refusal {
	defer resp.Body.Close()
	body, _ := io.ReadAll(io.LimitReader(resp.Body, 2048))
	message, _, _ := strings.Cut(strings.TrimSpace(string(body)), "\n")
	r := &Refusal{Status: resp.StatusCode, Code: Code(resp.Header.Get(HeaderError)), Message: message}
	if upgrade := resp.Header.Get("Upgrade"); r.Code == "" && r.Status == http.StatusUpgradeRequired && strings.HasPrefix(upgrade, "culvert/") {
		r.Code = CodeVersion
	}
	if r.Code == "" {
		server := resp.Header.Get("Server")
		if server == "" {
			server = "something that is no culvert-proxy"
		}
		r.Message = fmt.Sprintf("%s answered %s", server, resp.Status)
		if location := resp.Header.Get("Location"); location != "" && resp.StatusCode/100 == 3 {
			r.Message += fmt.Sprintf(" to %q; use that in the proxy's URL, without /tunnel", oneLine(location))
		}
	}
	if seconds, err := strconv.Atoi(resp.Header.Get("Retry-After")); err == nil && seconds >= 0 {
		r.RetryAfter = time.Duration(min(seconds, 3600)) * time.Second
	}
	return r
}

// unwrapCause prefers the reason that ended ctx to "context canceled".
func unwrapCause(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil && (errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)) {
		return cause
	}
	return err
}
