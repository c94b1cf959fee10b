package server

import (
	"cmp"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v2"

	"github.com/culvert-io/culvert/proxy/fleet"
)

// scrapeJob is a part of a scrape_config of Prometheus (prometheus.io/docs/prometheus/latest/configuration).
type scrapeJob struct {
	Name          string              `yaml:"job_name"`
	HonorLabels   bool                `yaml:"honor_labels,omitempty"`
	Scheme        string              `yaml:"scheme,omitempty"`
	MetricsPath   string              `yaml:"metrics_path,omitempty"`
	Params        map[string][]string `yaml:"params,omitempty,flow"`
	ProxyURL      string              `yaml:"proxy_url,omitempty"`
	BasicAuth     *basicAuth          `yaml:"basic_auth,omitempty,flow"`
	HTTPSD        []httpSD            `yaml:"http_sd_configs,omitempty"`
	StaticConfigs []staticConfig      `yaml:"static_configs,omitempty"`
	Relabel       []relabel           `yaml:"relabel_configs,omitempty"`
}

type basicAuth struct {
	Username string `yaml:"username"`
	Password string `yaml:"password"`
}

type httpSD struct {
	URL       string     `yaml:"url"`
	BasicAuth *basicAuth `yaml:"basic_auth,omitempty,flow"`
}

type staticConfig struct {
	Targets []string `yaml:"targets"`
}

type relabel struct {
	Source      []string `yaml:"source_labels,flow"`
	Target      string   `yaml:"target_label"`
	Replacement string   `yaml:"replacement,omitempty"`
}

// placeholders stand for credentials, which nobody shows.
var placeholders = basicAuth{"USERNAME", "PASSWORD"}

// maxPorts bounds the ports of one request for a configuration.
const maxPorts = 50

// serveScrapeConfig answers GET /api/v1/scrape_config: the jobs to paste into Prometheus for
// what is known now. What agents declare is found by discovery. Which ports they have,
// the proxy learns from scrapes alone: those that answered are listed; with ?port=9100
// there is a job for that port of every agent, those that are still to come included.
func (s *Server) serveScrapeConfig(w http.ResponseWriter, r *http.Request) {
	asked := r.URL.Query()["port"]
	if len(asked) > maxPorts {
		http.Error(w, fmt.Sprintf("%d ports were named; name at most %d", len(asked), maxPorts), http.StatusBadRequest)
		return
	}
	ports := map[int]bool{}
	for _, text := range asked {
		port, err := strconv.ParseUint(text, 10, 16)
		if err != nil || port == 0 {
			http.Error(w, fmt.Sprintf("port=%q: write a port from 1 to 65535, as in port=9100", text), http.StatusBadRequest)
			return
		}
		ports[int(port)] = true
	}

	base := url.URL{Scheme: "http", Host: cmp.Or(r.Host, s.Addr()), Path: s.config.RoutePrefix}
	if r.TLS != nil {
		base.Scheme = "https"
	}
	if external := s.config.ExternalURL; external != nil {
		base = url.URL{Scheme: external.Scheme, Host: external.Host, Path: strings.TrimSuffix(external.Path, "/")}
	}
	proxy := url.URL{Scheme: base.Scheme, Host: base.Host}
	var credentials *basicAuth
	if !s.access.Roles().Open() {
		credentials = &placeholders
		proxy.User = url.UserPassword(credentials.Username, credentials.Password)
	}
	agentLabel := relabel{Source: []string{metaAgent}, Target: "agent"}
	discover := func(path string) []httpSD {
		return []httpSD{{URL: base.JoinPath(path).String(), BasicAuth: credentials}}
	}

	var jobs []commentedJob
	jobs = append(jobs, commentedJob{"What agents declare with --target, and the agents themselves: their textfiles and their machine's pushes. It is found by itself.", scrapeJob{
		Name: "culvert-targets", ProxyURL: proxy.String(), HTTPSD: discover("targets"), Relabel: []relabel{agentLabel},
	}})
	for _, port := range slices.Sorted(maps.Keys(ports)) {
		jobs = append(jobs, commentedJob{fmt.Sprintf("Port %d of every agent; each has to have --allow=%d.", port, port), scrapeJob{
			Name: fmt.Sprintf("port-%d", port), ProxyURL: proxy.String(), HTTPSD: discover("clients"),
			Relabel: []relabel{{Source: []string{"__address__"}, Target: "__address__", Replacement: fmt.Sprintf("$1:%d", port)}, agentLabel},
		}})
	}
	seen := s.answering(r)
	for _, place := range slices.SortedFunc(maps.Keys(seen), func(a, b answeringAt) int {
		return cmp.Or(cmp.Compare(a.port, b.port), cmp.Compare(a.scheme, b.scheme), cmp.Compare(a.path, b.path))
	}) {
		if place.scheme == "http" && place.path == "/metrics" && ports[place.port] {
			continue
		}
		job := scrapeJob{Name: place.job(), ProxyURL: proxy.String(), StaticConfigs: []staticConfig{{slices.Sorted(maps.Keys(seen[place]))}}}
		comment := "What answered there through this proxy so far; targets that come later are to be added."
		if place.scheme == "https" {
			job.Scheme = "https"
			comment += " TLS goes through from Prometheus to the exporter: a private authority needs tls_config with its ca_file."
		}
		if place.path != "/metrics" {
			job.MetricsPath = place.path
		}
		jobs = append(jobs, commentedJob{comment, job})
	}
	own := scrapeJob{
		Name: "culvert-proxy", HonorLabels: true, Scheme: base.Scheme, MetricsPath: strings.TrimSuffix(base.Path, "/") + s.config.TelemetryPath,
		BasicAuth: credentials, StaticConfigs: []staticConfig{{[]string{base.Host}}},
	}
	if own.Scheme == "http" {
		own.Scheme = ""
	}
	if own.MetricsPath == "/metrics" {
		own.MetricsPath = ""
	}
	if s.cluster == nil {
		jobs = append(jobs, commentedJob{"What jobs pushed, and this proxy's own metrics.", own})
	} else {
		groups := own
		groups.Name, groups.Params = "culvert-pushed", map[string][]string{"only": {"groups"}}
		own.HonorLabels, own.Params = false, map[string][]string{"only": {"self"}}
		jobs = append(jobs, commentedJob{"What jobs pushed, which is alike on every proxy: through one of them.", groups},
			commentedJob{"This proxy's own metrics; the other proxies are to be added.", own})
	}

	var text strings.Builder
	text.WriteString("# For Prometheus: what " + oneLine(base.Host) + " knows now.\n")
	if credentials != nil {
		fmt.Fprintf(&text, "# %s and %s stand for the basic_auth of an entry of roles.scrapers: a proxy_url takes no token.\n", credentials.Username, credentials.Password)
	}
	if s.config.ExternalURL != nil {
		fmt.Fprintf(&text, "# Where %s is a reverse proxy that speaks HTTP, scrapes don't get through it as they are: write this proxy's own address into each proxy_url. Or leave that away, with %s?mode=path.\n",
			oneLine(base.Host), oneLine(base.JoinPath("targets").String()))
	}
	if base.Scheme == "https" {
		text.WriteString("# A certificate of a private authority needs tls_config with its ca_file beside each proxy_url, in http_sd_configs, and in the last job.\n")
	}
	if len(ports) == 0 {
		text.WriteString("# For a port of every agent, as 9100 of node_exporter, ask for this with ?port=9100.\n")
	}
	text.WriteString("scrape_configs:\n")
	for _, job := range jobs {
		out, err := yaml.Marshal([]scrapeJob{job.scrapeJob})
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		text.WriteString("# " + job.comment + "\n")
		text.Write(out)
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.Header().Set("Cache-Control", "no-store")
	fmt.Fprint(w, text.String())
}

type commentedJob struct {
	comment string
	scrapeJob
}

// answeringAt is where targets were scraped with success.
type answeringAt struct {
	scheme, path string
	port         int
}

// job returns the name of a job, which says what is special. Prometheus takes no file that
// has a name twice.
func (a answeringAt) job() string {
	name := fmt.Sprintf("port-%d", a.port)
	if a.scheme == "https" {
		name += "-https"
	}
	if a.path != "/metrics" {
		name += a.path
	}
	return name
}

// answering returns the addresses, as Prometheus asks for them, that were scraped with
// success, but for named targets, which discovery lists. Those with query parameters are
// left out: what they mean only the scraper knows.
func (s *Server) answering(r *http.Request) map[answeringAt]map[string]bool {
	found := map[answeringAt]map[string]bool{}
	for _, info := range s.visibleAgents(r) {
		logs, _, _ := s.fleet.Scrapes(info.Name)
		for _, log := range logs {
			if !slices.ContainsFunc(log.History, func(e fleet.ScrapeEntry) bool { return e.Outcome == outcomeOK }) {
				continue
			}
			place := answeringAt{scheme: "http", port: 80}
			u, err := url.Parse(log.URL)
			if log.Mode == "connect" {
				// What is asked for inside of it, nobody sees.
				u, err = &url.URL{Scheme: "https", Host: log.URL, Path: "/metrics"}, nil
				place.scheme, place.port = "https", 443
			}
			if err != nil || u.Scheme != place.scheme || u.RawQuery != "" || u.Hostname() == "" {
				continue
			}
			if _, err := strconv.ParseUint(log.Target, 10, 16); err != nil && !strings.Contains(log.Target, ":") {
				continue // a named target
			}
			if text := u.Port(); text != "" {
				port, err := strconv.ParseUint(text, 10, 16)
				if err != nil {
					continue
				}
				place.port = int(port)
			}
			place.path = cmp.Or(u.Path, "/")
			if found[place] == nil {
				found[place] = map[string]bool{}
			}
			found[place][net.JoinHostPort(u.Hostname(), strconv.Itoa(place.port))] = true
		}
	}
	return found
}

// oneLine drops what would end a comment.
func oneLine(text string) string {
	return strings.Map(func(c rune) rune {
		if c < ' ' || c == 0x85 || c == 0x2028 || c == 0x2029 {
			return -1
		}
		return c
	}, text)
}
