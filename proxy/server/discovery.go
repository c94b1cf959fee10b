package server

import (
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/common/model"

	"github.com/culvert-io/culvert/gateway"
	"github.com/culvert-io/culvert/protocol"
	"github.com/culvert-io/culvert/proxy/fleet"
)

// Labels of discovery. An agent's own labels follow metaLabel, so that none of
// them can set job, instance or __scrape_interval__.
const (
	metaAgent     = "__meta_culvert_agent"
	metaTarget    = "__meta_culvert_target"
	metaConnected = "__meta_culvert_connected"
	metaLabel     = "__meta_culvert_label_"
)

// listing is one way to list agents.
type listing struct {
	// key tells listings apart whose entries differ.
	key string
	// entries fills labels, which is empty, for each entry of an agent, and then calls
	// yield with the entry's address.
	entries func(info fleet.Info, labels map[string]string, yield func(address string))
}

// serveClients lists one entry an agent, its bare name as the target, as
// PushProx does.
func (s *Server) serveClients(w http.ResponseWriter, r *http.Request) {
	s.serveDiscovery(w, r, &s.lists.clients, listing{entries: func(info fleet.Info, labels map[string]string, yield func(string)) {
		metaLabels(labels, info, "", nil)
		yield(info.Name)
	}})
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
	itself := protocol.Target{Name: protocol.AgentTarget, Path: "/metrics"}
	list := listing{entries: func(info fleet.Info, labels map[string]string, yield func(string)) {
		declared := info.Registration.Targets
		n := len(declared) + 1
		if info.Kind == fleet.KindPushProx {
			n = 0 // it has ports alone, and those it doesn't tell
		}
		for i := range n {
			t := &itself
			if i < len(declared) {
				t = &declared[i]
			}
			full := t.Name + "." + info.Name
			path := unescape(t.ScrapePath())
			metaLabels(labels, info, t.Name, t.Labels)
			// Every series of one address would be one instance without this, and
			// Prometheus 2 and 3 differ in the port that they add.
			labels["instance"] = full
			labels["__scheme__"] = "http" // the agent holds the target's TLS
			labels["__metrics_path__"] = path
			for name, values := range t.Params {
				// The agent adds what it declared; a label is for people and relabelling,
				// and one bad name makes Prometheus refuse the whole list.
				if label := "__param_" + name; len(values) > 0 && model.LegacyValidation.IsValidLabelName(label) {
					labels[label] = values[0] // Prometheus knows one
				}
			}
			if mode != "path" {
				yield(full)
				continue
			}
			labels["__scheme__"] = scheme
			labels["__metrics_path__"] = base + scrapePrefix + info.Name + "/" + t.Name + path
			yield(address)
		}
	}}
	kept := &s.lists.targets
	if mode == "path" {
		kept, list.key = &s.lists.paths, scheme+"://"+address+base
	}
	s.serveDiscovery(w, r, kept, list)
}

// unescape returns the path as Prometheus wants it: it escapes it itself.
func unescape(path string) string {
	if plain, err := url.PathUnescape(path); err == nil {
		return plain
	}
	return path
}

// metaLabels adds the labels that every entry has.
func metaLabels(labels map[string]string, info fleet.Info, target string, more map[string]string) {
	labels[metaAgent] = info.Name
	labels[metaTarget] = target
	labels[metaConnected] = strconv.FormatBool(info.Connected)
	for _, set := range []map[string]string{info.Registration.Labels, more} {
		for name, value := range set {
			labels[metaLabel+name] = value
		}
	}
}

// serveDiscovery writes the entries of all agents that the match[] parameters
// select. It answers 503 as long as the list can't be trusted: Prometheus then
// keeps the list that it has.
func (s *Server) serveDiscovery(w http.ResponseWriter, r *http.Request, kept *keptList, list listing) {
	if settled, latest := s.fleet.Settled(); !settled {
		wait := max(time.Until(latest), time.Second)
		w.Header().Set("Retry-After", strconv.Itoa(int(wait.Seconds())+1))
		if s.cluster != nil && s.cluster.Secret() == "" {
			http.Error(w, "the proxy has no stored list of agents, and etcd, where the other proxies have theirs, has not answered yet (--cluster.etcd-endpoints)", http.StatusServiceUnavailable)
			return
		}
		http.Error(w, fmt.Sprintf("the proxy started a moment ago without a stored list of agents; the list is complete in %d s at the latest (--agent.settle-time)", int(wait.Seconds())+1), http.StatusServiceUnavailable)
		return
	}
	wanted, err := parseSelectors(r.URL.Query()["match[]"])
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	zip := gateway.AcceptsGzip(r.Header)
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Vary", "Accept-Encoding")
	var body []byte
	if len(wanted) > 0 || !s.identity(r).MayScrapeAll() {
		body = s.encodeSelected(s.visibleAgents(r), list, wanted)
		if zip {
			body = zipped(body)
		}
	} else {
		current := kept.current(s, list)
		w.Header().Set("ETag", current.tag)
		if strings.Contains(r.Header.Get("If-None-Match"), current.tag) {
			w.WriteHeader(http.StatusNotModified)
			return
		}
		body = current.body
		if zip {
			body = current.zipped()
		}
	}
	if zip {
		w.Header().Set("Content-Encoding", "gzip")
	}
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	if _, err := w.Write(body); err != nil {
		s.logger.Debug("Discovery was not read to its end", "err", err)
	}
}
