package server

import (
	"fmt"
	"net/http"

	"github.com/prometheus/common/route"

	"github.com/culvert-io/culvert/protocol"
	"github.com/culvert-io/culvert/proxy/fleet"
)

// maxAsked bounds the agents of one request for their scrapes.
const maxAsked = 200

// serveOneAgent answers GET /api/v1/agents/NAME: what is known of an agent, and what came
// of its scrapes through this proxy.
func (s *Server) serveOneAgent(w http.ResponseWriter, r *http.Request) {
	name := protocol.NormalizeName(route.Param(r.Context(), "name"))
	info, ok := s.fleet.Agent(name)
	if !ok || !s.identity(r).MayScrape(name) {
		http.Error(w, fmt.Sprintf("no agent %q is known; see /api/v1/agents", name), http.StatusNotFound)
		return
	}
	logs, bytes, _ := s.fleet.Scrapes(name)
	s.writeLongJSON(w, r, struct {
		fleet.Info
		Health  string            `json:"health"`
		Scrapes []fleet.TargetLog `json:"scrapes"`
		Bytes   int64             `json:"bytes_total"`
	}{info, healthOf(info), logs, bytes})
}

// scrapeRow is a fleet.TargetLog in short.
type scrapeRow struct {
	fleet.TargetLog
	Last      fleet.ScrapeEntry `json:"last"`
	Durations []float64         `json:"durations"` // of the last scrapes, the oldest first
}

// serveScrapes answers GET /api/v1/scrapes?agent=A&agent=B: what came of the scrapes of
// some agents. Those that are not known, or not for who asks, are left out.
func (s *Server) serveScrapes(w http.ResponseWriter, r *http.Request) {
	names := r.URL.Query()["agent"]
	if len(names) == 0 || len(names) > maxAsked {
		http.Error(w, fmt.Sprintf("%d agents were named; name 1 to %d, as in /api/v1/scrapes?agent=web-1&agent=web-2", len(names), maxAsked), http.StatusBadRequest)
		return
	}
	id := s.identity(r)
	rows := make(map[string][]scrapeRow, len(names))
	for _, name := range names {
		name = protocol.NormalizeName(name)
		if !id.MayScrape(name) {
			continue
		}
		logs, _, ok := s.fleet.Scrapes(name)
		if !ok {
			continue
		}
		rows[name] = make([]scrapeRow, len(logs))
		for i, log := range logs {
			row := scrapeRow{TargetLog: log, Last: log.History[len(log.History)-1], Durations: make([]float64, len(log.History))}
			for j, entry := range log.History {
				row.Durations[j] = entry.Seconds
			}
			row.History = nil
			rows[name][i] = row
		}
	}
	s.writeLongJSON(w, r, rows)
}
