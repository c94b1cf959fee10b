package server_test

import (
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"testing"
)

// newFront starts a middle box. filter may change the request, or answer it
// itself and return false.
func newFront(t *testing.T, p *testProxy, filter func(http.ResponseWriter, *http.Request) bool) *httptest.Server {
	t.Helper()
	u, err := url.Parse(p.url)
	if err != nil {
		t.Fatal(err)
	}
	transport := &http.Transport{}
	pass := &httputil.ReverseProxy{Transport: transport, Rewrite: func(pr *httputil.ProxyRequest) { pr.SetURL(u) }}
	f := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if filter(w, r) {
			pass.ServeHTTP(w, r)
		}
	}))
	t.Cleanup(func() {
		f.CloseClientConnections()
		f.Close()
		transport.CloseIdleConnections()
	})
	return f
}

// stripUpgrade takes the upgrade away, unless it is to WebSocket.
func stripUpgrade(_ http.ResponseWriter, r *http.Request) bool {
	if r.Header.Get("Upgrade") != "websocket" {
		r.Header.Del("Upgrade")
		r.Header.Del("Connection")
	}
	return true
}
