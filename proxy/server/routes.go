package server

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"

	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/culvert-io/culvert/protocol"
	"github.com/culvert-io/culvert/proxy/ui"
)

// routes sets up the proxy's own routes. /tunnel and /scrape/ are not among
// them: see serveOwn.
func (s *Server) routes() {
	s.mux = http.NewServeMux()
	s.mux.Handle("GET /metrics", promhttp.InstrumentMetricHandler(s.config.Registry, promhttp.HandlerFor(s.config.Registry, promhttp.HandlerOpts{
		ErrorLog:          slog.NewLogLogger(s.logger.Handler(), slog.LevelError),
		EnableOpenMetrics: true,
	})))
	s.mux.HandleFunc("GET /clients", s.serveClients)
	s.mux.HandleFunc("GET /targets", s.serveTargets)
	s.mux.HandleFunc("GET /api/v1/agents", s.serveAgents)
	s.mux.HandleFunc("GET /api/v1/agents/{name}", s.serveOneAgent)
	s.mux.HandleFunc("DELETE /api/v1/agents/{name}", s.forgetAgent)
	s.mux.HandleFunc("GET /-/healthy", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "OK") })
	s.mux.HandleFunc("GET /-/ready", s.serveReady)
	s.mux.HandleFunc("POST /-/reload", s.serveReload)
	s.mux.HandleFunc("PUT /-/reload", s.serveReload)
	s.mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, r *http.Request) {
		ui.Serve(w, s.fleet.Agents())
	})
}

// serveReady fails only while the proxy is draining: it listens once it is ready.
func (s *Server) serveReady(w http.ResponseWriter, _ *http.Request) {
	if s.draining.Load() {
		http.Error(w, "draining", http.StatusServiceUnavailable)
		return
	}
	fmt.Fprint(w, "OK")
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

func (s *Server) serveAgents(w http.ResponseWriter, _ *http.Request) {
	s.writeJSON(w, s.fleet.Agents())
}

func (s *Server) serveOneAgent(w http.ResponseWriter, r *http.Request) {
	name := protocol.NormalizeName(r.PathValue("name"))
	info, ok := s.fleet.Agent(name)
	if !ok {
		http.Error(w, fmt.Sprintf("no agent %q is known; see /api/v1/agents", name), http.StatusNotFound)
		return
	}
	s.writeJSON(w, info)
}

// forgetAgent removes an agent at once. One that is still running comes back.
func (s *Server) forgetAgent(w http.ResponseWriter, r *http.Request) {
	name := protocol.NormalizeName(r.PathValue("name"))
	if !s.fleet.Forget(name) {
		http.Error(w, fmt.Sprintf("no agent %q is known; see /api/v1/agents", name), http.StatusNotFound)
		return
	}
	s.logger.Info("Agent forgotten on request", "agent", name, "from", r.RemoteAddr)
	w.WriteHeader(http.StatusNoContent)
}
