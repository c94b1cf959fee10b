package server

import (
	"bytes"
	"encoding/json"
	"net/http"
	"net/url"
	"strings"

	"github.com/culvert-io/culvert/gateway"
	"github.com/culvert-io/culvert/protocol"
	"github.com/culvert-io/culvert/proxy/fleet"
	"github.com/culvert-io/culvert/proxy/ui"
)

// servePage serves the page for people, of what its query asks for: what the API tells.
func (s *Server) servePage(w http.ResponseWriter, r *http.Request) {
	values := r.URL.Query()
	if r.URL.Path == s.config.RoutePrefix+"/status" && values.Get("view") == "" {
		values.Set("view", "status") // the Pushgateway has it there
	}
	id, query := s.identity(r), ui.ParseQuery(values)
	content := ui.Content{Query: query, Proxy: s.id, Version: protocol.BuildVersion(), MetricsPath: strings.TrimPrefix(s.config.TelemetryPath, "/")}
	content.Warnings = s.warnings(id.Operator())
	agents, _ := s.fleet.Since(0, id.MayScrape)
	content.Summary = ui.Summary{
		Agents: uint32(agents.Connected + agents.Lost), Connected: uint32(agents.Connected), Lost: uint32(agents.Lost), Failing: uint32(agents.Failing),
	}
	if query.View == "agents" {
		for _, info := range agents.Agents {
			row := newAgentRow(info)
			content.Agents = append(content.Agents, row)
			if info.Name != protocol.NormalizeName(query.Agent) {
				continue
			}
			content.Agent = &ui.AgentDetails{Agent: row}
			content.Agent.Scrapes, content.Agent.BytesTotal, _ = s.fleet.Scrapes(info.Name)
			for _, target := range info.Registration.Targets {
				content.Agent.Endpoints = append(content.Agent.Endpoints, ui.Endpoint{Name: target.Name, Path: target.ScrapePath()})
			}
			if info.Kind == fleet.KindCulvert {
				content.Agent.Endpoints = append(content.Agent.Endpoints, ui.Endpoint{Name: protocol.AgentTarget, Path: "/metrics"})
			}
		}
	}
	if store := s.push.current(); store != nil {
		groups, _ := gateway.Since(store, 0)
		content.Summary.Groups, content.Summary.GroupsLate, content.Summary.GroupsFailed = uint32(groups.Count), uint32(groups.Late), uint32(groups.Failed)
		if query.View == "groups" {
			for _, info := range groups.Groups {
				row := newGroupRow(info)
				content.Groups = append(content.Groups, row)
				if row.Path == query.Group {
					content.Group = &row
				}
			}
		}
	}
	switch {
	case content.Group != nil:
		content.Samples = s.own(r, "/api/v1/groups/"+content.Group.Path).text()
	case query.View == "config":
		path := "/api/v1/scrape_config"
		if query.Port != "" {
			path += "?" + url.Values{"port": {query.Port}}.Encode()
		}
		content.ScrapeConfig = s.own(r, path).text()
	case query.View == "status" && id.Operator():
		answer := s.own(r, "/api/v1/status")
		var status struct{ Data map[string]any }
		if err := json.Unmarshal(answer.body.Bytes(), &status); err != nil {
			status.Data = map[string]any{"error": answer.text()}
		}
		content.Status = status.Data
	}
	ui.Serve(w, r, content)
}

// ownAnswer is the answer to a request that the page makes of the API.
type ownAnswer struct {
	header http.Header
	body   bytes.Buffer
}

func (a *ownAnswer) Header() http.Header         { return a.header }
func (a *ownAnswer) Write(p []byte) (int, error) { return a.body.Write(p) }
func (a *ownAnswer) WriteHeader(int)             {}

// maxShown bounds what the page shows of an answer, in bytes.
const maxShown = 64 << 10

// text returns the answer as it is shown.
func (a *ownAnswer) text() string {
	if a.body.Len() > maxShown {
		return strings.ToValidUTF8(string(a.body.Bytes()[:maxShown]), "") + "…"
	}
	return a.body.String()
}

// own asks one of the proxy's own routes, as who asked for the page.
func (s *Server) own(r *http.Request, target string) *ownAnswer {
	answer := &ownAnswer{header: http.Header{}}
	u, err := url.Parse(s.config.RoutePrefix + target)
	if err != nil {
		answer.body.WriteString(err.Error())
		return answer
	}
	asked := r.Clone(r.Context())
	asked.Method, asked.URL, asked.RequestURI = http.MethodGet, u, u.RequestURI()
	asked.Header.Del("Accept-Encoding")
	s.mux.ServeHTTP(answer, asked)
	return answer
}
