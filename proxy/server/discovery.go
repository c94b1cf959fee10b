package server

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/common/model"

	"github.com/culvert-io/culvert/protocol"
	"github.com/culvert-io/culvert/proxy/fleet"
)

// targetGroup is one entry of Prometheus's HTTP service discovery format
// (prometheus.io/docs/prometheus/latest/http_sd).
type targetGroup struct {
	Targets []string          `json:"targets"`
	Labels  map[string]string `json:"labels"`
}

// Labels of discovery. An agent's own labels follow metaLabel, so that none of
// them can set job, instance or __scrape_interval__.
const (
	metaAgent     = "__meta_culvert_agent"
	metaTarget    = "__meta_culvert_target"
	metaConnected = "__meta_culvert_connected"
	metaLabel     = "__meta_culvert_label_"
)

// serveClients lists one entry an agent, its bare name as the target, as
// PushProx does.
func (s *Server) serveClients(w http.ResponseWriter, r *http.Request) {
	s.serveDiscovery(w, r, func(info fleet.Info) []targetGroup {
		return []targetGroup{{
			Targets: []string{info.Name},
			Labels:  s.discoveryLabels(info, "", nil),
		}}
	})
}

// serveTargets lists one entry a target: the declared ones, and the agent itself.
func (s *Server) serveTargets(w http.ResponseWriter, r *http.Request) {
	mode := r.URL.Query().Get("mode")
	if mode != "" && mode != "proxy" && mode != "path" {
		http.Error(w, fmt.Sprintf("mode=%q: use mode=path, or mode=proxy, which is the default", mode), http.StatusBadRequest)
		return
	}
	scheme, address, base := "http", r.Host, s.config.RoutePrefix
	if r.TLS != nil {
		scheme = "https"
	}
	if external := s.config.ExternalURL; external != nil {
		scheme, address, base = external.Scheme, external.Host, strings.TrimSuffix(external.Path, "/")
	}
	s.serveDiscovery(w, r, func(info fleet.Info) []targetGroup {
		targets := append(info.Registration.Targets[:len(info.Registration.Targets):len(info.Registration.Targets)],
			protocol.Target{Name: protocol.AgentTarget, Path: "/metrics"})
		groups := make([]targetGroup, 0, len(targets))
		for _, t := range targets {
			full := t.Name + "." + info.Name
			group := targetGroup{Targets: []string{full}, Labels: s.discoveryLabels(info, t.Name, t.Labels)}
			// Every series of one address would be one instance without this, and
			// Prometheus 2 and 3 differ in the port that they add.
			group.Labels["instance"] = full
			group.Labels["__scheme__"] = "http" // the agent holds the target's TLS
			group.Labels["__metrics_path__"] = unescape(t.ScrapePath())
			for name, values := range t.Params {
				// The agent adds what it declared; a label is for people and relabelling,
				// and one bad name makes Prometheus refuse the whole list.
				if label := "__param_" + name; len(values) > 0 && model.LegacyValidation.IsValidLabelName(label) {
					group.Labels[label] = values[0] // Prometheus knows one
				}
			}
			if mode == "path" {
				group.Targets[0] = address
				group.Labels["__scheme__"] = scheme
				group.Labels["__metrics_path__"] = base + scrapePrefix + info.Name + "/" + t.Name + unescape(t.ScrapePath())
			}
			groups = append(groups, group)
		}
		return groups
	})
}

// unescape returns the path as Prometheus wants it: it escapes it itself.
func unescape(path string) string {
	if plain, err := url.PathUnescape(path); err == nil {
		return plain
	}
	return path
}

// discoveryLabels returns the labels that every entry has.
func (s *Server) discoveryLabels(info fleet.Info, target string, more map[string]string) map[string]string {
	l := map[string]string{
		metaAgent:     info.Name,
		metaTarget:    target,
		metaConnected: strconv.FormatBool(info.Connected),
	}
	for _, set := range []map[string]string{info.Registration.Labels, more} {
		for name, value := range set {
			l[metaLabel+name] = value
		}
	}
	for _, name := range s.settings.Load().Discovery.PromoteLabels {
		if value, ok := l[metaLabel+name]; ok {
			l[name] = value
		}
	}
	return l
}

// serveDiscovery writes the entries of all agents that the match[] parameters
// select. It answers 503 as long as the list can't be trusted: Prometheus then
// keeps the list that it has.
func (s *Server) serveDiscovery(w http.ResponseWriter, r *http.Request, entries func(fleet.Info) []targetGroup) {
	if settled, latest := s.fleet.Settled(); !settled {
		wait := max(time.Until(latest), time.Second)
		w.Header().Set("Retry-After", strconv.Itoa(int(wait.Seconds())+1))
		http.Error(w, fmt.Sprintf("the proxy started a moment ago without a stored list of agents; the list is complete in %d s at the latest (--agent.settle-time)", int(wait.Seconds())+1), http.StatusServiceUnavailable)
		return
	}
	// An agent's own labels go by their plain names too. No selector selects all.
	wanted, err := parseSelectors(r.URL.Query()["match[]"])
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	groups := []targetGroup{}
	for _, info := range s.fleet.Agents() {
		for _, g := range entries(info) {
			selected := wanted.match(func(name string) string {
				if value, ok := g.Labels[name]; ok {
					return value
				}
				return g.Labels[metaLabel+name]
			})
			if selected || len(wanted) == 0 {
				groups = append(groups, g)
			}
		}
	}
	w.Header().Set("Content-Type", "application/json")
	if err := json.NewEncoder(w).Encode(groups); err != nil {
		s.logger.Debug("Discovery was not read to its end", "err", err)
	}
}
