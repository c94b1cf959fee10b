package main

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"errors"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"go.uber.org/goleak"
)

// The scenarios start this program again, to play agents.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "agents" {
		main()
		return
	}
	os.Exit(m.Run())
}

// measured runs scenarios with --json for a fraction of a second, and checks that
// nothing stays.
func measured(t *testing.T, args ...string) map[string]*result {
	t.Helper()
	t.Setenv("TMPDIR", t.TempDir())
	before := goleak.IgnoreCurrent()
	var stdout, stderr bytes.Buffer
	if err := run(t.Context(), append(args, "--json", "--duration=200ms", "--rounds=2"), &stdout, &stderr); err != nil {
		t.Fatalf("%v\n%s", err, stderr.String())
	}
	goleak.VerifyNone(t, before)
	if left, _ := filepath.Glob(filepath.Join(os.TempDir(), "culvert-*")); len(left) > 0 {
		t.Errorf("temporary files stay: %s", left)
	}
	var r report
	if err := json.Unmarshal(stdout.Bytes(), &r); err != nil {
		t.Fatalf("%v\n%s", err, stdout.String())
	}
	if r.Rounds != 2 || r.Duration != 200*time.Millisecond || r.CPUs < 1 {
		t.Errorf("the report does not say what was run: %+v", r)
	}
	found := map[string]*result{}
	for _, one := range r.Results {
		found[one.Scenario] = one
	}
	return found
}

func TestScrapeAndLatency(t *testing.T) {
	svg := filepath.Join(t.TempDir(), "latency.svg")
	found := measured(t, "100kB-1", "--body=10kB", "--scrapers=2", "--svg="+svg)
	for name, wantClients := range map[string][]int{"100kB-1": {2}, latencyScenario: {1, 2}} {
		r := found[name]
		if r == nil {
			t.Fatalf("scenario %s has no result", name)
		}
		clients := map[string][]int{}
		for _, m := range r.Rows {
			clients[m.Subject] = append(clients[m.Subject], m.Clients)
			if m.Rate <= 0 || m.Failed > 0 || m.P50 <= 0 || m.P95 < m.P50 || m.P99 < m.P95 {
				t.Errorf("%s: %+v", name, m)
			}
			if each := m.MBps * 1e6 / m.Rate; each < 8000 || each > 12_000 { // medians of two rounds
				t.Errorf("%s: %s: %g bytes a scrape, want 10,000", name, m.Subject, each)
			}
			if m.Subject == "culvert" && runtime.GOOS == "linux" && (m.Proxy.Resident < 1<<20 || m.Agent.Resident < 1<<20) {
				t.Errorf("%s: the resident memory is missing: %+v", name, m)
			}
		}
		for _, subject := range []string{"direct", "culvert"} {
			if got := clients[subject]; len(got) != len(wantClients) {
				t.Errorf("%s: %s was measured with %v scrapers, want %v", name, subject, got, wantClients)
			}
		}
	}
	ratios := found["100kB-1"].Ratios
	if len(ratios) == 0 || ratios[0].Subject != "culvert" || ratios[0].Baseline != "direct" || ratios[0].Rate.Median <= 0 || ratios[0].Rate.Least > ratios[0].Rate.Most {
		t.Errorf("ratios: %+v", ratios)
	}
	plotted, err := os.ReadFile(svg)
	if err != nil {
		t.Fatal(err)
	}
	for part := xml.NewDecoder(bytes.NewReader(plotted)); ; {
		if _, err := part.Token(); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatalf("the plot is no XML: %v", err)
		}
	}
	for _, want := range []string{">culvert<", ">direct<", ">p99<", "concurrent scrapers", "latency of a scrape in ms"} {
		if !strings.Contains(string(plotted), want) {
			t.Errorf("the plot lacks %q", want)
		}
	}
	if bytes.Contains(plotted, []byte("NaN")) || bytes.Contains(plotted, []byte("Inf")) {
		t.Error("the plot has points that are no numbers")
	}
}

func TestManyAgents(t *testing.T) {
	found := measured(t, "many-agents", "discovery", "--agents=20", "--scrapers=2")
	if r := found["many-agents"]; len(r.Rows) != 2 || r.Rows[1].Subject != "agents: 20" || r.Rows[1].Failed > 0 || r.Rows[1].Rate <= 0 {
		t.Errorf("%+v", r)
	}
	if r := found["discovery"]; len(r.Figures) != 3 || r.Figures[0] != (figure{"entries", 80, ""}) {
		t.Errorf("%+v", r)
	}
}

func TestTLS(t *testing.T) {
	found := measured(t, "many-agents", "slow-link", "--tls", "--agents=20", "--scrapers=2")
	if r := found["many-agents"]; len(r.Rows) != 2 || r.Rows[1].Failed > 0 || r.Rows[1].Rate <= 0 {
		t.Errorf("%+v", r)
	}
	if r := found["slow-link"]; !strings.Contains(r.Skipped, "--tls") {
		t.Errorf("slow-link, which has no TLS, was not skipped: %+v", r)
	}
}

func TestExposition(t *testing.T) {
	for _, n := range []int{1, 2, 100, 1000, 100_000} {
		text := exposition(n)
		if len(text) != n {
			t.Errorf("the exposition has %d bytes, want %d", len(text), n)
		}
		parser := expfmt.NewTextParser(model.LegacyValidation)
		families, err := parser.TextToMetricFamilies(strings.NewReader(text))
		if err != nil || n >= 1000 && len(families) == 0 {
			t.Errorf("%d bytes: %d families, %v", n, len(families), err)
		}
	}
}

func TestRefusedArguments(t *testing.T) {
	for args, want := range map[string]string{
		"nonsense":                 "--list",
		"--proxy-url=http://p":     "--target",
		"--body=many":              "kB",
		"--rounds=0":               "positive",
		"100kB-1 --duration=-1s":   "positive",
		"100kB-1 --body=2000000kB": "1000MB",
	} {
		err := run(t.Context(), strings.Fields(args), io.Discard, io.Discard)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want an error with %q", args, err, want)
		}
	}
	var out bytes.Buffer
	if err := run(t.Context(), []string{"--list"}, &out, io.Discard); err != nil || strings.Count(out.String(), "\n") != len(scenarios) {
		t.Errorf("--list: %v\n%s", err, out.String())
	}
}
