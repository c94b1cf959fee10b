package textfile_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"github.com/culvert-io/culvert/client/textfile"
	"github.com/culvert-io/culvert/protocol/externaltest"
)

// nobody is a user that may read what everybody may.
const nobody = 65534

// asNobody calls f without the rights of root, whose file permissions count for nothing.
func asNobody(t *testing.T, f func()) {
	t.Helper()
	if os.Getuid() != 0 {
		f()
		return
	}
	// The user for files is one of the thread, and takes the capabilities along.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := syscall.Setfsuid(nobody); err != nil {
		t.Fatal(err)
	}
	defer syscall.Setfsuid(0)
	f()
}

// readableDirectory is a directory that nobody may read too.
func readableDirectory(t *testing.T) directory {
	t.Helper()
	dir, err := os.MkdirTemp("", "textfiles-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return directory{t, dir}
}

// TestPermission: a file that may not be read is told as such, with what to do.
func TestPermission(t *testing.T) {
	t.Parallel()
	d := readableDirectory(t)
	d.write("ok/a.prom", "m 1\n")
	d.write("ok/b.prom", "n 1\n")
	d.write("closed/c.prom", "o 1\n")
	c, l := newCollector(t, textfile.Config{Directories: []string{d.path + "/*"}})
	expect := func(text, errors string) {
		t.Helper()
		asNobody(t, func() {
			if got := collect(t, c, d.path); got.text != text || strings.Join(got.errors, ", ") != errors {
				t.Errorf("got %+v, want %q, %q", got, text, errors)
			}
		})
	}
	os.Chmod(filepath.Join(d.path, "ok/b.prom"), 0)
	os.Chmod(filepath.Join(d.path, "closed"), 0)
	defer os.Chmod(filepath.Join(d.path, "closed"), 0o755)
	for range 2 {
		expect(untyped("m", "ok/a.prom", "m 1"), "closed permission, ok/b.prom permission")
	}
	logged := l.take()
	if len(logged) != 2 || !strings.Contains(logged[0], "chmod o+rx "+d.path+"/closed") || !strings.Contains(logged[1], "permission denied; let the agent's user read it, as with chmod o+r "+d.path+"/ok/b.prom") {
		t.Errorf("log %q", logged)
	}
	os.Chmod(filepath.Join(d.path, "ok/b.prom"), 0o644)
	expect(untyped("m", "ok/a.prom", "m 1")+untyped("n", "ok/b.prom", "n 1"), "closed permission")
	// What may be read no more is not served from memory.
	d.age("ok/b.prom", time.Hour)
	expect(untyped("m", "ok/a.prom", "m 1")+untyped("n", "ok/b.prom", "n 1"), "closed permission")
	os.Chmod(filepath.Join(d.path, "ok/b.prom"), 0)
	expect(untyped("m", "ok/a.prom", "m 1"), "closed permission, ok/b.prom permission")
}

// TestFIFO: nobody waits for who might write into one.
func TestFIFO(t *testing.T) {
	t.Parallel()
	d := newDirectory(t, "a.prom", "m 1\n")
	if err := syscall.Mkfifo(filepath.Join(d.path, "b.prom"), 0o644); err != nil {
		t.Fatal(err)
	}
	c, _ := newCollector(t, textfile.Config{Directories: []string{d.path}})
	if got := collect(t, c, d.path); got.text != untyped("m", "a.prom", "m 1") || !slices.Equal(got.errors, []string{"b.prom io"}) {
		t.Errorf("got %+v", got)
	}
}

// startNodeExporter starts a node exporter with the textfile collector alone, as nobody,
// and returns the URL of its metrics.
func startNodeExporter(t *testing.T, directories string) string {
	t.Helper()
	program := externaltest.Program(t, "prometheus-node-exporter", "prometheus-node-exporter")
	cmd := exec.Command(program, "--web.listen-address=127.0.0.1:0", "--web.disable-exporter-metrics",
		"--collector.disable-defaults", "--collector.textfile", "--collector.textfile.directory="+directories)
	if os.Getuid() == 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	}
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	address := make(chan string, 1)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		listening := regexp.MustCompile(`msg="Listening on" address=(\S+)`)
		for s := bufio.NewScanner(stderr); s.Scan(); {
			if found := listening.FindStringSubmatch(s.Text()); found != nil {
				address <- found[1]
			}
		}
	}()
	t.Cleanup(func() {
		cmd.Process.Kill()
		<-ended
		cmd.Wait()
	})
	select {
	case a := <-address:
		return "http://" + a + "/metrics"
	case <-ended:
	case <-time.After(20 * time.Second):
	}
	t.Fatal("the node exporter does not listen")
	return ""
}

// shown returns what families show, without what can't be the same: what is not about
// textfiles, HELP and TYPE of the collector's own families, and fractions of modification
// times.
func shown(t *testing.T, families []*dto.MetricFamily) (shown []string) {
	t.Helper()
	for _, f := range families {
		name := f.GetName()
		own := strings.HasPrefix(name, "node_textfile_")
		if strings.HasPrefix(name, "culvert_client_textfile_") || strings.HasPrefix(name, "node_scrape_collector_duration") || strings.HasPrefix(name, "promhttp_") || name == "node_exporter_build_info" {
			continue
		}
		if name == "node_textfile_mtime_seconds" {
			for _, m := range f.Metric {
				*m.Gauge.Value = float64(int64(m.Gauge.GetValue()))
			}
		}
		var text strings.Builder
		if _, err := expfmt.MetricFamilyToText(&text, f); err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(text.String()) {
			if !(own || name == "node_scrape_collector_success") || line[0] != '#' {
				shown = append(shown, strings.TrimSuffix(line, "\n"))
			}
		}
	}
	slices.Sort(shown)
	return shown
}

// TestNodeExporter compares with a real node exporter on the same directories. Debian's
// is release 1.5.
func TestNodeExporter(t *testing.T) {
	t.Parallel()
	root := readableDirectory(t)
	url := startNodeExporter(t, root.path+"/now*")
	c, _ := newCollector(t, textfile.Config{Directories: []string{root.path + "/now*"}})
	const error0, error1 = "node_textfile_scrape_error 0", "node_textfile_scrape_error 1"
	const (
		oldHelp   = "release 1.5 does not tell that HELP texts differ, and keeps a third file"
		lost      = "what is lost is told"
		borrowed  = "HELP is borrowed"
		perServer = "Prometheus takes a label without a value for none"
	)
	at := time.Unix(1_700_000_000, 250_000_000)
	file := func(name string) string { return root.path + "/now/" + name }
	mtime := func(name string) string {
		return fmt.Sprintf("node_textfile_mtime_seconds{file=%q} 1.7e+09", file(name))
	}
	for _, test := range []struct {
		name  string
		files []string // NAME, CONTENT, in the directory now; NAME is DIRECTORY/NAME elsewhere
		setup func(directory)
		// What is different, and why.
		why          string
		ours, theirs []string
	}{
		{name: "nothing"},
		{name: "empty", files: []string{"a.prom", "", "b.prom", "# comment\n\n"}},
		{name: "plain", files: []string{"b.prom", "m 1\n", "a.prom", "# HELP n x\\\\y\\nz\n# TYPE n gauge\nn{l=\"\\\"\\\\\\n\"} NaN\nn{l=\"b\"} -Inf\nn{l=\"c\"} 1e300\n"}},
		{name: "other names", files: []string{"a.txt", "m 1\n", "A.PROM", "m 1\n", "a.prom.1", "m 1\n", ".a.prom", "h 1\n", "sub/a.prom", "s 1\n"}},
		{name: "two directories", files: []string{"a.prom", "m{d=\"1\"} 1\n", "../now2/a.prom", "m{d=\"2\"} 1\n", "../other/a.prom", "m{d=\"3\"} 1\n"}},
		{name: "a file for a directory", files: []string{"a.prom", "m 1\n", "../now.file", "x"}},
		{name: "links", files: []string{"real", "m 1\n", "../elsewhere/b.prom", "n 1\n"}, setup: func(d directory) {
			os.Symlink("real", filepath.Join(d.path, "now/l.prom"))
			os.Symlink("elsewhere", filepath.Join(d.path, "now-link"))
		}},
		{name: "dangling link", files: []string{"a.prom", "m 1\n"}, setup: func(d directory) { os.Symlink("none", filepath.Join(d.path, "now/l.prom")) }},
		{name: "directory", files: []string{"a.prom", "m 1\n"}, setup: func(d directory) {
			os.Mkdir(filepath.Join(d.path, "now/d.prom"), 0o755)
			os.Chtimes(filepath.Join(d.path, "now/d.prom"), at, at)
		}, why: "release 1.5 takes a directory for an empty file", ours: []string{error1}, theirs: []string{error0, mtime("d.prom")}},
		{name: "unreadable file", files: []string{"a.prom", "m 1\n", "b.prom", "n 1\n"}, setup: func(d directory) { os.Chmod(filepath.Join(d.path, "now/b.prom"), 0) }},
		{name: "unreadable directory", files: []string{"a.prom", "m 1\n", "../now2/b.prom", "n 1\n"}, setup: func(d directory) { os.Chmod(filepath.Join(d.path, "now2"), 0) }},
		{name: "no final line feed", files: []string{"a.prom", "m 1\n", "b.prom", "n 1"}},
		{name: "CRLF", files: []string{"a.prom", "m 1\r\n"}},
		{name: "bad in the middle", files: []string{"a.prom", "m 1\nn x\no 1\n", "b.prom", "p 1\n"}},
		{name: "bad values", files: []string{"a.prom", "m 0x1p-2\n", "b.prom", "m 1_000\n", "c.prom", "m 1e400\n", "d.prom", "m\n", "e.prom", "m 1 \n"}},
		{name: "bad labels", files: []string{"a.prom", "m{a=\"1\",a=\"2\"} 1\n", "b.prom", "m{a=1} 1\n", "c.prom", "m{__name__=\"n\"} 1\n", "d.prom", "m{1a=\"\"} 1\n", "e.prom", "m{a=\"\xff\"} 1\n", "f.prom", "m{a=\"\\x\"} 1\n"}},
		{name: "bad metadata", files: []string{"a.prom", "# TYPE m info\nm 1\n", "b.prom", "m 1\n# TYPE m gauge\n", "c.prom", "# HELP m a\n# HELP m b\nm 1\n", "d.prom", "# TYPE m gauge\n# TYPE m gauge\nm 1\n", "e.prom", "\xef\xbb\xbfm 1\n"}},
		{name: "quoted names", files: []string{"a.prom", "{\"m.a\"} 1\n", "b.prom", "m{\"a.b\"=\"c\"} 1\n", "c.prom", "{\"m\"} 1\n"}},
		{name: "odd but good", files: []string{"a.prom", " \tm\t{ a = \"1\" , }\t1\n#HELP m x\n# TYPE n\n# HELP n\nn{} +Inf\n# EOF\n"}},
		{name: "timestamp", files: []string{"a.prom", "m 1\nn 1 5\n", "b.prom", "o 1\n"}},
		{name: "label sets", files: []string{"a.prom", "m{a=\"1\"} 1\nm{b=\"2\"} 2\nm 3\nn{x=\"\"} 1\n", "b.prom", "m{c=\"1\"} 1\n"}},
		{name: "apart", files: []string{"a.prom", "m{a=\"1\"} 1\nn{a=\"1\"} 2\nm{a=\"2\"} 3\nn{a=\"2\"} 4\n"}},
		{name: "types", files: []string{"a.prom", "# HELP h x\n# TYPE h histogram\nh_bucket{le=\"1\",a=\"b\"} 2\nh_bucket{le=\"+Inf\",a=\"b\"} 3\nh_sum{a=\"b\"} 1\nh_count{a=\"b\"} 3\n# TYPE s summary\ns{quantile=\"0.50\"} 4\ns{quantile=\"0.9\"} 5\ns_sum 5\ns_count 2\n# TYPE c COUNTER\nc 1\n# TYPE u untyped\nu 1\n"}},
		{name: "incomplete", files: []string{"a.prom", "# TYPE h histogram\nh_bucket{le=\"1\"} 2\nh_count 3\n# TYPE s summary\ns_sum 5\n# TYPE e summary\ne{quantile=\"1\"} 1\n"}},
		{name: "no HELP", files: []string{"a.prom", "m{f=\"a\"} 1\n", "b.prom", "m{f=\"b\"} 1\n", "c.prom", "# HELP m  \nm{f=\"c\"} 1\n"}},
		{name: "same HELP", files: []string{"a.prom", "# HELP m X\nm{f=\"a\"} 1\n", "b.prom", "# HELP m X\nm{f=\"b\"} 1\n"}},

		{name: "different HELP", files: []string{"a.prom", "# HELP m X\nm{f=\"a\"} 1\n", "b.prom", "# HELP m Y\nm{f=\"b\"} 1\nn 1\n", "c.prom", "# HELP m X\nm{f=\"c\"} 1\n"},
			why: oldHelp, ours: []string{error1}, theirs: []string{`m{f="c"} 1`, error0}},
		{name: "HELP and none", files: []string{"a.prom", "# HELP m X\nm{f=\"a\"} 1\n", "b.prom", "m{f=\"b\"} 1\n"}, why: borrowed, ours: []string{`m{f="b"} 1`}},
		{name: "none and HELP", files: []string{"a.prom", "m{f=\"a\"} 1\n", "b.prom", "# HELP m X\nm{f=\"b\"} 1\n"}, why: borrowed,
			ours: []string{"# HELP m X", `m{f="b"} 1`}, theirs: []string{"# HELP m Metric read from " + file("a.prom") + ", " + file("b.prom")}},
		{name: "different TYPE", files: []string{"a.prom", "# HELP m X\n# TYPE m counter\nm{f=\"a\"} 1\n", "b.prom", "# HELP m X\n# TYPE m gauge\nm{f=\"b\"} 1\n"}, why: lost, ours: []string{error1}, theirs: []string{error0}},
		{name: "duplicates", files: []string{"a.prom", "m{a=\"1\"} 1\nm{a=\"1\"} 2\nn 1\n", "b.prom", "n 2\n"}, why: lost, ours: []string{error1}, theirs: []string{error0}},
		{name: "samples of a summary", files: []string{"a.prom", "# HELP s X\n# TYPE s summary\ns_sum 1\ns_count 1\n", "b.prom", "s_count 2\n"}, why: lost, ours: []string{error1}, theirs: []string{error0}},
		{name: "label without a value", files: []string{"a.prom", "m{a=\"\"} 1\n", "b.prom", "m 2\n"}, why: perServer, ours: []string{error1}, theirs: []string{error0, "m 2"}},
		{name: "HELP that is not UTF-8", files: []string{"a.prom", "# HELP m \xff\nm 1\n"}, why: "it would cost Prometheus the whole scrape",
			ours: []string{error1}, theirs: []string{"# HELP m \xff", "# TYPE m untyped", "m 1", mtime("a.prom"), error0}},
		{name: "float histogram", files: []string{"a.prom", "# HELP h X\n# TYPE h histogram\nh_bucket{le=\"1\"} 2.5\nh_bucket{le=\"+Inf\"} 3\nh_sum 1\nh_count 3\n"}, why: "the counts are kept; release 1.5 cuts them",
			ours: []string{`h_bucket{le="1"} 2.5`}, theirs: []string{`h_bucket{le="1"} 2`}},
		{name: "OpenMetrics", files: []string{"a.om", "# HELP m X\n# TYPE m gauge\nm 1\n# EOF\n"}, why: "only ours reads it",
			ours: []string{"# HELP m X", "# TYPE m gauge", "m 1", mtime("a.om")}},
		{name: "the own names", files: []string{"a.prom", "node_textfile_scrape_error{x=\"y\"} 1\n# TYPE node_textfile_mtime_seconds gauge\nnode_textfile_mtime_seconds{file=\"x\"} 1\n"}, why: "nobody else speaks for the collector",
			ours: []string{mtime("a.prom"), error1}, theirs: []string{`node_textfile_mtime_seconds{file="x"} 1`, `node_textfile_scrape_error{x="y"} 1`}},
	} {
		entries, err := os.ReadDir(root.path)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			os.RemoveAll(filepath.Join(root.path, e.Name()))
		}
		os.Mkdir(filepath.Join(root.path, "now"), 0o755)
		for i := 0; i < len(test.files); i += 2 {
			root.write("now/"+test.files[i], test.files[i+1])
			os.Chtimes(filepath.Join(root.path, "now", test.files[i]), at, at)
		}
		if test.setup != nil {
			test.setup(root)
		}
		var mine []string
		asNobody(t, func() {
			s, err := c.Collect(context.Background(), nil)
			if err != nil {
				t.Fatal(err)
			}
			mine = shown(t, s.Gather())
		})
		theirs := shown(t, fetch(t, url))
		onlyMine, onlyTheirs := without(mine, theirs), without(theirs, mine)
		slices.Sort(test.ours)
		slices.Sort(test.theirs)
		if !slices.Equal(onlyMine, test.ours) || !slices.Equal(onlyTheirs, test.theirs) {
			t.Errorf("%s (%s):\nonly ours\n%q\nwant\n%q\nonly the node exporter's\n%q\nwant\n%q", test.name, test.why, onlyMine, test.ours, onlyTheirs, test.theirs)
		}
		os.Chmod(filepath.Join(root.path, "now2"), 0o755)
	}
}

// without returns what is in a and not in b.
func without(a, b []string) (rest []string) {
	for _, line := range a {
		if !slices.Contains(b, line) {
			rest = append(rest, line)
		}
	}
	return rest
}

// fetch scrapes the node exporter.
func fetch(t *testing.T, url string) (families []*dto.MetricFamily) {
	t.Helper()
	client := &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := client.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("%s: %v\n%s", resp.Status, err, body)
	}
	parser := expfmt.NewTextParser(model.UTF8Validation)
	byName, err := parser.TextToMetricFamilies(strings.NewReader(string(body)))
	if err != nil {
		t.Fatalf("%v in\n%s", err, body)
	}
	for _, f := range byName {
		families = append(families, f)
	}
	return families
}
