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
	"slices"
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

// lookingContext is asked by Collect for each file and each family whether to go on.
type lookingContext struct {
	context.Context
	look  func()
	asked int
}

func (c *lookingContext) Err() error {
	if c.asked++; c.asked%20_000 == 100 {
		c.look()
	}
	return c.Context.Err()
}

// TestMemory serves 1,000 files of 100 kB, 100 MB, and looks at what is in use all the
// while. It must not be more than for one file and for 300, but for what is known of each
// file. The series of a file are those of one family that all have, of families that all
// have one series of, of families that nobody else has, and the same in all files.
func TestMemory(t *testing.T) {
	if testing.Short() || raceEnabled {
		t.Skip("100 MB of files")
	}
	const files, size = 1000, 100_000
	text := func(n int) []byte {
		var b bytes.Buffer
		b.WriteString("# HELP shared_job_duration_seconds How long the steps of the job took.\n# TYPE shared_job_duration_seconds gauge\n")
		for i := 0; b.Len() < size/4; i++ {
			fmt.Fprintf(&b, "shared_job_duration_seconds{job=\"job-%d\",step=\"step-%d\"} %d.%d\n", n, i, i, n)
		}
		for i := 0; b.Len() < size/2; i++ {
			fmt.Fprintf(&b, "# HELP job_%d_bytes Bytes.\n# TYPE job_%d_bytes gauge\njob_%d_bytes{job=\"job-%d\"} %d\n", i, i, i, n, i*n)
		}
		for i := 0; b.Len() < size*3/4; i++ {
			fmt.Fprintf(&b, "# HELP own_%d_%d_bytes Bytes.\n# TYPE own_%d_%d_bytes gauge\nown_%d_%d_bytes{device=\"/dev/disk-%d\"} %d\n", n, i, n, i, n, i, i, n*i)
		}
		for i := 0; b.Len() < size; i++ {
			fmt.Fprintf(&b, "same_%d_bytes{device=\"/dev/disk-%d\",mode=\"rw\"} %d\n", i/50, i, n)
		}
		return b.Bytes()
	}
	var peaks []int64
	for _, count := range []int{1, 300, files} {
		d := newDirectory(t)
		total := 0
		for n := range count {
			name, text := fmt.Sprintf("job-%d.prom", n), text(n)
			d.overwrite(name, string(text))
			d.age(name, time.Minute)
			total += len(text)
		}
		c, _ := newCollector(t, textfile.Config{Directories: []string{d.path}})
		before, peak, looks := liveHeap(), int64(0), 0
		look := func() {
			looks++
			peak = max(peak, liveHeap()-before)
		}
		snapshot, err := c.Collect(&lookingContext{Context: context.Background(), look: look}, nil)
		if err != nil {
			t.Fatal(err)
		}
		look()
		collected, written := looks, 0
		w := &countingWriter{header: http.Header{}, write: func(p []byte) {
			if written += len(p); written*16/total >= looks-collected {
				look()
			}
		}}
		gateway.ServeFamilies(w, httptest.NewRequest(http.MethodGet, "/metrics", nil), snapshot.Families(), slog.New(slog.DiscardHandler))
		t.Logf("%d files, %d bytes; %d bytes written; at most %d bytes in use, of %d looks", count, total, written, peak, looks)
		if written < total/2 || looks-collected < 2 {
			t.Fatalf("%d bytes were written and looked at %d times", written, looks-collected)
		}
		peaks = append(peaks, peak)
		runtime.KeepAlive(c)
	}
	// What is known of a file, its time as a series, and a cursor are 2 kB or so. The
	// constant is for buffers, which do not grow.
	for i, count := range []int{1, 300, files} {
		if limit := peaks[0] + 3<<20 + int64(count)*2500; peaks[i] > limit {
			t.Errorf("%d files: %d bytes were in use, want %d at most; %d for one file", count, peaks[i], limit, peaks[0])
		}
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

// TestReplaced: an exposition shows what Collect read, whatever happens to the files then,
// and the next one shows what has become of them.
func TestReplaced(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name   string
		change func(directory)
		value  float64 // of the three families in b.prom, the next time
		reason string  // that the next scrape tells
	}{
		{"nothing", func(directory) {}, 1, ""},
		{"renamed over", func(d directory) { d.write("b.prom", large("b", 2)) }, 2, ""},
		{"in place", func(d directory) { d.overwrite("b.prom", large("b", 2)) }, 2, ""},
		{"cut short", func(d directory) { os.Truncate(filepath.Join(d.path, "b.prom"), 20_000) }, 0, "parse"},
		{"bad", func(d directory) { d.write("b.prom", "x") }, 0, "parse"},
		{"gone", func(d directory) { os.Remove(filepath.Join(d.path, "b.prom")) }, 0, ""},
		{"a directory", func(d directory) {
			os.Remove(filepath.Join(d.path, "b.prom"))
			os.Mkdir(filepath.Join(d.path, "b.prom"), 0o755)
		}, 0, "io"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			d := newDirectory(t, "b.prom", large("b", 1), "c.prom", large("c", 9))
			d.age("b.prom", time.Hour)
			c, _ := newCollector(t, textfile.Config{Directories: []string{d.path}})
			expect := func(snapshot *textfile.Snapshot, value float64, reason string) {
				t.Helper()
				sums := map[string]float64{} // by name and file
				told := ""
				for f := range snapshot.Families() {
					for _, m := range f.Metric {
						if f.GetName() == "culvert_client_textfile_errors" {
							told = m.Label[1].GetValue()
						} else if len(m.Label) > 0 && m.Label[0].GetName() == "f" {
							sums[f.GetName()+m.Label[0].GetValue()] += m.GetUntyped().GetValue() + m.GetGauge().GetValue()
						}
					}
				}
				if sums["ac"] != 9 || sums["mc"] != 9*14_000 || sums["zc"] != 9 {
					t.Errorf("the other file: %v", sums)
				}
				if sums["ab"] != value || sums["mb"] != value*14_000 || sums["zb"] != value || told != reason {
					t.Errorf("got %v and %q, want %v and %q", sums, told, value, reason)
				}
			}
			collect := func() *textfile.Snapshot {
				t.Helper()
				snapshot, err := c.Collect(context.Background(), nil)
				if err != nil {
					t.Fatal(err)
				}
				return snapshot
			}
			first := collect()
			test.change(d)
			second := collect() // at the same time as the first one
			expect(first, 1, "")
			expect(second, test.value, test.reason)
			expect(first, 1, "")
		})
	}
}

// TestTimeSetBack: a file that is changed in place, and has the size and time of
// modification that it had.
func TestTimeSetBack(t *testing.T) {
	t.Parallel()
	if runtime.GOOS != "linux" && runtime.GOOS != "darwin" {
		t.Skip("this system does not tell")
	}
	d := newDirectory(t, "a.prom", "m 1\n")
	stat := func(name string) os.FileInfo {
		t.Helper()
		info, err := os.Stat(filepath.Join(d.path, name))
		if err != nil {
			t.Fatal(err)
		}
		return info
	}
	d.age("a.prom", time.Hour)
	info := stat("a.prom")
	d.overwrite("mark", "")
	c, _ := newCollector(t, textfile.Config{Directories: []string{d.path}})
	if got := collect(t, c, d.path); got.text != untyped("m", "a.prom", "m 1") {
		t.Errorf("got %+v", got)
	}
	// The file system's clock goes in steps.
	for d.overwrite("a.prom", "m 2\n"); !stat("a.prom").ModTime().After(stat("mark").ModTime()); {
		d.overwrite("a.prom", "m 2\n")
	}
	os.Chtimes(filepath.Join(d.path, "a.prom"), info.ModTime(), info.ModTime())
	if got := collect(t, c, d.path); got.text != untyped("m", "a.prom", "m 2") {
		t.Errorf("got %+v", got)
	}
}

// TestTemporaryFile: where there is no room for it, all is served all the same, and logged
// once.
func TestTemporaryFile(t *testing.T) {
	t.Parallel()
	files := []string{"a.prom", large("a", 1), "b.prom", large("b", 1), "c.prom", large("a", 2)} // c has what a has
	d := newDirectory(t, files...)
	temporary := filepath.Join(t.TempDir(), "later")
	c, l := newCollector(t, textfile.Config{Directories: []string{d.path}, TempDir: temporary})
	var texts []string
	for i := range 4 {
		if i == 2 {
			if err := os.Mkdir(temporary, 0o700); err != nil {
				t.Fatal(err)
			}
		}
		got := collect(t, c, d.path)
		if strings.Count(got.text, "m{") != 28_000 || !slices.Equal(got.dropped, []string{"c.prom duplicate 14002"}) || strings.Contains(got.text, "} 2\n") {
			t.Fatalf("got %d series, dropped %q, errors %q", strings.Count(got.text, "m{"), got.dropped, got.errors)
		}
		texts = append(texts, got.text)
		if got.text != texts[0] {
			t.Fatalf("scrape %d shows something else", i)
		}
		logged := strings.Join(l.take(), "\n")
		if told := strings.Contains(logged, "temporary file"); told != (i == 0) {
			t.Errorf("scrape %d: log %q", i, logged)
		}
		for n := 0; n < len(files); n += 2 {
			d.write(files[n], files[n+1])
		}
	}
	if entries, err := os.ReadDir(temporary); err != nil || len(entries) > 0 && runtime.GOOS != "windows" {
		t.Errorf("the temporary file has a name: %v, %v", entries, err)
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
