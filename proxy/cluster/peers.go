package cluster

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/culvert-io/culvert/proxy/fleet"
)

// A scrape goes to the proxy that holds the agent in absolute form or as CONNECT, to the
// listener that is for proxies alone. That one passes it to the agent, and never on to
// another proxy. Header fields of ours, which go no further:
const (
	HeaderPeer    = "Culvert-Peer"         // the sender's ID
	HeaderAgent   = "Culvert-Peer-Agent"   // the agent that the sender has chosen
	HeaderTimeout = "Culvert-Peer-Timeout" // how long the scrape may take, in seconds
	HeaderHeld    = "Culvert-Peer-Held"    // "no" in an answer: there is no session of the agent here
)

// PathAlive takes the question whether an agent answers: POST of an aliveQuestion.
const PathAlive = "/v1/alive"

// PathPush takes the push of a PushProx client whose scrape the proxy has: see Push.
const PathPush = "/v1/push"

type aliveQuestion struct {
	Agent    string `json:"agent"`
	Instance string `json:"instance"` // hashed
}

type aliveAnswer struct {
	Alive bool `json:"alive"`
}

const (
	peerDialTimeout = 3 * time.Second
	// peerIdle is longer than common scrape intervals.
	peerIdle = 6 * time.Minute
)

func newPeerTransport(config *tls.Config) *http.Transport {
	return &http.Transport{
		DialContext:         (&net.Dialer{Timeout: peerDialTimeout}).DialContext,
		TLSClientConfig:     config,
		TLSHandshakeTimeout: peerDialTimeout,
		TLSNextProto:        map[string]func(string, *tls.Conn) http.RoundTripper{}, // HTTP/1.1 alone: CONNECT and absolute form
		DisableCompression:  true,
		MaxIdleConnsPerHost: 256,
		IdleConnTimeout:     peerIdle,
		WriteBufferSize:     4 << 10,
		ReadBufferSize:      64 << 10,
	}
}

// ErrUnreachable: another proxy can't be reached, or is none of this cluster.
var ErrUnreachable = errors.New("the proxy can't be reached")

// address returns the base URL of a proxy.
func (c *Cluster) address(proxy string) (*url.URL, error) {
	peer, ok := c.Peer(proxy)
	if !ok {
		return nil, fmt.Errorf("%w: it has just gone", ErrUnreachable)
	}
	u, err := url.Parse(peer.URL)
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		return nil, fmt.Errorf("%w: %q is no URL; see its --cluster.advertise-url", ErrUnreachable, peer.URL)
	}
	return u, nil
}

// credentials adds to a request what the other proxy wants to see.
func (c *Cluster) credentials(h http.Header, agent string, timeout time.Duration) {
	h.Set("Proxy-Authorization", "Bearer "+c.Secret())
	h.Set(HeaderPeer, c.self.ID)
	h.Set(HeaderAgent, agent)
	h.Set(HeaderTimeout, strconv.FormatFloat(timeout.Seconds(), 'f', 3, 64))
}

// RoundTrip sends a scrape, whose URL is in opaque form, to the proxy that holds the
// agent. It returns ErrUnreachable where the proxy gave no answer. It does not wait for
// one that is silent while better says that there is a better way.
func (c *Cluster) RoundTrip(req *http.Request, proxy, agent string, timeout time.Duration, better func() bool) (*http.Response, error) {
	base, err := c.address(proxy)
	if err != nil {
		return nil, err
	}
	ctx, answered := c.unlessSilent(req.Context(), proxy, better)
	defer answered()
	out := req.WithContext(ctx)
	out.URL = &url.URL{Scheme: base.Scheme, Host: base.Host, Opaque: req.URL.Opaque}
	out.Header = req.Header.Clone()
	c.credentials(out.Header, agent, timeout)
	resp, err := c.peerHTTP.RoundTrip(out)
	if err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrUnreachable, base.Host, cmp.Or(context.Cause(ctx), err))
	}
	return resp, nil
}

// Connect sends a CONNECT to the proxy that holds the agent. Where that one agrees, it
// returns the connection and the reader that may hold what the target has said; else
// the answer. It returns ErrUnreachable where the proxy gave no answer; better is as for
// RoundTrip.
func (c *Cluster) Connect(ctx context.Context, proxy, agent, authority string, timeout time.Duration, better func() bool) (net.Conn, *bufio.Reader, *http.Response, error) {
	base, err := c.address(proxy)
	if err != nil {
		return nil, nil, nil, err
	}
	ctx, answered := c.unlessSilent(ctx, proxy, better)
	defer answered()
	fail := func(err error) (net.Conn, *bufio.Reader, *http.Response, error) {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return nil, nil, nil, fmt.Errorf("%w: %s: %w", ErrUnreachable, base.Host, err)
	}
	address := base.Host
	if base.Port() == "" {
		address = net.JoinHostPort(base.Hostname(), map[string]string{"http": "80", "https": "443"}[base.Scheme])
	}
	dialCtx, cancel := context.WithTimeout(ctx, peerDialTimeout)
	defer cancel()
	conn, err := c.peerHTTP.DialContext(dialCtx, "tcp", address)
	if err != nil {
		return fail(err)
	}
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if base.Scheme == "https" {
		config := c.peerHTTP.TLSClientConfig.Clone()
		config.ServerName, config.NextProtos = base.Hostname(), []string{"http/1.1"}
		secured := tls.Client(conn, config)
		if err := secured.HandshakeContext(dialCtx); err != nil {
			conn.Close()
			return fail(err)
		}
		conn = secured
	}
	req := &http.Request{Method: http.MethodConnect, URL: &url.URL{Opaque: authority}, Host: authority, Header: http.Header{}}
	c.credentials(req.Header, agent, timeout)
	err = req.Write(conn)
	r := bufio.NewReader(conn)
	var resp *http.Response
	if err == nil {
		resp, err = http.ReadResponse(r, req)
	}
	if err != nil {
		conn.Close()
		return fail(err)
	}
	if resp.StatusCode != http.StatusOK {
		conn.Close()
		return nil, nil, resp, nil
	}
	if !stop() {
		conn.Close()
		return fail(context.Cause(ctx))
	}
	return conn, r, resp, nil
}

// alive asks the proxy that holds a session whether the agent answers.
func (c *Cluster) alive(ctx context.Context, agent string, held fleet.Held) (bool, error) {
	base, err := c.address(held.Proxy)
	if err != nil {
		return false, err
	}
	question, err := json.Marshal(aliveQuestion{agent, held.Instance})
	if err != nil {
		return false, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, base.JoinPath(PathAlive).String(), bytes.NewReader(question))
	if err != nil {
		return false, err
	}
	c.credentials(req.Header, agent, 0)
	resp, err := c.peerHTTP.RoundTrip(req)
	if err != nil {
		return false, err
	}
	defer resp.Body.Close()
	var answer aliveAnswer
	if resp.StatusCode != http.StatusOK {
		return false, fmt.Errorf("%s answered %s", base.Host, resp.Status)
	}
	err = json.NewDecoder(io.LimitReader(resp.Body, 1<<10)).Decode(&answer)
	return answer.Alive, err
}

// ServeAlive answers the question of another proxy.
func (c *Cluster) ServeAlive(w http.ResponseWriter, r *http.Request, f *fleet.Fleet) {
	var question aliveQuestion
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 1<<12)).Decode(&question); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(aliveAnswer{f.AliveHere(r.Context(), question.Agent, question.Instance)})
}

// Push passes the push of a PushProx client on to the proxy that has its scrape, and
// returns the status of the answer. It returns ErrUnreachable where the proxy gave none.
func (c *Cluster) Push(ctx context.Context, proxy, agent string, body io.Reader) (int, error) {
	base, err := c.address(proxy)
	if err != nil {
		return 0, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, base.JoinPath(PathPush).String(), io.NopCloser(body))
	if err != nil {
		return 0, err
	}
	c.credentials(req.Header, agent, 0)
	resp, err := c.peerHTTP.RoundTrip(req)
	if err != nil {
		return 0, fmt.Errorf("%w: %s: %w", ErrUnreachable, base.Host, err)
	}
	resp.Body.Close()
	return resp.StatusCode, nil
}

// Authorized reports whether a request is from a proxy of the cluster.
func (c *Cluster) Authorized(r *http.Request) bool {
	secret := c.Secret()
	shown, ok := strings.CutPrefix(r.Header.Get("Proxy-Authorization"), "Bearer ")
	want, got := sha256.Sum256([]byte(secret)), sha256.Sum256([]byte(shown))
	return subtle.ConstantTimeCompare(want[:], got[:]) == 1 && ok && secret != ""
}

// ClearHeader removes what is between proxies alone.
func ClearHeader(h http.Header) {
	for _, field := range []string{"Proxy-Authorization", HeaderPeer, HeaderAgent, HeaderTimeout, HeaderHeld} {
		h.Del(field)
	}
}

func readPool(file string) (*x509.CertPool, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(text) {
		return nil, fmt.Errorf("%s holds no certificate in PEM form", file)
	}
	return pool, nil
}
