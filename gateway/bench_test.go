package gateway_test

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/culvert-io/culvert/gateway"
	"github.com/culvert-io/culvert/gateway/boltstore"
	"github.com/culvert-io/culvert/gateway/fastgzip"
)

// benchmarkBody has 50 series, one a metric.
func benchmarkBody() string {
	var body strings.Builder
	for i := range 50 {
		fmt.Fprintf(&body, "# TYPE bench_metric_%02d gauge\nbench_metric_%02d{kind=\"some_value\"} %d\n", i, i, i)
	}
	return body.String()
}

// filled returns a gateway with groups of 50 series, and what pushes one of them anew.
func filled(b *testing.B, backend gateway.Backend, groups int) (*gateway.Gateway, func(n int)) {
	store, err := gateway.OpenStore(gateway.StoreConfig{Logger: slog.New(slog.DiscardHandler)}, backend)
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- store.Run(ctx) }()
	b.Cleanup(func() {
		cancel()
		<-done
	})
	g := gateway.New(gateway.Config{Gzip: fastgzip.Gzip}, store)
	body := benchmarkBody()
	push := func(n int) {
		r := httptest.NewRequest(http.MethodPut, "/", strings.NewReader(body))
		w := httptest.NewRecorder()
		g.ServePush(w, r, fmt.Sprintf("/bench/instance/host-%05d", n%groups))
		if w.Code != http.StatusOK {
			b.Error(w.Body)
		}
	}
	for n := range groups {
		push(n)
	}
	return g, push
}

// BenchmarkPush pushes 50 series to groups that are there, from several clients at
// a time, without HTTP: in memory, and with a bbolt file.
func BenchmarkPush(b *testing.B) {
	for _, groups := range []int{100, 10_000} {
		for _, storage := range []string{"memory", "bbolt"} {
			b.Run(fmt.Sprintf("groups=%d/storage=%s", groups, storage), func(b *testing.B) {
				backend := gateway.Memory()
				if storage == "bbolt" {
					bolt, err := boltstore.Open(b.TempDir()+"/push.db", nil)
					if err != nil {
						b.Fatal(err)
					}
					backend = bolt
				}
				_, push := filled(b, backend, groups)
				var next atomic.Int64
				b.SetParallelism(4)
				b.ReportAllocs()
				b.ResetTimer()
				b.RunParallel(func(pb *testing.PB) {
					for pb.Next() {
						push(int(next.Add(7919)))
					}
				})
			})
		}
	}
}

// BenchmarkExpose scrapes 1,000 groups of 50 series.
func BenchmarkExpose(b *testing.B) {
	g, _ := filled(b, gateway.Memory(), 1000)
	for name, header := range map[string]http.Header{
		"format=text":      {},
		"format=text+gzip": {"Accept-Encoding": {"gzip"}},
		"format=protobuf":  {"Accept": {"application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited"}},
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for range b.N {
				r := httptest.NewRequest(http.MethodGet, "/metrics", nil)
				r.Header = header
				w := &discard{header: http.Header{}}
				gateway.ServeMetrics(g, w, r)
				b.SetBytes(w.n)
			}
		})
	}
}

// discard is an http.ResponseWriter that counts what is written.
type discard struct {
	header http.Header
	n      int64
}

func (d *discard) Header() http.Header { return d.header }
func (d *discard) WriteHeader(int)     {}
func (d *discard) Write(p []byte) (int, error) {
	d.n += int64(len(p))
	return io.Discard.Write(p)
}
