package server

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"

	"github.com/prometheus/common/route"

	"github.com/culvert-io/culvert/gateway"
	"github.com/culvert-io/culvert/protocol"
	"github.com/culvert-io/culvert/proxy/ui"
)

// routes sets up the proxy's own routes, by the router that the Pushgateway has,
// so that all other answers (404, 405 with Allow, OPTIONS, redirects) are the same.
// /tunnel and /scrape/ are not among them: see serveOwn.
func (s *Server) routes() (err error) {
	defer func() {
		if p := recover(); p != nil { // how the router tells that two routes are the same
			err = fmt.Errorf("the telemetry path %q is in the way of another route: %v", s.config.TelemetryPath, p)
		}
	}()
	r := s.guard(route.New())
	if s.config.RoutePrefix != "" {
		// Who types the proxy's address alone looks for the page.
		r.Get("/", func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, s.config.RoutePrefix+"/", http.StatusFound)
		})
		r = r.WithPrefix(s.config.RoutePrefix)
	}
	get := func(path string, h http.HandlerFunc) {
		r.Get(path, h)
		r.Head(path, h)
	}
	r.Get(s.config.TelemetryPath, s.serveMetrics)
	for _, path := range []string{"/metrics/job/:job", "/metrics/job/:job/*labels", "/metrics/job@base64/:job", "/metrics/job@base64/:job/*labels"} {
		r.Put(path, s.pathOf((*gateway.Gateway).ServePush))
		r.Post(path, s.pathOf((*gateway.Gateway).ServePush))
		r.Del(path, s.pathOf((*gateway.Gateway).ServeDelete))
	}
	r.Get("/api/v1/metrics", s.push.with((*gateway.Gateway).ServeQuery))
	r.Get("/api/v1/status", s.serveStatus)
	r.Get("/api/v1/", http.NotFound) // the router redirects from /api/v1
	r.Options("/api/v1/*any", func(w http.ResponseWriter, _ *http.Request) { gateway.SetAPIHeaders(w.Header()) })
	r.Put("/api/v1/push", s.push.with((*gateway.Gateway).ServeBatch))
	r.Post("/api/v1/push", s.push.with((*gateway.Gateway).ServeBatch))
	get("/api/v1/groups", s.serveGroups)
	get("/api/v1/groups/*path", s.serveGroup)
	r.Del("/api/v1/groups", s.deleteGroups)
	if s.config.EnableAdminAPI {
		r.Put("/api/v1/admin/wipe", s.push.with((*gateway.Gateway).ServeWipe))
	}
	r.Get("/-/healthy", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "OK") })
	r.Get("/-/ready", s.serveReady)
	r.Post("/-/reload", s.serveReload)
	r.Put("/-/reload", s.serveReload)
	const quitMethods = "OPTIONS, POST, PUT"
	r.Options("/-/quit", func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("Allow", quitMethods) })
	r.Get("/-/quit", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Allow", quitMethods)
		http.Error(w, "use POST or PUT to stop the proxy", http.StatusMethodNotAllowed)
	})
	r.Post("/-/quit", s.serveQuit)
	r.Put("/-/quit", s.serveQuit)
	r.Get("/", s.servePage)
	r.Get("/status", s.servePage)

	get("/clients", s.serveClients)
	get("/targets", s.serveTargets)
	get("/ui/*file", s.serveAsset)
	get("/api/v1/page", s.servePageUpdate)
	get("/api/v1/scrapes", s.serveScrapes)
	get("/api/v1/scrape_config", s.serveScrapeConfig)
	get("/api/v1/agents", s.serveAgents)
	get("/api/v1/agents/:name", s.serveOneAgent)
	r.Del("/api/v1/agents/:name", s.forgetAgent)
	s.mux = http.NewServeMux()
	s.mux.Handle("/", r) // it redirects from paths with "//", "." and ".."
	return r.err()
}

// serveAsset serves what the page loads.
func (s *Server) serveAsset(w http.ResponseWriter, r *http.Request) {
	ui.ServeAsset(w, r, strings.TrimPrefix(route.Param(r.Context(), "file"), "/"))
}

// serveReady fails only while the proxy is draining: it listens once it is ready.
// With ?for=push it tells whether the push store takes pushes too.
func (s *Server) serveReady(w http.ResponseWriter, r *http.Request) {
	if s.draining.Load() {
		http.Error(w, "draining", http.StatusServiceUnavailable)
		return
	}
	if r.URL.Query().Get("for") == "push" {
		if err := s.push.Err(); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
	}
	fmt.Fprint(w, "OK")
}

func (s *Server) serveQuit(w http.ResponseWriter, r *http.Request) {
	if !s.config.EnableLifecycle {
		http.Error(w, "the lifecycle API is off; --web.enable-lifecycle opens it", http.StatusForbidden)
		return
	}
	s.logger.Info("Asked to quit", "from", r.RemoteAddr)
	fmt.Fprintln(w, "Stopping. Bye!")
	s.quitOnce.Do(func() { close(s.quit) })
}

func (s *Server) serveReload(w http.ResponseWriter, _ *http.Request) {
	if err := s.Reload(); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
	}
}

// writeJSON writes data in the envelope of Prometheus's API.
func (s *Server) writeJSON(w http.ResponseWriter, data any) {
	w.Header().Set("Content-Type", "application/json")
	err := json.NewEncoder(w).Encode(map[string]any{"status": "success", "data": data})
	if err != nil {
		s.logger.Debug("An answer was not read to its end", "err", err)
	}
}

func (s *Server) serveAgents(w http.ResponseWriter, r *http.Request) {
	s.writeJSON(w, s.visibleAgents(r))
}

// forgetAgent removes an agent at once. One that is still running comes back.
func (s *Server) forgetAgent(w http.ResponseWriter, r *http.Request) {
	name := protocol.NormalizeName(route.Param(r.Context(), "name"))
	known := s.fleet.Forget(name)
	if released := s.release(name); !known && !released {
		http.Error(w, fmt.Sprintf("no agent %q is known; see /api/v1/agents", name), http.StatusNotFound)
		return
	}
	s.logger.Info("Agent forgotten on request", "agent", name, "from", r.RemoteAddr)
	w.WriteHeader(http.StatusNoContent)
}
