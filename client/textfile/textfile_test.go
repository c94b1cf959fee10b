package textfile_test

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"github.com/culvert-io/culvert/client/textfile"
)

// directory is a directory of textfiles.
type directory struct {
	t    *testing.T
	path string
}

func newDirectory(t *testing.T, files ...string) directory {
	t.Helper()
	d := directory{t, t.TempDir()}
	for i := 0; i < len(files); i += 2 {
		d.write(files[i], files[i+1])
	}
	return d
}

// write replaces a file the way a job should: under another name, then renamed.
func (d directory) write(name, text string) {
	d.t.Helper()
	path := filepath.Join(d.path, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		d.t.Fatal(err)
	}
	if err := os.WriteFile(path+".new", []byte(text), 0o644); err != nil {
		d.t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		d.t.Fatal(err)
	}
}

// overwrite changes a file in place.
func (d directory) overwrite(name, text string) {
	d.t.Helper()
	if err := os.WriteFile(filepath.Join(d.path, name), []byte(text), 0o644); err != nil {
		d.t.Fatal(err)
	}
}

// age sets a file's modification time to so long ago.
func (d directory) age(name string, age time.Duration) {
	d.t.Helper()
	at := time.Now().Add(-age)
	if err := os.Chtimes(filepath.Join(d.path, name), at, at); err != nil {
		d.t.Fatal(err)
	}
}

// logs is a log in memory.
type logs struct {
	mu   sync.Mutex // protects text
	text bytes.Buffer
}

func (l *logs) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

// take returns the lines since the last call.
func (l *logs) take() (lines []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	lines = strings.Split(strings.TrimSuffix(l.text.String(), "\n"), "\n")
	l.text.Reset()
	if len(lines) == 1 && lines[0] == "" {
		return nil
	}
	return lines
}

func newCollector(t *testing.T, config textfile.Config) (*textfile.Collector, *logs) {
	t.Helper()
	l := new(logs)
	config.Logger = slog.New(slog.NewTextHandler(l, nil))
	c, err := textfile.New(config)
	if err != nil {
		t.Fatal(err)
	}
	return c, l
}

// exposition is a scrape, taken apart.
type exposition struct {
	text    string   // of the files' families, as text format 0.0.4
	failed  float64  // node_textfile_scrape_error
	mtimes  []string // files
	errors  []string // FILE REASON
	dropped []string // FILE REASON NUMBER
}

// collect scrapes. Paths lose the prefix strip and a slash.
func collect(t *testing.T, c *textfile.Collector, strip string, others ...*dto.MetricFamily) (e exposition) {
	t.Helper()
	snapshot, err := c.Collect(context.Background(), others)
	if err != nil {
		t.Fatal(err)
	}
	return take(t, slices.Values(snapshot.Gather()), strip)
}

func take(t *testing.T, families func(func(*dto.MetricFamily) bool), strip string) (e exposition) {
	t.Helper()
	e.failed = -1
	short := func(path string) string { return strings.TrimPrefix(path, strip+"/") }
	var out strings.Builder
	last := ""
	for f := range families {
		if f.GetName() <= last {
			t.Errorf("%s stands behind %s", f.GetName(), last)
		}
		last = f.GetName()
		for _, m := range f.Metric {
			var values []string
			for _, l := range m.Label {
				values = append(values, short(l.GetValue()))
			}
			switch f.GetName() {
			case "node_textfile_scrape_error":
				e.failed = m.GetGauge().GetValue()
			case "node_textfile_mtime_seconds":
				e.mtimes = append(e.mtimes, values[0])
			case "culvert_client_textfile_errors":
				e.errors = append(e.errors, strings.Join(values, " "))
			case "culvert_client_textfile_dropped_series":
				e.dropped = append(e.dropped, fmt.Sprintf("%s %v", strings.Join(values, " "), m.GetGauge().GetValue()))
			}
		}
		if strings.HasPrefix(f.GetName(), "node_textfile_") || strings.HasPrefix(f.GetName(), "node_scrape_collector_") || strings.HasPrefix(f.GetName(), "culvert_client_textfile_") {
			continue
		}
		if _, err := expfmt.MetricFamilyToText(&out, f); err != nil {
			t.Error(err)
		}
	}
	e.text = strings.ReplaceAll(out.String(), strip+"/", "")
	return e
}

// untyped returns the exposition of a family without HELP in the given files.
func untyped(name, files string, lines ...string) string {
	return "# HELP " + name + " Metric read from " + files + "\n# TYPE " + name + " untyped\n" + strings.Join(lines, "\n") + "\n"
}

// TestContract goes through the rules of node_exporter's textfile collector, by their
// numbers in the table of what has to be the same, and through what is better here.
func TestContract(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		rule  string
		files []string // NAME, CONTENT
		setup func(directory)
		dirs  []string // the directory itself by default
		want  string
		// What fails, as FILE REASON; of files that are read all the same, FILE is followed
		// by "!". The error gauge and the files with an mtime follow from it.
		errors  []string
		dropped []string
	}{
		{rule: "F2 globs in the order of the flags, sorted", files: []string{"b1/x.prom", "m 1\n", "b2/x.prom", "m 2\n", "a/x.prom", "m 3\n"},
			dirs: []string{"b*", "a"}, want: untyped("m", "b1/x.prom, b2/x.prom, a/x.prom", "m 1"),
			errors: []string{"a/x.prom! duplicate", "b2/x.prom! duplicate"}, dropped: []string{"a/x.prom duplicate 1", "b2/x.prom duplicate 1"}},
		{rule: "F2 a pattern that is none is a name", files: []string{"a[/x.prom", "m 1\n"}, dirs: []string{"a["}, want: untyped("m", "a[/x.prom", "m 1")},
		{rule: "F2 a pattern without a match is a name", dirs: []string{"no*"}, errors: []string{"no* io"}},
		{rule: "F3 hidden files, by name, no recursion", files: []string{"b.prom", "m 1\n", ".a.prom", "m 2\n", "sub/c.prom", "n 1\n"},
			want: untyped("m", ".a.prom, b.prom", "m 2"), errors: []string{"b.prom! duplicate"}, dropped: []string{"b.prom duplicate 1"}},
		{rule: "F4 links are followed", files: []string{"real", "m 1\n"},
			setup: func(d directory) { os.Symlink("real", filepath.Join(d.path, "l.prom")) }, want: untyped("m", "l.prom", "m 1")},
		{rule: "F5 directory, dangling link, device", files: []string{"ok.prom", "m 1\n"},
			setup: func(d directory) {
				os.Mkdir(filepath.Join(d.path, "d.prom"), 0o755)
				os.Symlink("nowhere", filepath.Join(d.path, "l.prom"))
				os.Symlink(os.DevNull, filepath.Join(d.path, "n.prom"))
			}, want: untyped("m", "ok.prom", "m 1"), errors: []string{"d.prom io", "l.prom io", "n.prom io"}},
		{rule: "F6 other names", files: []string{"x.txt", "m 1\n", "X.PROM", "m 1\n", "x.prom.123", "m 1\n", "xprom", "m 1\n"}},
		{rule: "F7 an empty name", dirs: []string{""}},
		{rule: "F8 missing directory, and a file", files: []string{"a/x.prom", "m 1\n"}, dirs: []string{"none", "a", "a/*.prom"},
			want: untyped("m", "a/x.prom", "m 1"), errors: []string{"a/x.prom! io", "none io"}},
		{rule: "F9 the same directory twice", files: []string{"a/x.prom", "m 1\n"}, dirs: []string{"a", "*", "a/"}, want: untyped("m", "a/x.prom", "m 1")},
		{rule: "F9 the same directory by another name", files: []string{"a/x.prom", "m 1\n"},
			setup: func(d directory) { os.Symlink("a", filepath.Join(d.path, "b")) }, dirs: []string{"*"},
			want: untyped("m", "a/x.prom, b/x.prom", "m 1"), errors: []string{"b/x.prom! duplicate"}, dropped: []string{"b/x.prom duplicate 1"}},
		{rule: "F10 an empty file", files: []string{"x.prom", "", "y.prom", "\n# a comment\n"}},

		{rule: "T1 no final line feed", files: []string{"bad.prom", "m 1", "ok.prom", "n 1\n"}, want: untyped("n", "ok.prom", "n 1"), errors: []string{"bad.prom parse"}},
		{rule: "T1 CRLF", files: []string{"bad.prom", "m 1\r\n"}, errors: []string{"bad.prom parse"}},
		{rule: "T1 second HELP", files: []string{"bad.prom", "# HELP m a\n# HELP m a\nm 1\n"}, errors: []string{"bad.prom parse"}},
		{rule: "T1 second TYPE", files: []string{"bad.prom", "# TYPE m gauge\n# TYPE m gauge\nm 1\n"}, errors: []string{"bad.prom parse"}},
		{rule: "T1 TYPE behind samples", files: []string{"bad.prom", "m 1\n# TYPE m gauge\n"}, errors: []string{"bad.prom parse"}},
		{rule: "T1 other type", files: []string{"bad.prom", "# TYPE m info\nm 1\n"}, errors: []string{"bad.prom parse"}},
		{rule: "T1 all or nothing", files: []string{"bad.prom", "n 1\nm x\n"}, errors: []string{"bad.prom parse"}},
		{rule: "T1 quoted names", files: []string{"a.prom", "{\"m\"} 1\n", "b.prom", "{\"m.a\",x=\"y\"} 1\n", "c.prom", "# HELP \"m\" x\nm 1\n", "d.prom", "m{\"a.b\"=\"c\"} 1\n"},
			errors: []string{"a.prom parse", "b.prom parse", "c.prom parse", "d.prom label"}},
		{rule: "T1 label value not UTF-8", files: []string{"bad.prom", "m{a=\"\xff\"} 1\n"}, errors: []string{"bad.prom parse"}},
		{rule: "A3 all types, any case, blanks", files: []string{"x.prom", "\n # TYPE c COUNTER\nc{ } 1\n#TYPE g gauge\n\tg\t2\n# TYPE u untyped\nu{a=\"b\",} NaN\n"},
			want: "# HELP c Metric read from x.prom\n# TYPE c counter\nc 1\n# HELP g Metric read from x.prom\n# TYPE g gauge\ng 2\n# HELP u Metric read from x.prom\n# TYPE u untyped\nu{a=\"b\"} NaN\n"},
		{rule: "T2 a timestamp", files: []string{"ts.prom", "a 1\nb 1 5\n"}, errors: []string{"ts.prom timestamp"}},
		{rule: "T4 A6 duplicate series in a file", files: []string{"x.prom", "m{a=\"1\"} 1\nn 1\nm{a=\"1\"} 2\n"},
			want: untyped("m", "x.prom", `m{a="1"} 1`) + untyped("n", "x.prom", "n 1"), errors: []string{"x.prom! duplicate"}, dropped: []string{"x.prom duplicate 1"}},
		{rule: "T5 W5 HELP that is not UTF-8", files: []string{"x.prom", "# HELP m \xff\nm 1\n"}, errors: []string{"x.prom parse"}},

		{rule: "S1 S2 S5 label sets in one file", files: []string{"x.prom", "m{a=\"1\"} 1\nm{b=\"2\"} 2\nm 3\n"},
			want: untyped("m", "x.prom", `m{a="",b=""} 3`, `m{a="",b="2"} 2`, `m{a="1",b=""} 1`)},
		{rule: "S3 label sets in two files", files: []string{"a.prom", "m{a=\"1\"} 1\n", "b.prom", "m{c=\"1\"} 2\n"},
			want: untyped("m", "a.prom, b.prom", `m{a="1"} 1`, `m{c="1"} 2`)},
		{rule: "S4 no label and an empty one", files: []string{"x.prom", "m{a=\"\"} 1\nm 2\n"},
			want: untyped("m", "x.prom", `m{a=""} 1`), errors: []string{"x.prom! duplicate"}, dropped: []string{"x.prom duplicate 1"}},
		{rule: "S4 in two files", files: []string{"a.prom", "m{a=\"\"} 1\n", "b.prom", "m 2\n"},
			want: untyped("m", "a.prom, b.prom", `m{a=""} 1`), errors: []string{"b.prom! duplicate"}, dropped: []string{"b.prom duplicate 1"}},
		{rule: "S5 across files", files: []string{"a.prom", "z 1\nm{a=\"2\"} 1\nm{a=\"4\"} 1\n", "b.prom", "m{a=\"3\"} 1\nm{a=\"1\"} 1\na 1\n", "c.prom", "m 1\n"},
			want: untyped("a", "b.prom", "a 1") + untyped("m", "a.prom, b.prom, c.prom", "m 1", `m{a="1"} 1`, `m{a="2"} 1`, `m{a="3"} 1`, `m{a="4"} 1`) + untyped("z", "a.prom", "z 1")},
		{rule: "S6 S7 histogram and summary", files: []string{"x.prom", "# HELP h x\n# TYPE h histogram\nh_bucket{le=\"1\"} 2\nh_count 3\n# HELP s x\n# TYPE s summary\ns{quantile=\"0.50\"} 4\ns_sum 5\n# HELP e x\n# TYPE e summary\ne{quantile=\"1\"} 1\n"},
			want: "# HELP e x\n# TYPE e summary\ne{quantile=\"1\"} 1\ne_sum 0\ne_count 0\n# HELP h x\n# TYPE h histogram\nh_bucket{le=\"1\"} 2\nh_bucket{le=\"+Inf\"} 3\nh_sum 0\nh_count 3\n# HELP s x\n# TYPE s summary\ns{quantile=\"0.5\"} 4\ns_sum 5\ns_count 0\n"},
		{rule: "W4 float histogram", files: []string{"x.prom", "# HELP h x\n# TYPE h histogram\nh_bucket{le=\"1\"} 2.5\nh_bucket{le=\"+Inf\"} 3\nh_sum 1\nh_count 3\n"},
			want: "# HELP h x\n# TYPE h histogram\nh_bucket{le=\"1\"} 2.5\nh_bucket{le=\"+Inf\"} 3\nh_sum 1\nh_count 3\n"},

		{rule: "A5 no HELP", files: []string{"a.prom", "m{f=\"a\"} 1\n", "b.prom", "m{f=\"b\"} 1\n"}, want: untyped("m", "a.prom, b.prom", `m{f="a"} 1`, `m{f="b"} 1`)},
		{rule: "A5 blank HELP", files: []string{"a.prom", "# HELP m   \nm{f=\"a\"} 1\n", "b.prom", "# HELP m\nm{f=\"b\"} 1\n"}, want: untyped("m", "a.prom, b.prom", `m{f="a"} 1`, `m{f="b"} 1`)},
		{rule: "A5 same HELP", files: []string{"a.prom", "# HELP m X\nm{f=\"a\"} 1\n", "b.prom", "# HELP m X\nm{f=\"b\"} 1\n"},
			want: "# HELP m X\n# TYPE m untyped\nm{f=\"a\"} 1\nm{f=\"b\"} 1\n"},
		{rule: "A5 different HELP", files: []string{"a.prom", "# HELP m X\nm{f=\"a\"} 1\n", "b.prom", "# HELP m Y\nm{f=\"b\"} 1\nn 1\n", "c.prom", "# HELP m X\nm{f=\"c\"} 1\n"},
			want:   "# HELP m X\n# TYPE m untyped\nm{f=\"a\"} 1\n" + untyped("n", "b.prom", "n 1"),
			errors: []string{"b.prom! conflict", "c.prom! conflict"}, dropped: []string{"b.prom conflict 1", "c.prom conflict 1"}},
		{rule: "W1 HELP, then none", files: []string{"a.prom", "# HELP m X\nm{f=\"a\"} 1\n", "b.prom", "m{f=\"b\"} 1\n"},
			want: "# HELP m X\n# TYPE m untyped\nm{f=\"a\"} 1\nm{f=\"b\"} 1\n"},
		{rule: "W1 none, then HELP", files: []string{"a.prom", "m{f=\"a\"} 1\n", "b.prom", "# HELP m X\nm{f=\"b\"} 1\n"},
			want: "# HELP m X\n# TYPE m untyped\nm{f=\"a\"} 1\nm{f=\"b\"} 1\n"},
		{rule: "W2 conflict, then none", files: []string{"a.prom", "# HELP m X\nm{f=\"a\"} 1\n", "b.prom", "# HELP m Y\nm{f=\"b\"} 1\n", "c.prom", "m{f=\"c\"} 1\n"},
			want:   "# HELP m X\n# TYPE m untyped\nm{f=\"a\"} 1\n",
			errors: []string{"b.prom! conflict", "c.prom! conflict"}, dropped: []string{"b.prom conflict 1", "c.prom conflict 1"}},
		{rule: "A5 W1 different TYPE", files: []string{"a.prom", "# TYPE m counter\nm{f=\"a\"} 1\n", "b.prom", "# TYPE m gauge\nm{f=\"b\"} 1\nm{f=\"c\"} 1\n"},
			want: "# HELP m Metric read from a.prom\n# TYPE m counter\nm{f=\"a\"} 1\n", errors: []string{"b.prom! conflict"}, dropped: []string{"b.prom conflict 2"}},
		{rule: "A6 between files", files: []string{"a.prom", "m{f=\"a\"} 1\n", "b.prom", "m{f=\"a\"} 2\nm{f=\"b\"} 2\n"},
			want: untyped("m", "a.prom, b.prom", `m{f="a"} 1`, `m{f="b"} 2`), errors: []string{"b.prom! duplicate"}, dropped: []string{"b.prom duplicate 1"}},
		{rule: "A6 samples of a histogram", files: []string{"a.prom", "# HELP h x\n# TYPE h histogram\nh_bucket{le=\"+Inf\"} 3\nh_sum 1\nh_count 3\n", "b.prom", "h_count 1\n", "c.prom", "s_sum 1\n", "d.prom", "# TYPE s summary\ns_sum 2\ns_count 2\n"},
			want:   "# HELP h x\n# TYPE h histogram\nh_bucket{le=\"+Inf\"} 3\nh_sum 1\nh_count 3\n" + untyped("s_sum", "c.prom", "s_sum 1"),
			errors: []string{"b.prom! conflict", "d.prom! conflict"}, dropped: []string{"b.prom conflict 1", "d.prom conflict 1"}},
		{rule: "A6 the collector's own names", files: []string{"a.prom", "node_textfile_scrape_error 7\n# TYPE node_textfile_mtime_seconds gauge\nnode_textfile_mtime_seconds{file=\"x\"} 1\n"},
			errors: []string{"a.prom! conflict"}, dropped: []string{"a.prom conflict 2"}},
		{rule: "W3 labels of two underscores", files: []string{"x.prom", "m{__a=\"1\"} 1\n", "y.prom", "m{__name__=\"1\"} 1\n"}, errors: []string{"x.prom label", "y.prom parse"}},
		{rule: "W3 gauge histogram", files: []string{"x.prom", "# TYPE m gaugehistogram\nm_bucket{le=\"+Inf\"} 1\n", "y.prom", "# TYPE m gauge_histogram\nm_bucket{le=\"+Inf\"} 1\n"}, errors: []string{"x.prom parse", "y.prom parse"}},
		{rule: "a family whose lines stand apart", files: []string{"x.prom", "m{d=\"1\"} 1\nn{d=\"1\"} 2\nm{d=\"2\"} 3\nn{d=\"2\"} 4\n"},
			want: untyped("m", "x.prom", `m{d="1"} 1`, `m{d="2"} 3`) + untyped("n", "x.prom", `n{d="1"} 2`, `n{d="2"} 4`)},
		{rule: "labels that would fill the memory", files: []string{"x.prom", manyNames(1500)}, errors: []string{"x.prom label"}},

		{rule: "OpenMetrics", files: []string{"x.om", "# HELP c Things.\n# TYPE c counter\nc_total 1\nc_created 5\n# TYPE i info\ni_info{v=\"1\"} 1\n# TYPE h gaugehistogram\nh_bucket{le=\"1.0\"} 1\nh_bucket{le=\"+Inf\"} 2\n# EOF\n", "y.prom", "# HELP c_total Things.\n# TYPE c_total counter\nc_total{a=\"1\"} 2\n"},
			want: "# HELP c_total Things.\n# TYPE c_total counter\nc_total 1\nc_total{a=\"1\"} 2\n# HELP h Metric read from x.om\n# TYPE h histogram\nh_bucket{le=\"1\"} 1\nh_bucket{le=\"+Inf\"} 2\nh_sum 0\nh_count 2\n# HELP i_info Metric read from x.om\n# TYPE i_info gauge\ni_info{v=\"1\"} 1\n"},
		{rule: "OpenMetrics without its end", files: []string{"x.om", "# TYPE c counter\nc_total 1\n", "y.om", ""}, errors: []string{"x.om parse", "y.om parse"}},
		{rule: "OpenMetrics with a timestamp", files: []string{"x.om", "# TYPE c counter\nc_total 1 5\n# EOF\n"}, errors: []string{"x.om timestamp"}},
		{rule: "OpenMetrics with UTF-8 names", files: []string{"x.om", "{\"a.b\"} 1\n# EOF\n"}, errors: []string{"x.om label"}},
		{rule: "OpenMetrics that is none", files: []string{"x.om", "# TYPE m gauge\nm{ 1\n# EOF\n", "y.om", "# EOF"}, errors: []string{"x.om parse"}},
		{rule: "a family too large to be sorted as a whole", files: []string{"a.prom", lines("m{f=\"a\",n=\"%d\"} 1\n", 3000), "b.prom", lines("m{f=\"b\",n=\"%d\"} 1\n", 3000)},
			want: untyped("m", "a.prom, b.prom", strings.TrimSuffix(sortedLines("m{f=\"a\",n=\"%d\"} 1\n", 3000)+sortedLines("m{f=\"b\",n=\"%d\"} 1\n", 3000), "\n"))},
	} {
		t.Run(test.rule, func(t *testing.T) {
			t.Parallel()
			d := newDirectory(t, test.files...)
			if test.setup != nil {
				test.setup(d)
			}
			dirs := []string{d.path}
			if test.dirs != nil {
				dirs = nil
				for _, name := range test.dirs {
					if name != "" {
						name = d.path + "/" + name
					}
					dirs = append(dirs, name)
				}
			}
			// Old files are kept as they are, parsed or as an index; young ones are read
			// each time.
			for _, aged := range []bool{false, true} {
				if aged {
					filepath.WalkDir(d.path, func(path string, e os.DirEntry, _ error) error {
						if e.Type().IsRegular() {
							at := time.Now().Add(-time.Minute)
							os.Chtimes(path, at, at)
						}
						return nil
					})
				}
				c, l := newCollector(t, textfile.Config{Directories: dirs})
				for range 3 {
					got := collect(t, c, d.path)
					if got.text != test.want {
						t.Errorf("got\n%s\nwant\n%s", got.text, test.want)
					}
					var errors []string
					for _, e := range test.errors {
						file, reason, _ := strings.Cut(e, " ")
						file, read := strings.CutSuffix(file, "!")
						errors = append(errors, file+" "+reason)
						if slices.Contains(got.mtimes, file) != read {
							t.Errorf("mtimes of %q: want that of %s: %v", got.mtimes, file, read)
						}
					}
					if !slices.Equal(got.errors, errors) || !slices.Equal(got.dropped, test.dropped) {
						t.Errorf("errors %q, dropped %q; want %q, %q", got.errors, got.dropped, errors, test.dropped)
					}
					if want := float64(min(1, len(errors))); got.failed != want {
						t.Errorf("node_textfile_scrape_error %v, want %v", got.failed, want)
					}
				}
				if n := len(l.take()); n != len(test.errors) {
					t.Errorf("%d lines in the log, want one a problem: %d", n, len(test.errors))
				}
			}
		})
	}
}

// lines returns n lines, numbered.
func lines(format string, n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, format, i)
	}
	return b.String()
}

// sortedLines returns them in the order of their text.
func sortedLines(format string, n int) string {
	return strings.Join(slices.Sorted(strings.Lines(lines(format, n))), "")
}

// manyNames returns n series with a label name of their own each.
func manyNames(n int) string { return lines("m{l%d=\"x\"} 1\n", n) }

// TestTestSet is the test set of the contract's section A9, with the results of
// node_exporter 1.12 where nothing is said of them.
func TestTestSet(t *testing.T) {
	t.Parallel()
	const good = "# HELP m X\n# TYPE m untyped\n"
	for _, test := range []struct {
		files  []string
		want   string
		failed float64
		mtimes string
	}{
		{[]string{"ok.prom", "m 1\n", "bad.prom", "n 1"}, untyped("m", "ok.prom", "m 1"), 1, "ok.prom"},
		{[]string{"ts.prom", "a 1\nb 1 5\n"}, "", 1, ""},
		{[]string{"note.txt", "m 1\n"}, "", 0, ""},
		{[]string{"a.prom", "m{l=\"a\"} 1\n", "b.prom", "m{l=\"b\"} 1\n"}, untyped("m", "a.prom, b.prom", `m{l="a"} 1`, `m{l="b"} 1`), 0, "a.prom b.prom"},
		{[]string{"a.prom", "# HELP m X\nm{l=\"a\"} 1\n", "b.prom", "# HELP m X\nm{l=\"b\"} 1\n"}, good + "m{l=\"a\"} 1\nm{l=\"b\"} 1\n", 0, "a.prom b.prom"},
		{[]string{"a.prom", "# HELP m X\nm{l=\"a\"} 1\n", "b.prom", "# HELP m Y\nm{l=\"b\"} 1\n"}, good + "m{l=\"a\"} 1\n", 1, "a.prom b.prom"},
		{[]string{"a.prom", "# HELP m X\nm{l=\"a\"} 1\n", "b.prom", "# HELP m Y\nm{l=\"b\"} 1\n", "c.prom", "# HELP m X\nm{l=\"c\"} 1\n"}, good + "m{l=\"a\"} 1\n", 1, "a.prom b.prom c.prom"},
		// Better: only a, and 0.
		{[]string{"a.prom", "# HELP m X\nm{l=\"a\"} 1\n", "b.prom", "m{l=\"b\"} 1\n"}, good + "m{l=\"a\"} 1\nm{l=\"b\"} 1\n", 0, "a.prom b.prom"},
		{[]string{"a.prom", "m{l=\"a\"} 1\n", "b.prom", "# HELP m X\nm{l=\"b\"} 1\n"}, good + "m{l=\"a\"} 1\nm{l=\"b\"} 1\n", 0, "a.prom b.prom"},
		// Better: the gauge is 0 there for both.
		{[]string{"a.prom", "# TYPE m counter\nm{l=\"a\"} 1\n", "b.prom", "# TYPE m gauge\nm{l=\"b\"} 1\n"}, "# HELP m Metric read from a.prom\n# TYPE m counter\nm{l=\"a\"} 1\n", 1, "a.prom b.prom"},
		{[]string{"a.prom", "m{a=\"1\"} 1\nm{a=\"1\"} 2\n"}, untyped("m", "a.prom", `m{a="1"} 1`), 1, "a.prom"},
		{[]string{"good/a.prom", "m 1\n"}, untyped("m", "good/a.prom", "m 1"), 1, "good/a.prom"},
	} {
		d := newDirectory(t, test.files...)
		config := textfile.Config{Directories: []string{d.path}}
		if strings.HasPrefix(test.files[0], "good/") {
			config.Directories = []string{d.path + "/missing", d.path + "/good"}
		}
		c, _ := newCollector(t, config)
		if got := collect(t, c, d.path); got.text != test.want || got.failed != test.failed || strings.Join(got.mtimes, " ") != test.mtimes {
			t.Errorf("%q: got %v, %q,\n%s\nwant %v, %q,\n%s", test.files, got.failed, got.mtimes, got.text, test.failed, test.mtimes, test.want)
		}
	}
}

// TestOwnSeries: what the collector tells of itself.
func TestOwnSeries(t *testing.T) {
	d := newDirectory(t, "a.prom", "m 1\n", "sub/b", "n 1\n", "bad.prom", "x")
	t.Chdir(d.path)
	at := time.Unix(1_700_000_000, 250_000_000)
	if err := os.Chtimes(filepath.Join(d.path, "sub/b"), at, at); err != nil {
		t.Fatal(err)
	}
	os.Symlink("sub/b", filepath.Join(d.path, "b.prom")) // has the time of what it points to
	c, _ := newCollector(t, textfile.Config{Directories: []string{"./"}})
	families, err := c.Gather()
	if err != nil {
		t.Fatal(err)
	}
	values := map[string]float64{}
	for _, f := range families {
		for _, m := range f.Metric {
			key := f.GetName()
			for _, l := range m.Label {
				key += " " + l.GetName() + "=" + l.GetValue()
			}
			values[key] = m.GetGauge().GetValue() + m.GetUntyped().GetValue()
		}
	}
	for key, want := range map[string]float64{
		"node_textfile_mtime_seconds file=b.prom":                   1_700_000_000.25,
		"node_textfile_scrape_error":                                1,
		"node_scrape_collector_success collector=textfile":          1,
		"culvert_client_textfile_errors file=bad.prom reason=parse": 1,
		"m": 1, "n": 1,
	} {
		if got, ok := values[key]; !ok || got != want {
			t.Errorf("%s is %v, %v; want %v in %v", key, got, ok, want, values)
		}
	}
	if took, ok := values["node_scrape_collector_duration_seconds collector=textfile"]; !ok || took < 0 {
		t.Errorf("duration %v, %v", took, ok)
	}
	problems, err := promlint.NewWithMetricFamilies(families).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		if p.Metric != "m" && p.Metric != "n" {
			t.Errorf("%s: %s", p.Metric, p.Text)
		}
	}
}

// TestMaxAge: an old file loses its series, but not the time that tells its age.
func TestMaxAge(t *testing.T) {
	t.Parallel()
	d := newDirectory(t, "old.prom", "m 1\n", "new.prom", "n 1\n", "future.prom", "f 1\n")
	now := time.Now()
	c, l := newCollector(t, textfile.Config{Directories: []string{d.path}, MaxAge: time.Hour, Now: func() time.Time { return now }})
	d.age("old.prom", 2*time.Hour)
	d.age("future.prom", -2*time.Hour)
	got := collect(t, c, d.path)
	if got.text != untyped("f", "future.prom", "f 1")+untyped("n", "new.prom", "n 1") || !slices.Equal(got.errors, []string{"old.prom too_old"}) || len(got.mtimes) != 3 || got.failed != 1 {
		t.Errorf("got %+v", got)
	}
	if lines := l.take(); len(lines) != 1 || !strings.Contains(lines[0], "--textfile.max-age") {
		t.Errorf("log %q", lines)
	}
	now = now.Add(90 * time.Minute)
	if got := collect(t, c, d.path); got.text != untyped("f", "future.prom", "f 1") || len(got.errors) != 2 {
		t.Errorf("90 minutes later: %+v", got)
	}
	d.write("old.prom", "m 2\n")
	now = time.Now()
	if got := collect(t, c, d.path); !strings.Contains(got.text, "m 2\n") || got.failed != 0 {
		t.Errorf("written anew: %+v", got)
	}
}

// TestMaxFileSize, also of files whose size is not what they say.
func TestMaxFileSize(t *testing.T) {
	t.Parallel()
	d := newDirectory(t, "big.prom", "m 1\nm 234567\n", "fits.prom", "n 1\n# 34567\n")
	c, l := newCollector(t, textfile.Config{Directories: []string{d.path}, MaxFileSize: 12})
	os.Symlink("/proc/version", filepath.Join(d.path, "proc.prom"))
	for range 2 {
		got := collect(t, c, d.path)
		if got.text != untyped("n", "fits.prom", "n 1") || !slices.Equal(got.errors, []string{"big.prom too_large", "proc.prom too_large"}) {
			t.Errorf("got %+v", got)
		}
	}
	if lines := l.take(); len(lines) != 2 || !strings.Contains(lines[0], "12 bytes (--textfile.max-file-size)") {
		t.Errorf("log %q", lines)
	}
}

// TestChanges: each change is seen at the next scrape, and logged once.
func TestChanges(t *testing.T) {
	t.Parallel()
	d := newDirectory(t, "a.prom", "m 1\n")
	c, l := newCollector(t, textfile.Config{Directories: []string{d.path}})
	expect := func(what, text, errors string, logged ...string) {
		t.Helper()
		for i := range 2 {
			if got := collect(t, c, d.path); got.text != text || strings.Join(got.errors, ", ") != errors {
				t.Errorf("%s: %+v, want %q, %q", what, got, text, errors)
			}
			lines := l.take()
			if i > 0 {
				logged = nil
			}
			if len(lines) != len(logged) {
				t.Errorf("%s: log %q, want %q", what, lines, logged)
				continue
			}
			for i, word := range logged {
				if !strings.Contains(lines[i], word) {
					t.Errorf("%s: log %q, want %q", what, lines, logged)
				}
			}
		}
	}
	expect("first", untyped("m", "a.prom", "m 1"), "")
	d.overwrite("a.prom", "m 2\n") // of the same size, in the same file, at once
	expect("in place", untyped("m", "a.prom", "m 2"), "")
	d.age("a.prom", time.Hour)
	expect("old", untyped("m", "a.prom", "m 2"), "")
	d.write("a.prom", "m 3\n")
	d.age("a.prom", time.Hour) // the time is the same but for its fraction, the inode is not
	expect("replaced", untyped("m", "a.prom", "m 3"), "")
	d.overwrite("a.prom", "m 3\nm2 ")
	expect("half", "", "a.prom parse", "line 2")
	d.overwrite("a.prom", "m 3\nm2 4 5\n")
	expect("other error", "", "a.prom timestamp", "timestamps are not allowed", "there again, or gone")
	d.overwrite("a.prom", "m 3\nm2 4\n")
	expect("whole", untyped("m", "a.prom", "m 3")+untyped("m2", "a.prom", "m2 4"), "", "there again, or gone")
	os.Remove(filepath.Join(d.path, "a.prom"))
	expect("gone", "", "")
}

// TestOthers: families of other sources come first, and lose nothing to files.
func TestOthers(t *testing.T) {
	t.Parallel()
	gauge := func(name, help string, series ...string) *dto.MetricFamily {
		text := "# TYPE " + name + " gauge\n" + strings.Join(series, "\n") + "\n"
		if help != "" {
			text = "# HELP " + name + " " + help + "\n" + text
		}
		parser := expfmt.NewTextParser(model.UTF8Validation)
		families, err := parser.TextToMetricFamilies(strings.NewReader(text))
		if err != nil {
			t.Fatal(err)
		}
		return families[name]
	}
	d := newDirectory(t, "a.prom", "# HELP g file\n# TYPE g gauge\ng{f=\"a\"} 1\ng{f=\"o\"} 1\nk 1\n# HELP n file\n# TYPE n gauge\nn{f=\"a\"} 1\n")
	c, _ := newCollector(t, textfile.Config{Directories: []string{d.path}})
	others := []*dto.MetricFamily{
		gauge("g", "other", `g{f="o"} 2`), gauge("k", "other", `k{f="o"} 2`), gauge("n", "", `n{f="z"} 2`, "n 1"),
		gauge("node_textfile_scrape_error", "other", "node_textfile_scrape_error 2"),
	}
	snapshot, err := c.Collect(context.Background(), others)
	if err != nil {
		t.Fatal(err)
	}
	got := take(t, snapshot.Families(), d.path)
	want := "# HELP g other\n# TYPE g gauge\ng{f=\"a\"} 1\ng{f=\"o\"} 2\n# HELP k other\n# TYPE k gauge\nk{f=\"o\"} 2\n# HELP n file\n# TYPE n gauge\nn 1\nn{f=\"a\"} 1\nn{f=\"z\"} 2\n"
	if got.text != want || !slices.Equal(got.dropped, []string{"a.prom conflict 1", "a.prom duplicate 1"}) || got.failed != 1 || snapshot.Dropped != 1 {
		t.Errorf("got %+v, %d dropped; want\n%s", got, snapshot.Dropped, want)
	}
	if len(others[2].Metric) != 2 || others[2].GetHelp() != "" {
		t.Errorf("a source was changed: %v", others[2])
	}

	merged, dropped := textfile.Merge(
		[]*dto.MetricFamily{gauge("b", "", "b 1"), gauge("s", "", "s 1")},
		nil,
		[]*dto.MetricFamily{gauge("b", "second", "b 2", `b{x="1"} 3`), gauge("a", "", "a 1")},
		[]*dto.MetricFamily{{Name: gauge("s", "", "s 1").Name, Type: dto.MetricType_COUNTER.Enum(), Metric: gauge("s", "", "s 1").Metric}})
	var text strings.Builder
	for _, f := range merged {
		expfmt.MetricFamilyToText(&text, f)
	}
	if want := "# TYPE a gauge\na 1\n# HELP b second\n# TYPE b gauge\nb 1\nb{x=\"1\"} 3\n# TYPE s gauge\ns 1\n"; text.String() != want || dropped != 2 {
		t.Errorf("merged, %d dropped:\n%s\nwant\n%s", dropped, &text, want)
	}
}

func TestConfigErrors(t *testing.T) {
	t.Parallel()
	for _, c := range []textfile.Config{{MaxAge: -1}, {MaxFileSize: -1}, {MaxFileSize: 1 << 40}} {
		if _, err := textfile.New(c); err == nil {
			t.Errorf("%+v was accepted", c)
		}
	}
}

// TestGivesUp: a scrape whose time is over waits for nobody.
func TestGivesUp(t *testing.T) {
	t.Parallel()
	d := newDirectory(t, "a.prom", "m 1\n")
	c, _ := newCollector(t, textfile.Config{Directories: []string{d.path}})
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := c.Collect(ctx, nil); err == nil {
		t.Error("no error")
	}
	if got := collect(t, c, d.path); got.text == "" {
		t.Error("the next one has nothing")
	}
}
