package httpclient

import (
	"context"
	"crypto/sha256"
	"fmt"
	"net"
	"net/http"
	"sync"
	"time"
)

// Transport sends requests as a Config says, over HTTP/1.1. It sets Authorization
// where the request has none; oauth2 sets it always.
type Transport struct {
	config Config
	base   *reloading
	oauth2 *tokens // nil without
}

// Dial makes a connection to an address with a port.
type Dial func(ctx context.Context, network, addr string) (net.Conn, error)

// NewTransport returns a transport for the settings, which it validates. It returns
// an error too where a file of TLS can't be used now. All connections are made with
// dial: to who is asked, to an HTTP proxy, to a server of tokens and to whom that
// redirects.
func NewTransport(c Config, dial Dial) (*Transport, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	t := &Transport{config: c, base: &reloading{settings: &c.TLSConfig, transport: http.Transport{
		DialContext:         dial,
		Proxy:               c.Proxy.function(),
		ProxyConnectHeader:  c.Proxy.connectHeader(),
		MaxIdleConns:        20000,
		MaxIdleConnsPerHost: 1000,
		// The compression is a matter between scraper and target.
		DisableCompression:    true,
		IdleConnTimeout:       5 * time.Minute,
		TLSHandshakeTimeout:   10 * time.Second,
		ExpectContinueTimeout: time.Second,
	}}}
	if c.OAuth2 != nil {
		t.oauth2 = newTokens(c.OAuth2, dial)
	}
	_, err := t.base.current()
	return t, err
}

// RoundTrip sends a request. An error tells which file can't be read.
func (t *Transport) RoundTrip(r *http.Request) (*http.Response, error) {
	base, err := t.base.current()
	var signed *http.Request
	if err == nil {
		signed, err = t.sign(r)
	}
	if err != nil {
		if r.Body != nil {
			r.Body.Close()
		}
		return nil, err
	}
	return base.RoundTrip(signed)
}

// sign returns a copy of the request with the header fields that are configured.
func (t *Transport) sign(r *http.Request) (*http.Request, error) {
	signed := *r
	signed.Header = r.Header.Clone()
	if signed.Header == nil {
		signed.Header = http.Header{}
	}
	for name, h := range t.config.HTTPHeaders {
		for _, v := range h.Values {
			signed.Header.Add(name, v)
		}
		for _, v := range h.Secrets {
			signed.Header.Add(name, string(v))
		}
		for _, file := range h.Files {
			v, err := read("", file)
			if err != nil {
				return nil, fmt.Errorf("http_headers: %s: %w", name, err)
			}
			signed.Header.Add(name, v)
		}
	}
	switch basic, authorization := t.config.BasicAuth, t.config.Authorization; {
	case t.oauth2 != nil:
		token, err := t.oauth2.token(r.Context(), r.UserAgent())
		if err != nil {
			return nil, fmt.Errorf("oauth2: %w", err)
		}
		token.SetAuthHeader(&signed)
	case r.Header.Get("Authorization") != "":
	case basic != nil:
		name, err := read(basic.Username, basic.UsernameFile)
		if err != nil {
			return nil, fmt.Errorf("basic_auth: username: %w", err)
		}
		password, err := read(string(basic.Password), basic.PasswordFile)
		if err != nil {
			return nil, fmt.Errorf("basic_auth: password: %w", err)
		}
		signed.SetBasicAuth(name, password)
	case authorization != nil:
		credentials, err := read(string(authorization.Credentials), authorization.CredentialsFile)
		if err != nil {
			return nil, fmt.Errorf("authorization: %w", err)
		}
		signed.Header.Set("Authorization", authorization.Type+" "+credentials)
	}
	return &signed, nil
}

// CloseIdleConnections closes the connections that no request uses.
func (t *Transport) CloseIdleConnections() {
	t.base.closeIdle()
	if t.oauth2 != nil {
		t.oauth2.base.closeIdle()
	}
}

// reloading is a transport that is made anew where the files of its TLS have changed.
type reloading struct {
	settings  *TLSConfig
	transport http.Transport // what it is made from: TLS is missing

	mu   sync.Mutex // protects the following
	made *http.Transport
	sum  [sha256.Size]byte // of the files that it was made with
}

// current returns the transport for the files of now.
func (t *reloading) current() (*http.Transport, error) {
	hash := sha256.New()
	for _, file := range []string{t.settings.CAFile, t.settings.CertFile, t.settings.KeyFile} {
		content, err := read("", file)
		if err != nil {
			return nil, fmt.Errorf("tls_config: %w", err)
		}
		fmt.Fprintf(hash, "%d %s", len(content), content)
	}
	sum := [sha256.Size]byte(hash.Sum(nil))
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.made != nil && t.sum == sum {
		return t.made, nil
	}
	config, err := t.settings.New()
	if err != nil {
		return nil, fmt.Errorf("tls_config: %w", err)
	}
	old := t.made
	t.made, t.sum = t.transport.Clone(), sum
	t.made.TLSClientConfig = config
	t.made.Protocols = new(http.Protocols)
	t.made.Protocols.SetHTTP1(true)
	if old != nil {
		old.CloseIdleConnections()
	}
	return t.made, nil
}

func (t *reloading) closeIdle() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.made != nil {
		t.made.CloseIdleConnections()
	}
}
