package textfile

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"testing"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/textparse"
	"google.golang.org/protobuf/proto"
)

// FuzzFile writes files, reads them, and checks that what is read again of each family by
// its place in the file is what the whole file gave, and that Prometheus takes what is
// served.
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
		kept, fail := c.read(path, &c.buffer, 1<<40)
		if fail != nil {
			t.Fatal(fail)
		}
		indexed, fail := c.read(path, &c.buffer, -1)
		if fail != nil {
			t.Fatal(fail)
		}
		if kept.fail != nil {
			if indexed.fail == nil || kept.fail.Error() != indexed.fail.Error() || len(kept.families) > 0 {
				t.Fatalf("%v and %v", kept.fail, indexed.fail)
			}
			return
		}
		var buffer []byte
		for i := range kept.families {
			whole, again := &kept.families[i], &indexed.families[i]
			if again.metrics != nil {
				t.Fatal("series were kept")
			}
			metrics, err := indexed.load(again, &buffer)
			if err != nil {
				t.Fatalf("%s: %v", whole.meta.Value().name, err)
			}
			a, b := &dto.MetricFamily{Metric: whole.metrics}, &dto.MetricFamily{Metric: metrics}
			if !proto.Equal(a, b) {
				t.Fatalf("%s: the whole file gives\n%v\nits lines alone\n%v", whole.meta.Value().name, a, b)
			}
		}
		var s Snapshot
		s.collector = c
		s.merge([]*file{indexed}, nil, new(problems))
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
