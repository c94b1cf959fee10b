package server

import (
	"fmt"
	"net/http"
	"net/url"
	"strings"

	"github.com/culvert-io/culvert/protocol"
)

// newCrossOrigin returns what keeps pages of other sites, in the browser of somebody who
// reaches this proxy, from changing anything here: with the credentials that the browser
// has, or, where there are no roles, because it stands in the right network. Programs are
// not affected: they send neither Sec-Fetch-Site nor Origin.
//
// The pages of external, by which people reach the proxy, are its own: a reverse proxy in
// between may put another Host into the request.
func newCrossOrigin(external *url.URL) (*http.CrossOriginProtection, error) {
	protection := http.NewCrossOriginProtection()
	if external == nil {
		return protection, nil
	}
	// Browsers leave the scheme's own port away.
	host := strings.ToLower(external.Host)
	host = strings.TrimSuffix(host, map[string]string{"http": ":80", "https": ":443"}[external.Scheme])
	if err := protection.AddTrustedOrigin(external.Scheme + "://" + host); err != nil {
		return nil, fmt.Errorf("the external URL %q (--web.external-url): %w", external, err)
	}
	return protection, nil
}

// sameOrigin reports whether a request may change something. Otherwise it answers.
func (s *Server) sameOrigin(w http.ResponseWriter, r *http.Request) bool {
	err := s.crossOrigin.Check(r)
	if err == nil {
		return true
	}
	s.refuse(w, r, protocol.Refusef(http.StatusForbidden, protocol.CodeForbidden,
		"a page of another site (Origin: %q) sent this %s, as browsers tell: only this proxy's own pages may. If that site is this proxy, behind a reverse proxy, set --web.external-url to its address", clip(r.Header.Get("Origin"), 200), r.Method))
	return false
}
