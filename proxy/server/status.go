package server

import (
	"net/http"
	"time"

	"github.com/prometheus/common/version"

	"github.com/culvert-io/culvert/gateway"
)

// serveStatus answers GET /api/v1/status as the Pushgateway does, and tells of storage,
// listeners and the other proxies beside that.
func (s *Server) serveStatus(w http.ResponseWriter, _ *http.Request) {
	type address struct {
		Address string `json:"address"`
		TLS     bool   `json:"tls"`
		Purpose string `json:"for"`
	}
	listeners := []address{}
	for _, l := range s.listeners() {
		listeners = append(listeners, address{l.Addr().String(), l.tls, l.purpose})
	}
	storage := map[string]any{"path": s.config.StoragePath, "agents_stored": s.fleetStored, "push_store_up": true}
	if err := s.push.Err(); err != nil {
		storage["push_store_up"], storage["push_store_error"] = false, err.Error()
	}
	connected, lost := s.fleet.Counts()
	data := map[string]any{
		"build_information": map[string]string{
			"branch": version.Branch, "buildDate": version.BuildDate, "buildUser": version.BuildUser,
			"goVersion": version.GoVersion, "revision": version.GetRevision(), "version": version.Version,
		},
		"flags":      s.config.Flags,
		"start_time": s.started,
		"proxy":      s.id,
		"draining":   s.draining.Load(),
		"listeners":  listeners,
		"storage":    storage,
		"agents":     map[string]int{"connected": connected, "lost": lost},
		"config":     s.configStatus(),
		"warnings":   s.warnings(true),
	}
	if store := s.push.current(); store != nil {
		data["groups"] = store.Len()
	}
	if s.cluster != nil {
		data["cluster"] = s.clusterStatus()
	}
	gateway.WriteAPI(w, data)
}

func (s *Server) configStatus() any {
	status := struct {
		File        string    `json:"file,omitempty"`
		Error       string    `json:"reload_error,omitempty"`
		FailedAt    time.Time `json:"reload_failed,omitzero"`
		Open        bool      `json:"open_access"`
		RoleEntries int       `json:"role_entries"`
	}{File: s.config.ConfigFile, Open: s.access.Roles().Open()}
	if !status.Open {
		status.RoleEntries = s.access.Roles().Entries()
	}
	if failure := s.reloadFailure.Load(); failure != nil {
		status.Error, status.FailedAt = failure.err.Error(), failure.at
	}
	return status
}

func (s *Server) clusterStatus() any {
	type peer struct {
		ID      string    `json:"id"`
		URL     string    `json:"url"`
		Version string    `json:"version,omitempty"`
		Started time.Time `json:"started"`
	}
	status := struct {
		Endpoints    []string  `json:"etcd_endpoints"`
		Up           bool      `json:"etcd_up"`
		Heard        time.Time `json:"etcd_answered,omitzero"`
		AdvertiseURL string    `json:"advertise_url"`
		Unwritten    int       `json:"unwritten_agents"`
		Peers        []peer    `json:"peers"` // the other proxies
	}{Endpoints: s.config.Cluster.Endpoints, AdvertiseURL: s.config.Cluster.AdvertiseURL, Peers: []peer{}}
	status.Up, status.Heard = s.cluster.Up()
	status.Unwritten, _ = s.cluster.Unwritten()
	for _, p := range s.cluster.Peers() {
		status.Peers = append(status.Peers, peer{p.ID, p.URL, p.Version, p.Started})
	}
	return status
}
