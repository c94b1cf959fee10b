package main_test

import (
	"bytes"
	"context"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/culvert-io/culvert/protocol/externaltest"
)

const berlin1 = "web-1.berlin.example.net"

// token runs culvert-proxy token.
func token(t *testing.T, config string, args ...string) (stdout string, err error) {
	t.Helper()
	if err := programs(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(programDir, "culvert-proxy"), append([]string{"--config.file=" + config, "token"}, args...)...)
	var out, notes bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &notes
	if err = cmd.Run(); err != nil {
		t.Logf("token %q: %s", args, &notes)
		return notes.String(), err
	}
	return strings.TrimSpace(out.String()), nil
}

// TestToken: a token that was made counts within seconds, and one that was revoked
// takes its agents' sessions along; nobody tells the proxy.
func TestToken(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	config := write(t, dir, "culvert.yml", "roles: {agent_tokens: tokens.yml}")
	if out, err := token(t, config, "list"); err != nil || !strings.HasPrefix(out, "NAME") {
		t.Fatalf("list without a token: %v %s", err, out)
	}
	kept, err := token(t, config, "create", "--agent=*.berlin.example.net", "--name=kept", "--expires=90d", "--host=*.berlin.lan", "--push-job=backup-.*")
	if err != nil {
		t.Fatal(err)
	}
	leaked, err := token(t, config, "create", "--agent=db-1", "--name=leaked")
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(dir, "tokens.yml"))
	if err != nil || strings.Contains(string(text), kept) || len(kept) < 32 {
		t.Errorf("the file of the tokens: %v %s", err, text)
	}
	list, err := token(t, config, "list")
	if err != nil || !strings.Contains(list, "kept") || !strings.Contains(list, "*.berlin.lan") || !strings.Contains(list, "backup-.*") || strings.Contains(list, leaked) {
		t.Errorf("list: %v %s", err, list)
	}
	for _, c := range []struct{ want, command string }{
		{"--agent' not provided", "create"},
		{"the name is there twice", "create --agent=a --name=kept"},
		{"agents[0]", "create --agent=a..b"},
		{"push_jobs[0]", "create --agent=a --push-job=("},
		{`no token "nobody"`, "revoke nobody"},
	} {
		if out, err := token(t, config, strings.Fields(c.command)...); err == nil || !strings.Contains(out, c.want) {
			t.Errorf("%s: got %v %s, want %q", c.command, err, out, c.want)
		}
	}
	proxy := startProxy(t, "--config.file="+config)
	late, err := token(t, config, "create", "--agent=late-*")
	if err != nil {
		t.Fatal(err)
	}
	proxy.awaitLog(`msg="Configuration reloaded"`)
	startAgent(t, proxy.url, "late-1", "--token-file="+write(t, dir, "late", late))
	good := startAgent(t, proxy.url, berlin1, "--token-file="+write(t, dir, "kept", kept), "--host=db.berlin.lan")
	bad := startAgent(t, proxy.url, "db-1", "--token-file="+write(t, dir, "leaked", leaked))
	if _, err := token(t, config, "revoke", "leaked"); err != nil {
		t.Fatal(err)
	}
	bad.awaitLog(`msg="Session lost" .*agent=db-1`)
	bad.awaitLog(`msg="Not connected" .*401 unauthorized`)
	proxy.awaitLog(`msg="Agent disconnected.* agent=db-1`)
	if strings.Contains(good.log(), "Session lost") {
		t.Error("the other agent went along")
	}
	if out, err := token(t, config, "list"); err != nil || strings.Contains(out, "leaked") {
		t.Errorf("list after the revocation: %v %s", err, out)
	}
}

// TestSecureExample runs examples/secure as it stands, but for names that have to be
// addresses here: a real Prometheus scrapes through TLS with its password, and sees why
// it can't without.
func TestSecureExample(t *testing.T) {
	t.Parallel()
	promtool := externaltest.Program(t, "promtool", "prometheus")
	ca := newAuthority(t)
	ca.server("127.0.0.1") // proxy
	dir := ca.dir
	httpTarget := serve(t, exposition("e2e_value 1\n"))
	httpsTarget := ca.serveTLS(berlin1, exposition("e2e_value 2\n"))
	read := func(name string) string {
		t.Helper()
		text, err := os.ReadFile(filepath.Join("..", "examples", "secure", name))
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	rename := func(from, to string) {
		t.Helper()
		if err := os.Rename(filepath.Join(dir, from), filepath.Join(dir, to)); err != nil {
			t.Fatal(err)
		}
	}
	rename("127.0.0.1.pem", "proxy.pem")
	rename("127.0.0.1-key.pem", "proxy-key.pem")
	write(t, dir, "prometheus.password", "s3cret-of-prometheus\n")
	write(t, dir, "admin.password", "s3cret-of-admin\n")
	write(t, dir, "backups.token", "0123456789abcdef-backups\n")
	config, web := write(t, dir, "culvert.yml", read("culvert.yml")), write(t, dir, "web.yml", read("web.yml"))
	secret, err := token(t, config, "create", "--require-key", "--agent=*.berlin.example.net")
	if err != nil {
		t.Fatal(err)
	}
	write(t, dir, "agent.token", secret+"\n")
	proxy := startProxy(t, "--config.file="+config, "--web.config.file="+web)

	here := strings.NewReplacer("proxy.example.net:8080", proxy.address, ":PASSWORD@", ":s3cret-of-prometheus@",
		berlin1+":9100", berlin1+":"+port(t, httpTarget), berlin1+":9443", berlin1+":"+port(t, httpsTarget),
		"allow: [9100]", "allow: ["+port(t, httpTarget)+", "+port(t, httpsTarget)+"]", "scrape_interval: 15s", "scrape_interval: 1s")
	client := write(t, dir, "client.yml", here.Replace(read("client.yml")))
	agent := start(t, "culvert-client", filepath.Join(programDir, "culvert-client"), "--config.file="+client, "--fqdn="+berlin1, "--metrics-addr=", "--scrape.local-host=127.0.0.1")
	agent.awaitLog(`msg=Connected`)

	push, err := http.NewRequest(http.MethodPut, proxy.url+"/metrics/job/backup-db", strings.NewReader("e2e_pushed 3\n"))
	if err != nil {
		t.Fatal(err)
	}
	push.Header.Set("Authorization", "Bearer 0123456789abcdef-backups")
	resp, err := (&http.Client{Transport: &http.Transport{TLSClientConfig: ca.config(), DisableKeepAlives: true}}).Do(push)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("push: %v %v", resp, err)
	}
	resp.Body.Close()

	text := here.Replace(read("prometheus.yml"))
	for _, check := range []string{read("prometheus.yml"), text} {
		if out, err := exec.CommandContext(t.Context(), promtool, "check", "config", write(t, dir, "prometheus.yml", check)).CombinedOutput(); err != nil {
			t.Fatalf("promtool: %v\n%s", err, out)
		}
	}
	text += strings.NewReplacer("%1", proxy.url, "%2", berlin1+":"+port(t, httpTarget), "%3", berlin1+":"+port(t, httpsTarget)).Replace(`
  - job_name: nobody
    proxy_url: %1
    tls_config: {ca_file: ca.pem}
    static_configs: [{targets: ["%2"]}]
  - job_name: nobody-https
    scheme: https
    proxy_url: %1
    tls_config: {ca_file: ca.pem}
    static_configs: [{targets: ["%3"]}]
`)
	file := write(t, dir, "prometheus.yml", text)
	p := &prometheus{process: start(t, "prometheus", externaltest.Program(t, "prometheus", "prometheus"),
		"--config.file="+file, "--storage.tsdb.path="+filepath.Join(dir, "data"), "--web.listen-address=127.0.0.1:0")}
	p.url = "http://" + p.awaitLog(`msg="Listening on" address=(\S+)`)[1]
	p.awaitLog(`Server is ready to receive web requests`)

	p.awaitSample(`up{job="agents",instance="agent.`+berlin1+`"}`, "1", time.Time{})
	p.awaitSample(`e2e_value{job="node"}`, "1", time.Time{})
	p.awaitSample(`e2e_value{job="node-https"}`, "2", time.Time{})
	p.awaitSample(`e2e_pushed{job="backup-db"}`, "3", time.Time{})
	p.awaitSample(`culvert_proxy_agents{state="connected"}`, "1", time.Time{})
	p.awaitSample(`up{job="nobody"}`, "0", time.Time{})
	p.awaitSample(`up{job="nobody-https"}`, "0", time.Time{})
	p.awaitError("nobody", berlin1+":"+port(t, httpTarget), "407 unauthorized", "Proxy-Authorization")
	p.awaitError("nobody-https", berlin1+":"+port(t, httpsTarget), "unauthorized", "Proxy-Authorization")
}
