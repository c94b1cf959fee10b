package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"github.com/culvert-io/culvert/client/httpclient"
	"github.com/culvert-io/culvert/protocol"
)

// target is a named target, ready to be scraped.
type target struct {
	declared  protocol.Target
	url       *url.URL // nil where handler serves it
	query     url.Values
	transport http.RoundTripper
	handler   http.Handler
	follow    bool     // redirects, as far as the declared path allows
	owned     []string // header fields that the agent sets, and the scraper must not
}

func newTarget(c Target, g *guard) (*target, error) {
	t := &target{handler: c.Handler, declared: protocol.Target{
		Name: strings.ToLower(c.Name), Path: "/metrics", Labels: c.Labels,
	}}
	if c.Handler != nil {
		if c.URL != "" {
			return nil, errors.New("it has both a URL and a Handler; give one of them")
		}
		return t, nil
	}
	u, err := url.Parse(c.URL)
	switch {
	case err != nil:
		var reason *url.Error
		if errors.As(err, &reason) {
			err = reason.Err // the whole error would repeat a password
		}
		return nil, fmt.Errorf("URL: %w", err)
	case u.Scheme != "http" && u.Scheme != "https":
		return nil, fmt.Errorf("URL %q: use http or https, as in http://localhost:9100/metrics", u.Redacted())
	case u.Hostname() == "":
		return nil, fmt.Errorf("URL %q: the host is missing", u.Redacted())
	case u.Fragment != "":
		return nil, fmt.Errorf("URL %q: a fragment has no meaning here", u.Redacted())
	}
	if u.Path == "" {
		u.Path = "/metrics"
	}
	t.url, t.query = u, u.Query()
	t.declared.Path = u.EscapedPath()
	if len(t.query) > 0 {
		t.declared.Params = t.query
	}
	hc := httpclient.DefaultConfig
	if c.HTTP != nil {
		hc = *c.HTTP
	}
	if u.User != nil {
		if hc.BasicAuth != nil || hc.Authorization != nil {
			return nil, errors.New("credentials stand both in the URL and beside it; give one of them")
		}
		password, _ := u.User.Password()
		hc.BasicAuth = &httpclient.BasicAuth{Username: u.User.Username(), Password: httpclient.Secret(password)}
		u.User = nil
	}
	if err := hc.Validate(); err != nil {
		return nil, err
	}
	t.follow = hc.FollowRedirects
	if hc.BasicAuth != nil || hc.Authorization != nil || hc.OAuth2 != nil {
		t.owned = append(t.owned, "Authorization")
	}
	t.owned = slices.AppendSeq(t.owned, maps.Keys(hc.HTTPHeaders))
	// The hosts that the operator wrote down; a token's endpoint may redirect elsewhere.
	literal := map[string]bool{u.Hostname(): true}
	if hc.ProxyURL.URL != nil {
		literal[hc.ProxyURL.Hostname()] = true
	}
	if hc.OAuth2 != nil {
		if token, err := url.Parse(hc.OAuth2.TokenURL); err == nil {
			literal[token.Hostname()] = true
		}
		if hc.OAuth2.ProxyURL.URL != nil {
			literal[hc.OAuth2.ProxyURL.Hostname()] = true
		}
	}
	transport, err := httpclient.NewTransport(hc, func(ctx context.Context, network, addr string) (net.Conn, error) {
		host, port, err := net.SplitHostPort(addr)
		if err != nil {
			return nil, err
		}
		return g.dial(ctx, network, host, port, literal[host])
	})
	if err != nil {
		return nil, err
	}
	t.transport = transport
	return t, nil
}

// resolve returns the URL that a request for path and query of the target leads
// to. The declared parameters win over the request's.
func (t *target) resolve(r *http.Request) *url.URL {
	u := *t.url
	if strings.HasSuffix(u.Path, "/*") {
		u.Path, u.RawPath = r.URL.Path, r.URL.RawPath
	}
	query := r.URL.Query()
	for name, values := range t.query {
		query[name] = values
	}
	u.RawQuery = query.Encode()
	return &u
}

// refuses returns the refusal for a request that goes beyond what was declared.
func (t *target) refuses(s *snapshot, r *http.Request, port string) *protocol.Refusal {
	name := t.declared.Name
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		return protocol.Refusef(http.StatusForbidden, protocol.CodeNotAllowed,
			"target %q of agent %q takes GET and HEAD only, not %s", name, s.name, r.Method)
	}
	if port != "" && port != "80" {
		return protocol.Refusef(http.StatusForbidden, protocol.CodeNotAllowed,
			"target %q of agent %q has no port %s: its address is the agent's business; ask for http://%s.%s%s", name, s.name, port, name, s.name, t.declared.ScrapePath())
	}
	if !t.declared.Allows(r.URL.EscapedPath()) {
		return protocol.Refusef(http.StatusForbidden, protocol.CodeNotAllowed,
			"target %q of agent %q is declared with the path %s, not %s; set metrics_path to that, or end the path of its --target in /*", name, s.name, t.declared.Path, r.URL.EscapedPath())
	}
	return nil
}

// RoundTrip asks the target, and follows redirects that stay on its origin and
// within what was declared. Other redirects are returned as they are.
func (t *target) RoundTrip(r *http.Request) (*http.Response, error) {
	for hops := 0; ; hops++ {
		resp, err := t.transport.RoundTrip(r)
		if err != nil || !t.follow || hops == 5 {
			return resp, err
		}
		switch resp.StatusCode {
		case http.StatusMovedPermanently, http.StatusFound, http.StatusSeeOther, http.StatusTemporaryRedirect, http.StatusPermanentRedirect:
		default:
			return resp, nil
		}
		next, err := resp.Location()
		if err != nil || next.Scheme != t.url.Scheme || next.Host != t.url.Host || !t.declared.Allows(next.EscapedPath()) {
			return resp, nil
		}
		resp.Body.Close()
		r = r.Clone(r.Context())
		r.URL = next
	}
}

func (t *target) close() {
	if c, ok := t.transport.(interface{ CloseIdleConnections() }); ok {
		c.CloseIdleConnections()
	}
}
