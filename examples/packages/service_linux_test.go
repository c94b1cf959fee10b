package packages

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-io/culvert/protocol/externaltest"
)

// property returns a property of a unit.
func (m *machine) property(unit, name string) string {
	m.t.Helper()
	return strings.TrimSpace(m.run("systemctl", "show", "--property="+name, "--value", unit))
}

// scrape asks the proxy as Prometheus does, until the answer is there.
func (m *machine) scrape(url string) string {
	m.t.Helper()
	return m.run("curl", "--silent", "--show-error", "--fail", "--proxy", "http://127.0.0.1:8080", "--retry", "30", "--retry-all-errors", "--retry-delay", "1", url)
}

// awaitJournal waits until a unit has logged that: the journal takes what programs write when
// it gets round to it.
func (m *machine) awaitJournal(unit, want string) {
	m.t.Helper()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		out := m.run("journalctl", "--no-pager", "--output=cat", "--unit="+unit)
		if strings.Contains(out, want) {
			return
		}
		if time.Now().After(deadline) {
			m.t.Fatalf("the journal of %s does not say %s:\n%s", unit, want, out)
		}
	}
}

// TestService installs the packages where a systemd runs, and has it run them with all
// that the units forbid them: start, scrape, reload, upgrade, stop, removal.
func TestService(t *testing.T) {
	externaltest.Program(t, "dpkg", "dpkg")
	proxyPackage, clientPackage := deb(t, "culvert-proxy"), deb(t, "culvert-client")
	m := startMachine(t)
	for _, path := range []string{proxyPackage, clientPackage} {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		m.write("/run/"+filepath.Base(path), string(text), 0o644)
	}
	packages := []string{"/run/" + filepath.Base(proxyPackage), "/run/" + filepath.Base(clientPackage)}

	out := m.run(append([]string{"dpkg", "--no-triggers", "--install"}, packages...)...)
	for _, name := range names {
		if !strings.Contains(out, name+" is not started yet") {
			t.Errorf("the installation does not say what to do next:\n%s", out)
		}
		checkFiles(t, m.root, name, "deb")
		if out, code := m.try("systemctl", "is-active", name); code == 0 {
			t.Errorf("%s was started: %s", name, out)
		}
		out, code := m.try("systemd-analyze", "verify", "/usr/lib/systemd/system/"+name+".service")
		for line := range strings.Lines(out) {
			if strings.Contains(line, name) && !unknownBefore254.MatchString(line) {
				t.Error(line)
			}
		}
		if code != 0 {
			t.Errorf("systemd-analyze verify: exit code %d\n%s", code, out)
		}
	}

	// A start that fails is seen at once.
	if out, code := m.try("systemctl", "start", "culvert-client"); code == 0 {
		t.Errorf("an agent without a proxy started\n%s", out)
	}
	m.awaitJournal("culvert-client", "--proxy-url")
	m.run("systemctl", "stop", "culvert-client")

	m.write("/etc/culvert-client/client.yml", `
fqdn: web-1.example.net
proxy_urls: [http://127.0.0.1:8080]
allow: [8080]
textfile: {directories: [/var/lib/prometheus/node-exporter]}
key_file: /var/lib/culvert-client/agent.key
storage_path: /var/lib/culvert-client
push: {listen_addresses: ["unix:/run/culvert-client/push.sock"]}
metrics_address: ""
`, 0o644)
	m.write("/var/lib/prometheus/node-exporter/backup.prom", "backup_size_bytes 17\n", 0o644)
	m.run("systemctl", "enable", "--now", "culvert-proxy", "culvert-client")
	// Both said that they were ready.
	m.run("curl", "--silent", "--show-error", "--fail", "http://127.0.0.1:8080/-/healthy")
	m.run("curl", "--silent", "--show-error", "--fail", "--data-binary", "job_rows 3\n", "--unix-socket", "/run/culvert-client/push.sock", "http://agent/metrics/job/report/instance/a")
	for group, want := range map[string]int{"culvert-client": 0, "nogroup": 7} { // 7: curl couldn't connect
		if out, code := m.try("runuser", "--user=nobody", "--group="+group, "--", "curl", "--silent", "--show-error", "--fail", "--unix-socket", "/run/culvert-client/push.sock", "http://agent/-/ready"); code != want {
			t.Errorf("a user of the group %s pushes with the exit code %d, want %d\n%s", group, code, want, out)
		}
	}
	if out := m.scrape("http://web-1.example.net:8080/metrics"); !strings.Contains(out, "culvert_proxy_build_info{") {
		t.Errorf("an exporter on localhost is not in reach:\n%s", out)
	}
	out = m.scrape("http://agent.web-1.example.net/metrics")
	for _, want := range []string{"\nbackup_size_bytes 17\n", "\njob_rows{", "\nprocess_start_time_seconds ", `culvert_client_build_info{`, `version="` + version + `"`} {
		if !strings.Contains(out, want) {
			t.Errorf("the target agent lacks %q:\n%s", want, out)
		}
	}
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	for name, files := range map[string]int{"culvert-proxy": 262144, "culvert-client": 16384} {
		process := "/proc/" + m.property(name, "MainPID") + "/"
		status := m.run("cat", process+"status", process+"limits")
		uid := strings.TrimSpace(m.run("id", "-u", name))
		for _, want := range []string{"(?m)^Uid:\\s+" + uid + "\\s", "(?m)^CapEff:\\s+0+$", "(?m)^CapBnd:\\s+0+$", "(?m)^NoNewPrivs:\\s+1$", "(?m)^Seccomp:\\s+2$",
			// A systemd that may not raise limits keeps the one that it has.
			fmt.Sprintf("(?m)^Max open files\\s+(%d|%d)\\s", files, limit.Max)} {
			if !regexp.MustCompile(want).MatchString(status) {
				t.Errorf("%s lacks %s:\n%s", name, want, status)
			}
		}
		if out, code := m.try("nsenter", "--target="+m.property(name, "MainPID"), "--mount", "touch", "/usr/written"); code == 0 {
			t.Errorf("%s could write to /usr\n%s", name, out)
		}
	}

	// As long as the system allows: a fleet that reconnects has to fit in.
	if out, want := m.run("ss", "--listening", "--tcp", "--numeric", "--no-header", "sport = :8080"), strings.TrimSpace(m.run("cat", "/proc/sys/net/core/somaxconn")); !slices.Contains(strings.Fields(out), want) {
		t.Errorf("the accept queue is shorter than %s:\n%s", want, out)
	}

	// Reload: systemd's is done when the signal is sent.
	m.write("/etc/culvert-client/client.yml", strings.ReplaceAll(m.run("cat", "/etc/culvert-client/client.yml"), "allow: [8080]", "allow: [8080]\ntargets: [{name: proxy, url: 'http://127.0.0.1:8080/metrics'}]"), 0o644)
	m.run("systemctl", "reload", "culvert-proxy", "culvert-client")
	if out := m.scrape("http://proxy.web-1.example.net/metrics"); !strings.Contains(out, "culvert_proxy_build_info{") {
		t.Errorf("a target that came with a reload is not in reach:\n%s", out)
	}

	// What is killed comes back.
	m.run("systemctl", "kill", "--kill-whom=main", "--signal=KILL", "culvert-proxy", "culvert-client")
	if out := m.scrape("http://agent.web-1.example.net/metrics"); !strings.Contains(out, "\njob_rows{") {
		t.Errorf("after a kill there is no push of before:\n%s", out)
	}

	// An upgrade restarts what runs, and keeps what was configured.
	before := []string{m.property("culvert-proxy", "MainPID"), m.property("culvert-client", "MainPID")}
	m.run(append([]string{"dpkg", "--no-triggers", "--install"}, packages...)...)
	after := []string{m.property("culvert-proxy", "MainPID"), m.property("culvert-client", "MainPID")}
	for i, name := range names {
		if before[i] == after[i] || after[i] == "0" {
			t.Errorf("%s has the process %s, and had %s before the upgrade", name, after[i], before[i])
		}
	}
	if out := m.scrape("http://agent.web-1.example.net/metrics"); !strings.Contains(out, "\njob_rows{") {
		t.Errorf("after the upgrade there is no push of before:\n%s", out)
	}

	// A stop is a drain: nothing is killed, and the proxy knows that the agent left.
	m.run("systemctl", "stop", "culvert-client")
	if result, code := m.property("culvert-client", "Result"), m.property("culvert-client", "ExecMainStatus"); result != "success" || code != "0" {
		t.Errorf("the agent's end is %s, with the exit code %s", result, code)
	}
	m.awaitJournal("culvert-proxy", `msg="Agent leaves" agent=web-1.example.net`)
	m.run("systemctl", "start", "culvert-client")

	// The removal stops both, and leaves what was configured and stored.
	m.run(append([]string{"dpkg", "--no-triggers", "--remove"}, names...)...)
	for _, name := range names {
		if out, code := m.try("systemctl", "is-active", name); code == 0 {
			t.Errorf("%s still runs after its removal: %s", name, out)
		}
		config := "/etc/" + name + "/" + strings.TrimPrefix(name, "culvert-") + ".yml"
		if left := leftFiles(m.root, name, "deb"); !slices.Equal(left, []string{"/etc/" + name, config, "/etc/default/" + name}) {
			t.Errorf("after the removal there are %q", left)
		}
		if m.has("/etc/systemd/system/multi-user.target.wants/" + name + ".service") {
			t.Errorf("%s is still enabled", name)
		}
	}
	m.run(append([]string{"dpkg", "--no-triggers", "--purge"}, names...)...)
	for _, name := range names {
		if left := leftFiles(m.root, name, "deb"); len(left) > 0 {
			t.Errorf("after the purge there are %q", left)
		}
		if found := strings.TrimSpace(m.run("find", "/etc", "/usr", "/var", "-name", "*"+name+"*", "-not", "-path", "/var/lib/"+name+"/*", "-not", "-path", "/var/cache/*", "-not", "-path", "/var/log/*", "-newer", "/run/systemd/notify", "-print")); found != "/var/lib/"+name {
			t.Errorf("after the purge there is more than the data:\n%s", found)
		}
	}
	for _, path := range []string{"/var/lib/culvert-proxy/data", "/var/lib/culvert-client/agent.key"} {
		if !m.has(path) {
			t.Errorf("%s is gone", path)
		}
	}
}

// unknownBefore254 are the warnings of an older systemd about two names that it doesn't know.
var unknownBefore254 = regexp.MustCompile(`Unknown key '(RestartSteps|RestartMaxDelaySec)'`)

// TestRPM looks at the rpm packages, and installs and removes them where a systemd runs.
func TestRPM(t *testing.T) {
	externaltest.Program(t, "rpm", "rpm")
	m := startMachine(t)
	for _, name := range names {
		t.Run(name, func(t *testing.T) {
			m := *m
			m.t = t
			path := rpm(t, name)
			text, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("%s: %d bytes", filepath.Base(path), len(text))
			m.write("/run/package.rpm", string(text), 0o644)
			listed := strings.Fields(m.run("rpm", "-qlp", "/run/package.rpm"))
			slices.Sort(listed)
			var want []string
			for file := range filesOf(name, "rpm") {
				want = append(want, file)
			}
			slices.Sort(want)
			if !slices.Equal(listed, want) {
				t.Errorf("the package has %q, want %q", listed, want)
			}
			config := "/etc/" + name + "/" + strings.TrimPrefix(name, "culvert-") + ".yml"
			if got := strings.Fields(m.run("rpm", "-qcp", "/run/package.rpm")); !slices.Equal(got, []string{"/etc/default/" + name, config}) && !slices.Equal(got, []string{config, "/etc/default/" + name}) {
				t.Errorf("the configuration is %q", got)
			}

			// Debian has no rpm packages that could provide /bin/sh.
			m.run("rpm", "-i", "--nodeps", "--nosignature", "/run/package.rpm")
			checkFiles(t, m.root, name, "rpm")
			m.write("/etc/default/"+name, `ARGS="--log.level=debug"`+"\n", 0o644)
			if name == "culvert-client" {
				m.write("/etc/default/"+name, `ARGS="--proxy-url=http://127.0.0.1:8080"`+"\n", 0o644)
			}
			m.run("systemctl", "enable", "--now", name)
			before := m.property(name, "MainPID")
			m.run("rpm", "-U", "--nodeps", "--nosignature", "--replacepkgs", "/run/package.rpm")
			if after := m.property(name, "MainPID"); after == "0" || after == before {
				t.Errorf("an upgrade left the process %s, before there was %s", after, before)
			}
			if _, err := strconv.Atoi(before); err != nil {
				t.Error(err)
			}
			m.run("rpm", "-e", "--nodeps", name)
			if _, code := m.try("systemctl", "is-active", name); code == 0 {
				t.Error("the service still runs")
			}
			if left := leftFiles(m.root, name, "rpm"); len(left) > 0 {
				t.Errorf("after the removal there are %q", left)
			}
			for _, path := range []string{"/etc/default/" + name + ".rpmsave", "/var/lib/" + name} {
				if !m.has(path) {
					t.Errorf("%s is gone", path)
				}
			}
		})
	}
}
