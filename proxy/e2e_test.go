// End-to-end tests: culvert-proxy and culvert-client as processes of their own,
// with a real Prometheus and a real exporter.
package main_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-io/culvert/protocol/externaltest"
)

var programDir string // set by programs

func TestMain(m *testing.M) {
	code := m.Run()
	if programDir != "" {
		os.RemoveAll(programDir)
	}
	os.Exit(code)
}

// programs builds culvert-proxy and culvert-client once for all tests.
var programs = sync.OnceValue(func() (err error) {
	if programDir, err = os.MkdirTemp("", "culvert-e2e-"); err != nil {
		return err
	}
	// What is only built is no dependency of the test. Looking at it keeps go test
	// from repeating a result that it has from before a change.
	if err := filepath.WalkDir("../client", func(_ string, _ fs.DirEntry, err error) error { return err }); err != nil {
		return err
	}
	for _, name := range []string{"proxy", "client"} {
		args := []string{"build", "-o", filepath.Join(programDir, "culvert-"+name)}
		if raceEnabled {
			args = append(args, "-race")
		}
		out, err := exec.Command("go", append(args, "github.com/culvert-io/culvert/"+name)...).CombinedOutput()
		if err != nil {
			return fmt.Errorf("build culvert-%s: %w\n%s", name, err, out)
		}
	}
	return nil
})

// process is a child process with its log.
type process struct {
	t      testing.TB
	name   string
	cmd    *exec.Cmd
	exited chan struct{} // closed once it is gone

	mu  sync.Mutex // protects out
	out bytes.Buffer
}

// start starts a program, which is killed when the test ends; its log is shown
// where the test failed.
func start(t testing.TB, name, program string, args ...string) *process {
	t.Helper()
	p := &process{t: t, name: name, cmd: exec.Command(program, args...), exited: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = p, p
	if err := p.cmd.Start(); err != nil {
		t.Fatalf("start %s: %v", name, err)
	}
	go func() {
		defer close(p.exited)
		p.cmd.Wait()
	}()
	t.Cleanup(func() {
		p.kill()
		for _, sign := range []string{"WARNING: DATA RACE", "panic: "} {
			if strings.Contains(p.log(), sign) {
				t.Errorf("%s: %s", name, sign)
			}
		}
		if t.Failed() {
			t.Logf("log of %s:\n%s", name, p.log())
		}
	})
	return p
}

func (p *process) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.out.Write(b)
}

func (p *process) log() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.out.String()
}

// awaitLog waits for a log line and returns its submatches.
func (p *process) awaitLog(pattern string) []string {
	p.t.Helper()
	re := regexp.MustCompile(pattern)
	var found []string
	eventually(p.t, 30*time.Second, func() error {
		if found = re.FindStringSubmatch(p.log()); found != nil {
			return nil
		}
		select {
		case <-p.exited:
			p.t.Fatalf("%s has ended: %s", p.name, p.cmd.ProcessState)
		default:
		}
		return fmt.Errorf("the log of %s has no line %q", p.name, pattern)
	})
	return found
}

func (p *process) signal(s syscall.Signal) {
	p.t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		p.t.Fatalf("signal %s to %s: %v", s, p.name, err)
	}
}

func (p *process) kill() {
	p.cmd.Process.Kill()
	<-p.exited
}

// stop sends SIGTERM and waits for an end in good order. It returns when the
// process was gone.
func (p *process) stop() time.Time {
	p.t.Helper()
	p.signal(syscall.SIGTERM)
	return p.awaitExit()
}

// awaitExit waits for the exit code 0. It returns when the process was gone.
func (p *process) awaitExit() time.Time {
	p.t.Helper()
	select {
	case <-p.exited:
	case <-time.After(30 * time.Second):
		p.t.Fatalf("%s does not end", p.name)
	}
	gone := time.Now()
	if code := p.cmd.ProcessState.ExitCode(); code != 0 {
		p.t.Errorf("%s ended with %s, want exit code 0", p.name, p.cmd.ProcessState)
	}
	return gone
}

// proxyProcess is a running culvert-proxy.
type proxyProcess struct {
	*process
	address, url string
}

// startProxy starts a proxy on a free port, with its state in memory and nothing
// to settle, unless args say otherwise.
func startProxy(t testing.TB, args ...string) *proxyProcess {
	t.Helper()
	if err := programs(); err != nil {
		t.Fatal(err)
	}
	scheme := "http"
	for _, flag := range []string{"--web.listen-address=127.0.0.1:0", "--storage.path=", "--agent.settle-time=0"} {
		given := false
		for _, arg := range args {
			given = given || strings.HasPrefix(arg, flag[:strings.Index(flag, "=")+1])
		}
		if !given {
			args = append(args, flag)
		}
	}
	for _, arg := range args {
		if strings.HasPrefix(arg, "--web.config.file=") {
			scheme = "https"
		}
	}
	p := &proxyProcess{process: start(t, "culvert-proxy", filepath.Join(programDir, "culvert-proxy"), args...)}
	p.address = p.awaitLog(`msg=Listening address=(\S+) tls=\w+ for="scrapers`)[1]
	p.url = scheme + "://" + p.address
	return p
}

// startAgent starts an agent and waits until the proxy has accepted it.
func startAgent(t *testing.T, proxyURL, name string, args ...string) *process {
	t.Helper()
	if err := programs(); err != nil {
		t.Fatal(err)
	}
	args = append([]string{"--proxy-url=" + proxyURL, "--fqdn=" + name, "--metrics-addr=", "--scrape.local-host=127.0.0.1"}, args...)
	p := start(t, "culvert-client "+name, filepath.Join(programDir, "culvert-client"), args...)
	p.awaitLog(`msg=Connected`)
	return p
}

// startNodeExporter starts a node exporter and returns its base URL.
func startNodeExporter(t *testing.T) string {
	t.Helper()
	p := start(t, "node exporter", externaltest.Program(t, "prometheus-node-exporter", "prometheus-node-exporter"), "--web.listen-address=127.0.0.1:0")
	return "http://" + p.awaitLog(`msg="Listening on" address=(\S+)`)[1]
}

// prometheus is a running Prometheus.
type prometheus struct {
	*process
	url string
}

// startPrometheus starts Prometheus with the given scrape_configs, in YAML. It
// scrapes once a second where they say nothing else.
func startPrometheus(t *testing.T, scrapeConfigs string) *prometheus {
	t.Helper()
	program := externaltest.Program(t, "prometheus", "prometheus")
	dir := t.TempDir()
	file := write(t, dir, "prometheus.yml", "global: {scrape_interval: 1s, scrape_timeout: 1s}\nscrape_configs:\n"+scrapeConfigs)
	p := &prometheus{process: start(t, "prometheus", program,
		"--config.file="+file, "--storage.tsdb.path="+filepath.Join(dir, "data"), "--web.listen-address=127.0.0.1:0")}
	p.url = "http://" + p.awaitLog(`msg="Listening on" address=(\S+)`)[1]
	p.awaitLog(`Server is ready to receive web requests`)
	return p
}

// series is one series in the answer to a query.
type series struct {
	Metric map[string]string `json:"metric"`
	Value  sample            `json:"value"`  // of an instant vector
	Values []sample          `json:"values"` // of a range vector
}

type sample struct {
	at    time.Time
	value string
}

func (s *sample) UnmarshalJSON(b []byte) error {
	var seconds float64
	if err := json.Unmarshal(b, &[]any{&seconds, &s.value}); err != nil {
		return err
	}
	s.at = time.UnixMilli(int64(seconds*1000 + 0.5))
	return nil
}

func (p *prometheus) query(expr string) []series {
	p.t.Helper()
	var data struct{ Result []series }
	p.api("/api/v1/query?query="+url.QueryEscape(expr), &data)
	return data.Result
}

// activeTarget is one entry of /api/v1/targets.
type activeTarget struct {
	Labels    map[string]string `json:"labels"`
	Health    string            `json:"health"`
	LastError string            `json:"lastError"`
}

func (p *prometheus) targets() []activeTarget {
	p.t.Helper()
	var data struct{ ActiveTargets []activeTarget }
	p.api("/api/v1/targets?state=active", &data)
	return data.ActiveTargets
}

func (p *prometheus) api(path string, data any) {
	p.t.Helper()
	a := get(p.t, p.url+path)
	if a.status != http.StatusOK {
		p.t.Fatalf("%s: %d %s", path, a.status, a.body)
	}
	if err := json.Unmarshal([]byte(a.body), &struct{ Data any }{data}); err != nil {
		p.t.Fatalf("%s: %v", path, err)
	}
}

// awaitSample waits until exactly one series matches selector and has a sample of
// this value that was taken after the given time, and returns the first such one.
func (p *prometheus) awaitSample(selector, value string, after time.Time) sample {
	p.t.Helper()
	var found sample
	eventually(p.t, time.Minute, func() error {
		result := p.query(selector + "[10m]")
		if len(result) != 1 {
			return fmt.Errorf("%s: %d series, want 1", selector, len(result))
		}
		for _, s := range result[0].Values {
			if s.value == value && s.at.After(after) {
				found = s
				return nil
			}
		}
		return fmt.Errorf("%s: no sample is %s since %s; %v", selector, value, after, p.targets())
	})
	return found
}

// awaitError waits until the target's lastError contains all that is wanted.
func (p *prometheus) awaitError(job, instance string, want ...string) {
	p.t.Helper()
	eventually(p.t, 30*time.Second, func() error { return p.missingError(job, instance, want...) })
}

// missingError returns an error until the target's lastError contains all that is
// wanted.
func (p *prometheus) missingError(job, instance string, want ...string) error {
	p.t.Helper()
	for _, target := range p.targets() {
		if target.Labels["job"] != job || target.Labels["instance"] != instance {
			continue
		}
		for _, part := range want {
			if !strings.Contains(target.LastError, part) {
				return fmt.Errorf("job %s, %s: the error lacks %q: %q", job, instance, part, target.LastError)
			}
		}
		return nil
	}
	return fmt.Errorf("job %s has no target %s", job, instance)
}

// answer is an HTTP response, read to its end.
type answer struct {
	status int
	header http.Header
	body   string
}

var direct = &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}

// get fetches a URL without a proxy.
func get(t testing.TB, u string) answer {
	t.Helper()
	a, err := fetch(direct, u, "")
	if err != nil {
		t.Fatalf("get %s: %v", u, err)
	}
	return a
}

// through returns a client that scrapes as Prometheus does with proxy_url.
func through(t *testing.T, proxyURL string, tlsConfig *tls.Config) *http.Client {
	t.Helper()
	u, err := url.Parse(proxyURL)
	if err != nil {
		t.Fatal(err)
	}
	transport := &http.Transport{Proxy: http.ProxyURL(u), TLSClientConfig: tlsConfig, MaxIdleConnsPerHost: 2000}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: 2 * time.Minute}
}

// fetch fetches a URL. timeout is what Prometheus would say of its own, in seconds.
func fetch(client *http.Client, u, timeout string) (answer, error) {
	req, err := http.NewRequestWithContext(context.Background(), http.MethodGet, u, nil)
	if err != nil {
		return answer{}, err
	}
	if timeout != "" {
		req.Header.Set("X-Prometheus-Scrape-Timeout-Seconds", timeout)
	}
	resp, err := client.Do(req)
	if err != nil {
		return answer{}, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return answer{resp.StatusCode, resp.Header, string(body)}, err
}

// expect fetches a URL through client and returns an error unless it is answered
// by 200 and exactly this body.
func expect(client *http.Client, u, timeout, body string) error {
	a, err := fetch(client, u, timeout)
	switch {
	case err != nil:
		return err
	case a.status != http.StatusOK:
		return fmt.Errorf("%s: %d %s", u, a.status, a.body)
	case a.body != body:
		return fmt.Errorf("%s: the body has %d bytes, want %d: %.100q", u, len(a.body), len(body), a.body)
	}
	return nil
}

// gauge returns the value of a series of a proxy's own metrics.
func (p *proxyProcess) gauge(series string) float64 {
	p.t.Helper()
	for line := range strings.SplitSeq(get(p.t, p.url+"/metrics").body, "\n") {
		if text, ok := strings.CutPrefix(line, series+" "); ok {
			value, err := strconv.ParseFloat(text, 64)
			if err != nil {
				p.t.Fatalf("%s: %v", series, err)
			}
			return value
		}
	}
	p.t.Fatalf("the proxy has no series %s", series)
	return 0
}

// agentInfo is what the proxy's API shows of an agent.
type agentInfo struct {
	Connected  bool      `json:"connected"`
	Since      time.Time `json:"since"`
	LostReason string    `json:"lost_reason"`
}

func (p *proxyProcess) agent(name string) (info agentInfo) {
	p.t.Helper()
	a := get(p.t, p.url+"/api/v1/agents/"+name)
	if err := json.Unmarshal([]byte(a.body), &struct{ Data any }{&info}); err != nil {
		p.t.Fatalf("agent %s: %v: %s", name, err, a.body)
	}
	return info
}

// eventually calls f until it returns nil, and fails the test with its last error.
func eventually(t testing.TB, within time.Duration, f func() error) {
	t.Helper()
	if err := try(within, f); err != nil {
		t.Fatal(err)
	}
}

// try calls f until it returns nil, and returns its last error when time is over.
func try(within time.Duration, f func() error) error {
	deadline := time.Now().Add(within)
	for {
		err := f()
		if err == nil {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("still after %s: %w", within, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// background calls f again and again, with a pause between, until the returned
// function is called; that one waits for the last call. What f returns fails the
// test, once.
func background(t *testing.T, pause time.Duration, f func() error) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var task sync.WaitGroup
	task.Go(func() {
		for {
			if err := f(); err != nil {
				t.Error(err)
				return
			}
			select {
			case <-ctx.Done():
				return
			case <-time.After(pause):
			}
		}
	})
	stop = func() { cancel(); task.Wait() }
	t.Cleanup(stop)
	return stop
}

// serve starts an HTTP server on loopback, in this process.
func serve(t *testing.T, h http.HandlerFunc) *httptest.Server {
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return s
}

// exposition serves text as an exporter does.
func exposition(text string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; version=0.0.4")
		io.WriteString(w, text)
	}
}

func port(t *testing.T, s *httptest.Server) string {
	t.Helper()
	_, port, err := net.SplitHostPort(s.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	return port
}

func write(t *testing.T, dir, name, text string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// authority is a CA of the test's own.
type authority struct {
	t    *testing.T
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	file string // its certificate, in PEM
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{t: t, dir: t.TempDir()}
	a.cert, a.key, a.file, _ = a.issue("ca", &x509.Certificate{
		Subject: pkix.Name{CommonName: "test CA"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	})
	return a
}

// server returns the files of a certificate for host names and IP addresses.
func (a *authority) server(hosts ...string) (certFile, keyFile string) {
	a.t.Helper()
	template := &x509.Certificate{Subject: pkix.Name{CommonName: hosts[0]}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	for _, h := range hosts {
		if ip := net.ParseIP(h); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, h)
		}
	}
	_, _, certFile, keyFile = a.issue(hosts[0], template)
	return certFile, keyFile
}

func (a *authority) issue(name string, template *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey, string, string) {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	template.SerialNumber = big.NewInt(time.Now().UnixNano())
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	parent, parentKey := a.cert, a.key
	if parent == nil {
		parent, parentKey = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, parentKey)
	keyDER, keyErr := x509.MarshalPKCS8PrivateKey(key)
	cert, parseErr := x509.ParseCertificate(der)
	if err := errors.Join(err, keyErr, parseErr); err != nil {
		a.t.Fatal(err)
	}
	certFile := write(a.t, a.dir, name+".pem", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})))
	keyFile := write(a.t, a.dir, name+"-key.pem", string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})))
	return cert, key, certFile, keyFile
}

// config returns a client's TLS configuration that trusts this CA alone.
func (a *authority) config() *tls.Config {
	pool := x509.NewCertPool()
	pool.AddCert(a.cert)
	return &tls.Config{RootCAs: pool}
}

// serveTLS starts an HTTPS server on loopback with a certificate for host.
func (a *authority) serveTLS(host string, h http.HandlerFunc) *httptest.Server {
	a.t.Helper()
	cert, err := tls.LoadX509KeyPair(a.server(host))
	if err != nil {
		a.t.Fatal(err)
	}
	s := httptest.NewUnstartedServer(h)
	s.TLS = &tls.Config{Certificates: []tls.Certificate{cert}}
	s.StartTLS()
	a.t.Cleanup(s.Close)
	return s
}
