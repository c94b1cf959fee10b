package textfile

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/textparse"
	"google.golang.org/protobuf/proto"
)

// FuzzFile writes files, reads them, and checks that what is stored of each family is what
// was read, and that Prometheus takes what is served.
func FuzzFile(f *testing.F) {
	for _, text := range []string{
		"", "m 1\n", "m 1", "m{a=\"1\"} 1\nm{b=\"2\"} 2\nm 3\nm{a=\"\"} 1\n",
		"# HELP m x\n# TYPE m counter\nm 1\n\n# a comment\nn 2\nm{a=\"b\"} 3\n#HELP n y\n",
		"# TYPE h histogram\nh_bucket{le=\"1\"} 2.5\nh_count 3\nh_sum 1\nh_bucket{le=\"1\",x=\"y\"} 2\n",
		"s_count 1\n# TYPE s summary\ns{quantile=\"0.5\"} 1\ns_sum 1\ns_count 2\ns_bucket 4\n",
		"# HELP s_count \n# TYPE s summary\ns_count 5\ns 1\n", "# HELP s_count\n# TYPE s summary\ns_count 5\n",
		"# TYPE s summary\n# HELP s_count text\ns_sum 4\n# TYPE s_count gauge\n", "# TYPE m gaugehistogram\nm_bucket{le=\"+Inf\"} 1\n",
		"m 1 5\n", "{\"m\"} 1\n", "m{__a=\"b\"} 1\n", "\tm\t{ a = \"\\n\" , } NaN\n", "# TYPE m gauge \nm 1\n",
		"# HELP c Things.\n# TYPE c counter\nc_total 1 # {a=\"b\"} 1\nc_created 5\n# EOF\n",
		"# TYPE i info\ni_info{v=\"1\"} 1\n# TYPE i_x stateset\ni_x{i_x=\"a\"} 1\n# EOF",
		"# TYPE h gaugehistogram\nh_bucket{le=\"1.0\"} 1\nh_bucket{le=\"+Inf\"} 2\nh_gsum 1\nh_gcount 2\n# UNIT b_seconds seconds\nb_seconds 1\n# EOF\n",
	} {
		f.Add([]byte(text), false)
		f.Add([]byte(text), true)
	}
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, body []byte, openMetrics bool) {
		path := filepath.Join(dir, "fuzz"+textSuffix)
		if openMetrics {
			path = filepath.Join(dir, "fuzz"+openMetricsSuffix)
		}
		if err := os.WriteFile(path, body, 0o644); err != nil {
			t.Fatal(err)
		}
		c, err := New(Config{})
		if err != nil {
			t.Fatal(err)
		}
		kept, fail := c.read(path, 1<<40, 1<<40)
		if fail != nil {
			t.Fatal(fail)
		}
		stored, fail := c.read(path, -1, -1)
		if fail != nil {
			t.Fatal(fail)
		}
		if kept.fail != nil {
			if stored.fail == nil || kept.fail.Error() != stored.fail.Error() || kept.metrics != nil {
				t.Fatalf("%v and %v", kept.fail, stored.fail)
			}
			return
		}
		if stored.metrics != nil || stored.content.memory != nil {
			t.Fatal("series were kept")
		}
		var scratch []byte
		var d seriesDecoder
		last := ""
		w := newWalker(c, []*file{stored})
		for i := range kept.metrics {
			group := w.next()
			if len(group) != 1 || string(group[0].name) <= last {
				t.Fatalf("%d cursors behind %q", len(group), last)
			}
			last = string(group[0].name)
			a, b := &dto.MetricFamily{Metric: kept.metrics[i]}, &dto.MetricFamily{}
			for piece := range group[0].read(&d, nil, 0, &scratch) {
				b.Metric = append(b.Metric, piece...)
			}
			if !same(a, b) {
				t.Fatalf("%s: the file gives\n%v\nwhat is stored\n%v", last, a, b)
			}
		}
		if len(w.next()) > 0 || len(c.late) > 0 {
			t.Fatalf("there is more: %v", c.late)
		}
		s := Snapshot{collector: c, files: []*file{stored}}
		s.clashes = s.findClashes()
		s.walk(new(problems), func(*merged) bool { return true })
		for _, format := range []expfmt.FormatType{expfmt.TypeTextPlain, expfmt.TypeProtoDelim} {
			var out bytes.Buffer
			encoder := expfmt.NewEncoder(&out, expfmt.NewFormat(format))
			for family := range s.Families() {
				if err := encoder.Encode(family); err != nil {
					t.Fatal(err)
				}
			}
			p, err := textparse.New(out.Bytes(), string(expfmt.NewFormat(format)), labels.NewSymbolTable(), textparse.ParserOptions{})
			if err != nil {
				t.Fatal(err)
			}
			for err == nil {
				_, err = p.Next()
			}
			if err != io.EOF {
				t.Fatalf("Prometheus refuses it: %v\n%q", err, &out)
			}
		}
	})
}

// TestRenew: files that change do not let the temporary file grow, and a snapshot from
// before it was renewed shows what it has.
func TestRenew(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	c, err := New(Config{Directories: []string{dir}, TempDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	const lines = 30_000
	write := func(name string, n int) {
		t.Helper()
		var b bytes.Buffer
		for i := range lines {
			fmt.Fprintf(&b, "m{file=%q,i=\"%d\"} %d\n", name, i, n)
		}
		if err := os.WriteFile(filepath.Join(dir, name+textSuffix), b.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	collect := func() *Snapshot {
		t.Helper()
		s, err := c.Collect(t.Context(), nil)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	values := func(s *Snapshot) (sum float64) {
		for f := range s.Families() {
			for _, m := range f.Metric {
				sum += m.GetUntyped().GetValue()
			}
		}
		return sum
	}
	write("stays", 1)
	old := time.Now().Add(-time.Hour)
	if err := os.Chtimes(filepath.Join(dir, "stays"+textSuffix), old, old); err != nil {
		t.Fatal(err)
	}
	write("changes", 0)
	first := collect()
	live := int64(first.files[0].content.size + first.files[1].content.size)
	if first.files[0].content.file == nil || first.files[1].content.file == nil {
		t.Fatal("it is in memory")
	}
	renewed := 0
	for n := range 14 {
		before := c.spill.file
		write("changes", n)
		s := collect()
		if c.spill.file != before {
			renewed++
		}
		if c.spill.size > 3*live+minGarbage {
			t.Fatalf("the temporary file has %d bytes, and %d are in use", c.spill.size, live)
		}
		if n == 13 {
			if got := values(s); got != lines*(13+1) {
				t.Errorf("got a sum of %v", got)
			}
		}
	}
	if got := values(first); renewed == 0 || got != lines {
		t.Errorf("renewed %d times; the first snapshot has a sum of %v", renewed, got)
	}
}

// same compares messages by their bytes: a NaN is not equal to itself.
func same(a, b proto.Message) bool {
	options := proto.MarshalOptions{Deterministic: true}
	x, errX := options.Marshal(a)
	y, errY := options.Marshal(b)
	return errX == nil && errY == nil && bytes.Equal(x, y)
}
