package textfile_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/textparse"

	"github.com/culvert-io/culvert/client/textfile"
	"github.com/culvert-io/culvert/gateway"
)

// liveHeap returns the bytes that are in use.
func liveHeap() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// TestMemory serves 1,000 files of 100 kB, 100 MB, and looks at what is in use all the
// while. The index is what grows with the number of series. The files have families of
// their own, and one that all of them have.
func TestMemory(t *testing.T) {
	if testing.Short() || raceEnabled {
		t.Skip("100 MB of files")
	}
	d := newDirectory(t)
	const files, size = 1000, 100_000
	total, series := int64(0), 0
	for n := range files {
		var b bytes.Buffer
		fmt.Fprintf(&b, "# HELP shared_job_duration_seconds How long the steps of the job took.\n# TYPE shared_job_duration_seconds gauge\n")
		for i := 0; b.Len() < size/2; i++ {
			fmt.Fprintf(&b, "shared_job_duration_seconds{job=\"job-%d\",step=\"step-%d\"} %d.%d\n", n, i, i, n)
			series++
		}
		for i := 0; b.Len() < size; i++ {
			name := fmt.Sprintf("job_%d_family_%d_bytes", n, i/100)
			if i%100 == 0 {
				fmt.Fprintf(&b, "# HELP %s Bytes that the job has seen.\n# TYPE %s gauge\n", name, name)
			}
			fmt.Fprintf(&b, "%s{device=\"/dev/disk-%d\",mode=\"rw\"} %d\n", name, i, n*i)
			series++
		}
		if err := os.WriteFile(filepath.Join(d.path, fmt.Sprintf("job-%d.prom", n)), b.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
		d.age(fmt.Sprintf("job-%d.prom", n), 60e9)
		total += int64(b.Len())
	}
	c, _ := newCollector(t, textfile.Config{Directories: []string{d.path}})
	before := liveHeap()
	snapshot, err := c.Collect(context.Background(), nil)
	if err != nil {
		t.Fatal(err)
	}
	index := liveHeap() - before
	peak, written, looks := int64(0), int64(0), int64(0)
	w := &countingWriter{header: http.Header{}, write: func(p []byte) {
		if written += int64(len(p)); written/(5<<20) > looks {
			looks = written / (5 << 20)
			peak = max(peak, liveHeap()-before)
		}
	}}
	gateway.ServeFamilies(w, httptest.NewRequest(http.MethodGet, "/metrics", nil), snapshot.Families(), slog.New(slog.DiscardHandler))
	t.Logf("%d files, %d series, %d bytes; %d bytes written; index %d bytes, peak %d bytes", files, series, total, written, index, peak)
	if written < total*9/10 || looks < 10 {
		t.Fatalf("%d bytes were written, want %d or so", written, total)
	}
	// The index may have 24 bytes a series; all messages at once would have about 700.
	if limit := int64(24 * series); index > limit {
		t.Errorf("the index has %d bytes, want %d at most", index, limit)
	}
	// Beside it there is what a file of 100 kB needs, and the series that are kept and
	// sorted in memory.
	if limit := int64(24*series + 16<<20); peak > limit {
		t.Errorf("%d bytes were in use, want %d at most", peak, limit)
	}
}

type countingWriter struct {
	header http.Header
	write  func([]byte)
}

func (w *countingWriter) Header() http.Header         { return w.header }
func (w *countingWriter) WriteHeader(int)             {}
func (w *countingWriter) Write(p []byte) (int, error) { w.write(p); return len(p), nil }

// scrape serves a snapshot, and checks that Prometheus takes it: it returns the number
// of samples of each name.
func scrape(t *testing.T, s *textfile.Snapshot, accept string) map[string]int {
	t.Helper()
	r := httptest.NewRequest(http.MethodGet, "/metrics", nil)
	r.Header.Set("Accept", accept)
	w := httptest.NewRecorder()
	gateway.ServeFamilies(w, r, s.Families(), slog.New(slog.DiscardHandler))
	p, err := textparse.New(w.Body.Bytes(), w.Header().Get("Content-Type"), labels.NewSymbolTable(), textparse.ParserOptions{})
	if err != nil {
		t.Error(err)
		return nil
	}
	samples, seen := map[string]int{}, map[string]bool{}
	for {
		entry, err := p.Next()
		if err == io.EOF {
			return samples
		}
		if err != nil {
			t.Errorf("%v in\n%.2000s", err, w.Body)
			return nil
		}
		switch entry {
		case textparse.EntrySeries:
			var l labels.Labels
			p.Labels(&l)
			if seen[l.String()] {
				t.Errorf("%s comes twice", l)
			}
			seen[l.String()] = true
			samples[l.Get(model.MetricNameLabel)]++
		case textparse.EntryType:
			name, kind := p.Type()
			key := "# TYPE " + string(name)
			if !strings.Contains(accept, "protobuf") && seen[key] {
				t.Errorf("%s %s comes twice", key, kind)
			}
			seen[key] = true
		}
	}
}

const (
	acceptText        = "text/plain"
	acceptOpenMetrics = "application/openmetrics-text;version=1.0.0"
	acceptProtobuf    = "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited"
)

// large is a file of three families that is not kept in memory.
func large(file string, value int) string {
	return fmt.Sprintf("# TYPE a gauge\na{f=%q} %d\n", file, value) + // ahead of its samples
		lines("m{f=\""+file+"\",n=\"%d\"} "+fmt.Sprint(value)+"\n", 14_000) + fmt.Sprintf("z{f=%q} %d\n", file, value)
}

// TestParts: a family that comes in parts is one for Prometheus, in all formats.
func TestParts(t *testing.T) {
	t.Parallel()
	d := newDirectory(t, "1.prom", large("1", 1), "2.prom", large("2", 2), "3.prom", "m{f=\"1\",n=\"7\"} 1\nm 1\n")
	c, _ := newCollector(t, textfile.Config{Directories: []string{d.path}})
	for _, accept := range []string{acceptText, acceptProtobuf, acceptOpenMetrics} {
		snapshot, err := c.Collect(context.Background(), nil)
		if err != nil {
			t.Fatal(err)
		}
		if got := scrape(t, snapshot, accept); got["a"] != 2 || got["m"] != 28_001 || got["z"] != 2 || got["node_textfile_mtime_seconds"] != 3 {
			t.Errorf("%s: %v", accept, got)
		}
	}
}

// TestReplaced: what happens to files between the reading and the writing.
func TestReplaced(t *testing.T) {
	t.Parallel()
	old := large("b", 1)
	for _, test := range []struct {
		name   string
		change func(directory)
		// what of b.prom is still there
		a, m, z float64
		reason  string // that the next scrape tells
	}{
		{"nothing", func(directory) {}, 1, 1, 1, ""},
		{"renamed over, other values", func(d directory) { d.write("b.prom", large("b", 2)) }, 2, 2, 2, ""},
		{"in place, other values", func(d directory) { d.overwrite("b.prom", large("b", 2)) }, 2, 2, 2, ""},
		{"renamed over, other series", func(d directory) { d.write("b.prom", "a{f=\"b\"} 3\nz{f=\"x\"} 3\n") }, 0, 0, 0, "changed"},
		{"renamed over, a family less", func(d directory) { d.write("b.prom", strings.Replace(large("b", 3), "\nz", "\ny", 1)) }, 3, 3, 0, "changed"},
		{"cut short", func(d directory) { os.Truncate(filepath.Join(d.path, "b.prom"), 20_000) }, 0, 0, 0, "parse"},
		{"bad", func(d directory) { d.write("b.prom", "x") }, 0, 0, 0, "parse"},
		{"gone", func(d directory) { os.Remove(filepath.Join(d.path, "b.prom")) }, 0, 0, 0, ""},
		{"a directory", func(d directory) {
			os.Remove(filepath.Join(d.path, "b.prom"))
			os.Mkdir(filepath.Join(d.path, "b.prom"), 0o755)
		}, 0, 0, 0, "io"},
		{"the same size and time", func(d directory) {
			d.overwrite("b.prom", large("b", 5))
			d.age("b.prom", 3600e9)
			info, _ := os.Stat(filepath.Join(d.path, "c.prom"))
			os.Chtimes(filepath.Join(d.path, "b.prom"), info.ModTime(), info.ModTime())
		}, 5, 5, 5, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			d := newDirectory(t, "b.prom", old, "c.prom", large("c", 9))
			info, err := os.Stat(filepath.Join(d.path, "c.prom"))
			if err != nil {
				t.Fatal(err)
			}
			os.Chtimes(filepath.Join(d.path, "b.prom"), info.ModTime(), info.ModTime())
			c, _ := newCollector(t, textfile.Config{Directories: []string{d.path}})
			snapshot, err := c.Collect(context.Background(), nil)
			if err != nil {
				t.Fatal(err)
			}
			test.change(d)
			sums := map[string]float64{} // by name and file
			counts := map[string]int{}
			for f := range snapshot.Families() {
				for _, m := range f.Metric {
					if len(m.Label) > 0 && m.Label[0].GetName() == "f" {
						key := f.GetName() + m.Label[0].GetValue()
						sums[key] += m.GetUntyped().GetValue() + m.GetGauge().GetValue()
						counts[key]++
					}
				}
			}
			if sums["ac"] != 9 || sums["mc"] != 9*14_000 || sums["zc"] != 9 {
				t.Errorf("the other file: %v", sums)
			}
			if sums["ab"] != test.a || sums["mb"] != test.m*14_000 || sums["zb"] != test.z {
				t.Errorf("got %v of %v", sums, counts)
			}
			next, err := c.Collect(context.Background(), nil)
			if err != nil {
				t.Fatal(err)
			}
			told := ""
			for f := range next.Families() {
				if f.GetName() == "culvert_client_textfile_errors" {
					told = f.Metric[0].Label[1].GetValue()
				}
			}
			if told != test.reason {
				t.Errorf("the next scrape tells %q, want %q", told, test.reason)
			}
		})
	}
}

// TestWrittenInPlace scrapes while a job writes its files without renaming, in many small
// steps. Every exposition is good and has all of the other file.
func TestWrittenInPlace(t *testing.T) {
	t.Parallel()
	d := newDirectory(t, "good.prom", large("good", 1))
	c, _ := newCollector(t, textfile.Config{Directories: []string{d.path}})
	var stop atomic.Bool
	var writer sync.WaitGroup
	writer.Go(func() {
		for n := 0; !stop.Load(); n++ {
			f, err := os.Create(filepath.Join(d.path, "torn.prom"))
			if err != nil {
				t.Error(err)
				return
			}
			text := large("torn", n)
			for len(text) > 0 {
				size := min(len(text), 5000+n%7)
				io.WriteString(f, text[:size])
				text = text[size:]
			}
			f.Close()
		}
	})
	defer writer.Wait()
	defer stop.Store(true)
	var told atomic.Int64
	var scrapers sync.WaitGroup
	for _, accept := range []string{acceptText, acceptProtobuf} {
		scrapers.Go(func() {
			for range 10 {
				snapshot, err := c.Collect(context.Background(), nil)
				if err != nil {
					t.Error(err)
					return
				}
				got := scrape(t, snapshot, accept)
				if got["a"] < 1 || got["m"] < 14_000 || got["z"] < 1 {
					t.Errorf("%s: %v", accept, got)
				}
				told.Add(int64(got["culvert_client_textfile_errors"]))
			}
		})
	}
	scrapers.Wait()
	t.Logf("20 scrapes, %d told of the file", told.Load())
}

// BenchmarkScrape tells how much time a scrape of files that have not changed takes,
// beside reading, parsing and writing them all, which is what node_exporter does.
func BenchmarkScrape(b *testing.B) {
	for _, size := range []int{20, 5000} { // lines in each of ten files: kept in memory, and read again
		b.Run(fmt.Sprintf("lines=%d", size), func(b *testing.B) {
			dir := b.TempDir()
			paths := make([]string, 10)
			for i := range paths {
				paths[i] = filepath.Join(dir, fmt.Sprintf("%d.prom", i))
				text := "# HELP m x\n# TYPE m gauge\n" + lines(fmt.Sprintf("m{f=\"%d\",n=\"%%d\",mode=\"rw\"} 1.5\n", i), size)
				if err := os.WriteFile(paths[i], []byte(text), 0o644); err != nil {
					b.Fatal(err)
				}
				at := time.Now().Add(-time.Minute)
				if err := os.Chtimes(paths[i], at, at); err != nil {
					b.Fatal(err)
				}
			}
			c, err := textfile.New(textfile.Config{Directories: []string{dir}})
			if err != nil {
				b.Fatal(err)
			}
			var plain, ours time.Duration
			for b.Loop() {
				start := time.Now()
				for _, path := range paths {
					text, err := os.ReadFile(path)
					if err != nil {
						b.Fatal(err)
					}
					families, err := gateway.ParseText(text)
					if err != nil {
						b.Fatal(err)
					}
					for _, f := range families {
						expfmt.MetricFamilyToText(io.Discard, f)
					}
				}
				between := time.Now()
				s, err := c.Collect(context.Background(), nil)
				if err != nil {
					b.Fatal(err)
				}
				for f := range s.Families() {
					expfmt.MetricFamilyToText(io.Discard, f)
				}
				plain += between.Sub(start)
				ours += time.Since(between)
			}
			b.ReportMetric(ours.Seconds()/plain.Seconds(), "x-of-plain")
		})
	}
}
