package httpclient

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"unicode/utf8"
)

// function returns what http.Transport.Proxy is, nil for no proxy.
func (p *Proxy) function() func(*http.Request) (*url.URL, error) {
	switch {
	case p.ProxyFromEnvironment:
		return http.ProxyFromEnvironment
	case p.ProxyURL.URL == nil:
		return nil
	case p.NoProxy == "":
		return http.ProxyURL(p.ProxyURL.URL)
	}
	proxy := p.ProxyURL.URL
	if proxy.Scheme == "" || proxy.Host == "" { // as in proxy.example.net:3128
		if u, err := url.Parse("http://" + proxy.String()); err == nil {
			proxy = u
		}
	}
	direct := parseNoProxy(p.NoProxy)
	return func(r *http.Request) (*url.URL, error) {
		if direct.reach(r.URL) {
			return nil, nil
		}
		return proxy, nil
	}
}

// noProxy lists what is reached without a proxy. It means what
// golang.org/x/net/http/httpproxy, and so the environment variable NO_PROXY, does.
// net/http has that package to itself: a second copy brings the tables of IDNA and of
// Unicode's normal forms along once more.
type noProxy struct {
	all     bool
	entries []noProxyEntry
}

// noProxyEntry is a network, an address or a name.
type noProxyEntry struct {
	network *net.IPNet
	ip      net.IP
	suffix  string // of names, with a dot before it
	itself  bool   // the name without that dot is meant too
	port    string // of an address or a name; empty: all
}

// parseNoProxy reads the list. What can't be read means nothing.
func parseNoProxy(list string) noProxy {
	var n noProxy
	for item := range strings.SplitSeq(list, ",") {
		item = strings.ToLower(strings.TrimSpace(item))
		if item == "*" {
			return noProxy{all: true}
		}
		if _, network, err := net.ParseCIDR(item); err == nil {
			n.entries = append(n.entries, noProxyEntry{network: network})
			continue
		}
		host, port, err := net.SplitHostPort(item)
		if err != nil {
			host, port = item, ""
		} else if strings.HasPrefix(host, "[") && strings.HasSuffix(host, "]") {
			host = host[1 : len(host)-1]
		}
		if host == "" {
			continue
		}
		if ip := net.ParseIP(host); ip != nil {
			n.entries = append(n.entries, noProxyEntry{ip: ip, port: port})
			continue
		}
		if strings.HasPrefix(host, "*.") {
			host = host[1:]
		}
		suffix, dotted := strings.CutPrefix(host, ".")
		n.entries = append(n.entries, noProxyEntry{suffix: toASCII("." + suffix), itself: !dotted, port: port})
	}
	return n
}

// reach reports whether a URL is reached without the proxy. This host always is.
func (n noProxy) reach(u *url.URL) bool {
	host, port := toASCII(u.Hostname()), u.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[u.Scheme]
	}
	if host == "localhost" || n.all {
		return true
	}
	var ip net.IP
	if address, err := netip.ParseAddr(host); err == nil {
		ip = address.AsSlice()
		if ip.IsLoopback() {
			return true
		}
	}
	host = strings.ToLower(strings.TrimSpace(host))
	for _, e := range n.entries {
		if e.port != "" && e.port != port {
			continue
		}
		switch {
		case ip == nil && e.suffix != "":
			if strings.HasSuffix(host, e.suffix) || e.itself && host == e.suffix[1:] {
				return true
			}
		case ip != nil && (e.network != nil && e.network.Contains(ip) || e.ip != nil && e.ip.Equal(ip)):
			return true
		}
	}
	return false
}

// toASCII returns a host's name as it stands in DNS (RFC 5891). net/http tells that to
// who dials, and in no other way.
func toASCII(host string) string {
	if strings.IndexFunc(host, func(r rune) bool { return r >= utf8.RuneSelf }) < 0 {
		return host
	}
	name := host
	transport := http.Transport{DialContext: func(_ context.Context, _, address string) (net.Conn, error) {
		if asked, _, err := net.SplitHostPort(address); err == nil {
			name = asked
		}
		return nil, errors.New("it was asked for the name alone")
	}}
	_, _ = transport.RoundTrip(&http.Request{Method: http.MethodGet, URL: &url.URL{Scheme: "http", Host: host}, Header: http.Header{}})
	return name
}
