package httpclient

import (
	"net/http"
	"net/url"
)

// ProxyFor returns the proxy that a request goes through, nil for none.
func ProxyFor(c Config, r *http.Request) (*url.URL, error) { return c.Proxy.function()(r) }
