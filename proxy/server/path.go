package server

import (
	"mime"
	"net/http"
	"net/url"
	"strings"

	"github.com/culvert-io/culvert/protocol"
)

// scrapePrefix starts the paths of scrapes without proxy_url.
const scrapePrefix = "/scrape/"

// cutScrapePath returns what follows /scrape/ in the path, still escaped.
func (s *Server) cutScrapePath(r *http.Request) (string, bool) {
	return strings.CutPrefix(r.URL.EscapedPath(), s.config.RoutePrefix+scrapePrefix)
}

// scrapePath serves GET /scrape/AGENT/TARGET_OR_PORT/PATH: the same as the
// absolute form, for scrapers that can't set a proxy.
func (s *Server) scrapePath(w http.ResponseWriter, r *http.Request, rest string) {
	r, ok := s.permit(w, r, routeAccess[routePath])
	if !ok {
		return
	}
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		w.Header().Set("Allow", "GET, HEAD")
		s.refuse(w, r, protocol.Refusef(http.StatusMethodNotAllowed, protocol.CodeMethod, "%s takes GET and HEAD", scrapePrefix))
		return
	}
	parts := strings.SplitN(rest, "/", 3)
	if len(parts) < 3 {
		s.refuse(w, r, protocol.Refusef(http.StatusBadRequest, protocol.CodeBadRequest,
			"%s is not complete; use /scrape/AGENT/TARGET_OR_PORT/PATH, as in /scrape/web-1/9100/metrics", r.URL.Path))
		return
	}
	name, errName := url.PathUnescape(parts[0])
	what, errWhat := url.PathUnescape(parts[1])
	name, what = protocol.NormalizeName(name), strings.ToLower(what)
	authority := what + "." + name
	if strings.Trim(what, "0123456789") == "" {
		authority = name + ":" + what
	}
	if errName != nil || errWhat != nil || protocol.CheckName(name) != nil || protocol.CheckName(what) != nil {
		s.refuse(w, r, protocol.Refusef(http.StatusBadRequest, protocol.CodeBadRequest,
			"%s: %q is no agent, or %q no target and no port", r.URL.Path, parts[0], parts[1]))
		return
	}
	target := "http://" + authority + "/" + parts[2]
	if r.URL.RawQuery != "" {
		target += "?" + r.URL.RawQuery
	}
	s.forward(w, r, &scrape{mode: "path", target: target}, authority)
}

// sandboxed are the header fields of a response that path mode lets through.
var sandboxed = map[string]bool{
	"Content-Type": true, "Content-Length": true, "Content-Encoding": true, "Transfer-Encoding": true,
	"Date": true, "Last-Modified": true, "Retry-After": true,
}

// sandbox makes a response of a target harmless on the proxy's own origin: no
// cookies, no redirects, no scripts, and no type but an exposition's.
func sandbox(h http.Header) {
	for name := range h {
		if !sandboxed[name] {
			h.Del(name)
		}
	}
	h.Set("Content-Security-Policy", "sandbox; default-src 'none'")
	h.Set("X-Content-Type-Options", "nosniff")
	if !isExposition(h.Get("Content-Type")) {
		h.Set("Content-Type", "text/plain; charset=utf-8")
	}
}

// isExposition reports whether a Content-Type is one of Prometheus's exposition
// formats.
func isExposition(contentType string) bool {
	mediaType, _, err := mime.ParseMediaType(contentType)
	if err != nil {
		return false
	}
	switch mediaType {
	case "text/plain", "application/openmetrics-text", "application/vnd.google.protobuf":
		return true
	}
	return false
}
