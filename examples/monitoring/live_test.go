//go:build unix

package monitoring

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/promql/parser"

	"github.com/culvert-io/culvert/protocol/externaltest"
)

// TestLive runs the real programs: two proxies that share an etcd, a third one with roles,
// and agents with textfiles and pushes; and a real Prometheus with this folder's
// configuration. Every metric and label in rules and dashboard is there, every rule can be
// evaluated, every panel gets data, or says when it has none, and alerts name what is wrong.
func TestLive(t *testing.T) {
	prometheus := externaltest.Program(t, "prometheus", "prometheus")
	dir := t.TempDir()
	for _, name := range []string{"proxy", "client"} {
		if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", filepath.Join(dir, name), "../../"+name).CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	write := func(name, text string) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
		return path
	}

	endpoint := externaltest.StartEtcd(t).URL

	// Agents reach the first proxy by TLS, so that there is a certificate.
	certificate(t, dir)
	web := write("web.yml", "tls_server_config: {cert_file: cert.pem, key_file: key.pem}\n")
	agents := externaltest.FreeAddress(t)
	var proxies []string
	var last *program
	for i, extra := range [][]string{
		{"--cluster.etcd-endpoints=" + endpoint, "--cluster.listen-address=127.0.0.1:0", "--agent.listen-address=" + agents, "--agent.web.config.file=" + web},
		{"--cluster.etcd-endpoints=" + endpoint, "--cluster.listen-address=127.0.0.1:0"},
		{"--config.file=" + write("culvert.yml", `
roles:
  scrapers:
    - {name: prometheus, basic_auth: {username: prometheus, password_file: password}}
  agents:
    - {name: web, token_file: token, agents: ["web-*"], expires: 2999-01-01}
`)},
	} {
		write("password", "s3cret")
		write("token", "0123456789abcdef")
		address := externaltest.FreeAddress(t)
		proxies = append(proxies, address)
		last = start(t, fmt.Sprintf("proxy %d", i+1), filepath.Join(dir, "proxy"), append(extra, "--web.listen-address="+address, "--storage.path="+filepath.Join(dir, address))...)
	}
	for _, address := range proxies {
		await(t, func() error { return get("http://"+address+"/-/ready?for=push", nil) })
	}

	pushes, running, restart := map[string]string{}, map[string]*program{}, map[string]func(){}
	for _, agent := range []struct {
		name string
		args []string
	}{
		{"web-1", []string{"--proxy-url=https://" + agents, "--tls.cacert=" + filepath.Join(dir, "cert.pem"), "--textfile.directory=" + filepath.Join(dir, "textfiles"), "--config.file=" + write("web-1.yml", "labels: {env: test}")}},
		// The third proxy takes none of its pushes: its entry has no push_jobs.
		{"web-2", []string{"--proxy-url=http://" + proxies[1], "--proxy-url=http://" + proxies[2], "--token-file=" + filepath.Join(dir, "token")}},
		{"db-1", []string{"--proxy-url=http://" + proxies[2], "--token-file=" + write("wrong", "fedcba9876543210")}},
	} {
		write("textfiles/bad.prom", "no exposition at all {")
		pushes[agent.name] = externaltest.FreeAddress(t)
		restart[agent.name] = func() {
			running[agent.name] = start(t, agent.name, filepath.Join(dir, "client"), append(agent.args, "--fqdn="+agent.name, "--metrics-addr=",
				"--storage.path="+filepath.Join(dir, agent.name), "--push.listen-address="+pushes[agent.name])...)
		}
		restart[agent.name]()
	}
	push := func(address, group, body string, want int) {
		t.Helper()
		await(t, func() error {
			resp, err := http.Post("http://"+address+"/metrics/job/"+group, "text/plain", strings.NewReader(body))
			if err == nil {
				resp.Body.Close()
			}
			if err == nil && resp.StatusCode != want {
				err = fmt.Errorf("the push to %s got %s, want %d", group, resp.Status, want)
			}
			return err
		})
	}
	push(proxies[1], "late?interval=1h", "a 1\n", 200)
	push(proxies[1], "refused", "a 1 1\n", 400)
	push(pushes["web-1"], "backup/instance/web-1?interval=24h", "a 1\n", 200)
	push(pushes["web-2"], "report", "a 1\n", 202)
	// A session that breaks.
	await(t, func() error { return get("http://"+proxies[1]+"/api/v1/agents/web-2", nil) })
	forget, err := http.NewRequestWithContext(t.Context(), http.MethodDelete, "http://"+proxies[1]+"/api/v1/agents/web-2", nil)
	if err != nil {
		t.Fatal(err)
	}
	if resp, err := http.DefaultClient.Do(forget); err != nil || resp.StatusCode/100 != 2 {
		t.Fatalf("%v %v", resp, err)
	}

	// prometheus.yml as it stands, but for addresses and a password.
	text, err := os.ReadFile("prometheus.yml")
	if err != nil {
		t.Fatal(err)
	}
	itself := externaltest.FreeAddress(t)
	config := string(text)
	for _, edit := range [][2]string{
		{"global: {scrape_interval: 15s}", "global: {scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 1s}"},
		{"refresh_interval: 30s", "refresh_interval: 1s"},
		{"      - targets: [culvert.example.net:8080] # each of them, where there are several", "      - targets: [" + strings.Join(proxies, ", ") + "]\n    basic_auth: {username: prometheus, password: s3cret}"},
		{"culvert.example.net:8080", proxies[1]},
		{"localhost:9090", itself},
	} {
		if !strings.Contains(config, edit[0]) {
			t.Fatalf("prometheus.yml has no %q", edit[0])
		}
		config = strings.ReplaceAll(config, edit[0], edit[1])
	}
	for _, file := range ruleFiles(t) {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		// Nobody waits here for minutes.
		write(file, regexp.MustCompile(`(?m)^        for: [0-9]+m$`).ReplaceAllString(string(text), "        for: 1s"))
	}
	start(t, "prometheus", prometheus, "--config.file="+write("prometheus.yml", config), "--storage.tsdb.path="+filepath.Join(dir, "data"), "--web.listen-address="+itself)
	api := "http://" + itself + "/api/v1/"
	await(t, func() error { return get("http://"+itself+"/-/ready", nil) })

	// All that rules and dashboard ask for.
	type use struct {
		where    string
		selector *parser.VectorSelector
		by       []string // labels that the result is grouped by
	}
	var uses []use
	expressions := map[string]string{}
	for _, file := range ruleFiles(t) {
		for _, r := range rules(t, file) {
			expressions[file+": "+r.Record+r.Alert] = r.Expr
		}
	}
	d := readDashboard(t)
	asked := queries(t, d)
	for i, q := range asked {
		expressions[fmt.Sprintf("dashboard.json: %s (%d)", *q.panel.Title, i)] = q.all
	}
	for _, v := range d.Templating.List {
		if v.Definition == nil {
			continue
		}
		of := regexp.MustCompile(`^label_values\((.+), (\w+)\)$`).FindStringSubmatch(*v.Definition)
		if of == nil {
			t.Fatalf("the variable %s asks for %q", v.Name, *v.Definition)
		}
		expressions["dashboard.json: $"+v.Name] = "count by (" + of[2] + ") (" + allOf.Replace(of[1]) + ")"
	}
	for _, a := range d.Annotations.List {
		expressions["dashboard.json: "+a.Name] = allOf.Replace(*a.Expr)
	}
	for where, text := range expressions {
		expr, err := parser.NewParser(parser.Options{}).ParseExpr(text)
		if err != nil {
			t.Fatalf("%s: %v", where, err)
		}
		parser.Inspect(expr, func(node parser.Node, path []parser.Node) error {
			selector, ok := node.(*parser.VectorSelector)
			if !ok {
				return nil
			}
			u := use{where: where, selector: selector}
			for _, parent := range path { // the innermost last
				if a, ok := parent.(*parser.AggregateExpr); ok && !a.Without {
					u.by = a.Grouping
				}
			}
			uses = append(uses, u)
			return nil
		})
	}
	await(t, func() error {
		var names []string
		if err := get(api+"label/__name__/values", &names); err != nil {
			return err
		}
		missing := map[string]string{}
		for _, u := range uses {
			if name := u.selector.Name; !slices.Contains(names, name) {
				missing[name] = u.where
			}
		}
		if len(missing) > 0 {
			return fmt.Errorf("nobody emits %v", missing)
		}
		return nil
	})

	// The labels by which they select and group, and the values that the programs know.
	source := programText(t)
	jobs := regexp.MustCompile(`job_name: (\S+)`).FindAllStringSubmatch(config, -1)
	has := map[string]map[string]bool{}
	for _, u := range uses {
		name := u.selector.Name
		if has[name] == nil {
			var series []map[string]string
			if err := get(api+"series?"+url.Values{"match[]": {name}}.Encode(), &series); err != nil {
				t.Fatal(err)
			}
			has[name] = map[string]bool{}
			for _, s := range series {
				for label := range s {
					has[name][label] = true
				}
			}
		}
		for _, label := range u.by {
			if !has[name][label] {
				t.Errorf("%s: %s has no label %s to group by, but %v", u.where, name, label, slices.Sorted(maps.Keys(has[name])))
			}
		}
		for _, m := range u.selector.LabelMatchers {
			if !has[name][m.Name] {
				t.Errorf("%s: %s has no label %s to select by, but %v", u.where, name, m.Name, slices.Sorted(maps.Keys(has[name])))
			}
			if m.Value == ".+" || m.Name == model.MetricNameLabel || name == "ALERTS" {
				continue
			}
			for value := range strings.SplitSeq(m.Value, "|") {
				known := strings.Contains(source, `"`+value+`"`) || regexp.MustCompile(`^[1-5][0-9.]{2}$`).MatchString(value)
				if m.Name == "job" || m.Name == "config" {
					known = slices.ContainsFunc(jobs, func(job []string) bool { return job[1] == value })
				}
				if name == "prometheus_sd_discovered_targets" {
					known = known || m.Name == "name"
				}
				if !known {
					t.Errorf("%s: %s=%q of %s is what no program of ours says", u.where, m.Name, value, name)
				}
			}
		}
	}

	// Rules that fail are not seen otherwise: nobody alerts for them.
	await(t, func() error {
		var answer struct {
			Groups []struct {
				Rules []struct{ Name, Health, LastError string }
			}
		}
		if err := get(api+"rules", &answer); err != nil {
			return err
		}
		n := 0
		for _, group := range answer.Groups {
			for _, rule := range group.Rules {
				if n++; rule.Health != "ok" {
					return fmt.Errorf("the rule %s is %s: %s", rule.Name, rule.Health, rule.LastError)
				}
			}
		}
		if n == 0 {
			return errors.New("there are no rules")
		}
		return nil
	})

	for _, q := range asked {
		empty := false
		await(t, func() error {
			var answer struct{ Result []json.RawMessage }
			if err := get(api+"query?"+url.Values{"query": {q.all}}.Encode(), &answer); err != nil {
				return fmt.Errorf("%q: %s: %w", *q.panel.Title, q.all, err)
			}
			if empty = len(answer.Result) == 0; empty && !strings.Contains(*q.panel.Description, "Empty w") {
				return fmt.Errorf("%q has no data, and does not say when it has none: %s", *q.panel.Title, q.all)
			}
			return nil
		})
		if empty {
			t.Logf("%q has no data here: %s", *q.panel.Title, *q.panel.Description)
		}
	}

	// The labels of alerts are those by which people know things: of an agent its name, of a
	// group the job that was pushed.
	fires := func(alert, job, instance string, want bool) {
		t.Helper()
		await(t, func() error {
			var answer struct {
				Alerts []struct {
					Labels map[string]string
					State  string
				}
			}
			if err := get(api+"alerts", &answer); err != nil {
				return err
			}
			found := false
			for _, a := range answer.Alerts {
				found = found || a.State == "firing" && a.Labels["alertname"] == alert && a.Labels["job"] == job && a.Labels["instance"] == instance
			}
			if found != want {
				return fmt.Errorf("that %s fires for %s %s is %v; the alerts are %v", alert, job, instance, found, answer.Alerts)
			}
			return nil
		})
	}
	fires("BatchPushRefused", "refused", "", true)
	fires("CulvertTextfileErrors", "culvert-agents", "web-1", true)
	fires("CulvertAgentLost", "culvert-agents", "web-1", false)
	running["web-1"].stop()
	fires("CulvertAgentLost", "culvert-agents", "web-1", true)
	fires("CulvertAgentLost", "culvert-agents", "web-2", false)
	fires("CulvertManyAgentsLost", "culvert-proxy", "", false)
	restart["web-1"]()
	fires("CulvertAgentLost", "culvert-agents", "web-1", false)
	fires("CulvertTextfileErrors", "culvert-agents", "web-1", true)
	for _, c := range []struct {
		alert, job, instance, file string
		program                    *program
	}{
		{"CulvertAgentReloadFailed", "culvert-agents", "web-1", "web-1.yml", running["web-1"]},
		{"CulvertReloadFailed", "culvert-proxy", proxies[2], "culvert.yml", last},
	} {
		good, err := os.ReadFile(filepath.Join(dir, c.file))
		if err != nil {
			t.Fatal(err)
		}
		write(c.file, "lables: {env: test}")
		c.program.signal(t, syscall.SIGHUP)
		fires(c.alert, c.job, c.instance, true)
		write(c.file, string(good))
		c.program.signal(t, syscall.SIGHUP)
		fires(c.alert, c.job, c.instance, false)
	}
	var machine struct{ Result []json.RawMessage }
	if err := get(api+"query?"+url.Values{"query": {`push_up{job="backup",instance="web-1"} == 1`}}.Encode(), &machine); err != nil || len(machine.Result) != 1 {
		t.Errorf("the group of web-1's own job is %s, %v", machine.Result, err)
	}
}

// programText returns the source text of the programs, which has the values of labels.
func programText(t *testing.T) string {
	t.Helper()
	var all strings.Builder
	for _, root := range []string{"../../protocol", "../../gateway", "../../client", "../../proxy"} {
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
				return err
			}
			text, err := os.ReadFile(path)
			all.Write(text)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return all.String()
}

// program is one that runs.
type program struct {
	cmd  *exec.Cmd
	stop func() // kills it
}

func (p *program) signal(t *testing.T, s os.Signal) {
	t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		t.Fatal(err)
	}
}

// start starts a program, which ends with the test. Its log is shown where that failed.
func start(t *testing.T, name, path string, args ...string) *program {
	t.Helper()
	cmd := exec.Command(path, args...)
	log := new(lockedBuffer)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatalf("start %s: %v", name, err)
	}
	stop := sync.OnceFunc(func() {
		cmd.Process.Signal(syscall.SIGKILL)
		_ = cmd.Wait() // killed by us
	})
	t.Cleanup(func() {
		stop()
		if t.Failed() {
			t.Logf("log of %s:\n%s", name, log)
		}
	})
	return &program{cmd, stop}
}

// lockedBuffer is a log that is written while it is read.
type lockedBuffer struct {
	mu  sync.Mutex // protects all
	all bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.all.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.all.String()
}

// certificate writes cert.pem, which is its own authority, and key.pem.
func certificate(t *testing.T, dir string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(30 * 24 * time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	keyDER, keyErr := x509.MarshalPKCS8PrivateKey(key)
	err = errors.Join(err, keyErr,
		os.WriteFile(filepath.Join(dir, "cert.pem"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600),
		os.WriteFile(filepath.Join(dir, "key.pem"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), 0o600))
	if err != nil {
		t.Fatal(err)
	}
}

// get asks for a URL, and where data is not nil, reads the data of an answer of
// Prometheus's API into it.
func get(u string, data any) error {
	client := http.Client{Timeout: 10 * time.Second}
	resp, err := client.Get(u)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", u, resp.Status)
	}
	if data == nil {
		return nil
	}
	return json.NewDecoder(resp.Body).Decode(&struct{ Data any }{data})
}

// await waits until there is no error any more.
func await(t *testing.T, try func() error) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		err := try()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}
