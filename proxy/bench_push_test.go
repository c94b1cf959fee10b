package main_test

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	promclient "github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
	"github.com/prometheus/common/expfmt"

	"github.com/culvert-io/culvert/protocol/externaltest"
)

// pushStoreUnderTest is a push store that BenchmarkPushStores measures.
type pushStoreUnderTest struct {
	*process
	name, url string
	client    *http.Client
	next      atomic.Int64
}

// startGateway starts Debian's Pushgateway.
func startGateway(b *testing.B, args ...string) *pushStoreUnderTest {
	address := externaltest.FreeAddress(b)
	p := start(b, "prometheus-pushgateway", externaltest.Program(b, "prometheus-pushgateway", "prometheus-pushgateway"), append(args, "--web.listen-address="+address)...)
	p.awaitLog("[Ll]istening on|listen_address")
	return &pushStoreUnderTest{name: "pushgateway", url: "http://" + address, process: p}
}

// payload is what is pushed in turn: bodies that differ in their values.
type payload struct {
	contentType string
	bodies      [64][]byte
}

// payloadOf returns bodies of what is gathered from a registry that observe fills, as the Go
// client library writes them in a format.
func payloadOf(b *testing.B, format expfmt.FormatType, observe func(r promclient.Registerer, n int)) payload {
	p := payload{contentType: string(expfmt.NewFormat(format))}
	for n := range p.bodies {
		registry := promclient.NewRegistry()
		observe(registry, n)
		families, err := registry.Gather()
		if err != nil {
			b.Fatal(err)
		}
		var body bytes.Buffer
		encoder := expfmt.NewEncoder(&body, expfmt.NewFormat(format))
		for _, f := range families {
			if err := encoder.Encode(f); err != nil {
				b.Fatal(err)
			}
		}
		p.bodies[n] = body.Bytes()
	}
	return p
}

// observeGauges makes 50 series, one a metric.
func observeGauges(r promclient.Registerer, n int) {
	for i := range 50 {
		promauto.With(r).NewGauge(promclient.GaugeOpts{
			Name: fmt.Sprintf("bench_metric_%02d", i), Help: "One of fifty metrics.", ConstLabels: promclient.Labels{"kind": "value"},
		}).Set(float64(n))
	}
}

// observeTables makes 50 series of one metric.
func observeTables(r promclient.Registerer, n int) {
	tables := promauto.With(r).NewGaugeVec(promclient.GaugeOpts{Name: "bench_bytes", Help: "Size of a table."}, []string{"table"})
	for i := range 50 {
		tables.WithLabelValues(fmt.Sprintf("table_%02d", i)).Set(float64(n))
	}
}

// observeAll makes 50 series: 3 histograms of 13, and 11 counters.
func observeAll(r promclient.Registerer, n int) {
	for i := range 3 {
		promauto.With(r).NewHistogram(promclient.HistogramOpts{
			Name: fmt.Sprintf("bench_seconds_%d", i), Help: "How long it took.", Buckets: promclient.LinearBuckets(0, 1, 10),
		}).Observe(float64(n) / 7)
	}
	for i := range 11 {
		promauto.With(r).NewCounter(promclient.CounterOpts{Name: fmt.Sprintf("bench_%02d_total", i), Help: "One of eleven counters."}).Add(float64(n))
	}
}

// observeOthers makes 50 series that no other body has.
func observeOthers(r promclient.Registerer, n int) {
	observeGauges(promclient.WrapRegistererWith(promclient.Labels{"run": strconv.Itoa(n)}, r), n)
}

// pushes has 8 clients push n times, each on a connection of its own, and returns how
// many pushes a second went. They share the processor with the store that they
// measure, so they do as little as they can: an HTTP client library would take more
// of it than the fastest store, and so would threads that look for more to do.
func (s *pushStoreUnderTest) pushes(b *testing.B, what *payload, n, groups int64) float64 {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	start := time.Now()
	var left atomic.Int64
	left.Store(n)
	var clients sync.WaitGroup
	for range 8 {
		clients.Go(func() {
			conn, err := net.Dial("tcp", strings.TrimPrefix(s.url, "http://"))
			if err != nil {
				b.Error(err)
				return
			}
			defer conn.Close()
			answers, request := bufio.NewReader(conn), []byte(nil)
			for left.Add(-1) >= 0 && !b.Failed() {
				n := s.next.Add(1)
				body := what.bodies[n%int64(len(what.bodies))]
				// Steps of a prime go through all groups.
				request = fmt.Appendf(request[:0], "PUT /metrics/job/bench/instance/host-%06d HTTP/1.1\r\nHost: store\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n",
					n*7919%groups, what.contentType, len(body))
				request = append(request, body...)
				if _, err := conn.Write(request); err != nil {
					b.Error(err)
					return
				}
				if err := readAnswer(answers); err != nil {
					b.Errorf("%s: %v", s.name, err)
					return
				}
			}
		})
	}
	clients.Wait()
	return float64(n) / time.Since(start).Seconds()
}

// readAnswer reads the answer to a push. It returns an error for whatever is not a
// success with a Content-Length.
func readAnswer(r *bufio.Reader) error {
	var status string
	length := -1
	for {
		line, err := r.ReadSlice('\n')
		if err != nil {
			return err
		}
		if line = bytes.TrimSpace(line); len(line) == 0 {
			break
		}
		if status == "" {
			if status = string(line); !strings.HasPrefix(status, "HTTP/1.1 2") {
				return errors.New(status)
			}
		} else if name, value, _ := bytes.Cut(line, []byte(": ")); bytes.EqualFold(name, []byte("Content-Length")) {
			if length, err = strconv.Atoi(string(value)); err != nil {
				return err
			}
		}
	}
	if length < 0 {
		return fmt.Errorf("%s without a Content-Length", status)
	}
	_, err := r.Discard(length)
	return err
}

// scrape returns how long a scrape takes, gzip included.
func (s *pushStoreUnderTest) scrape(b *testing.B) time.Duration {
	req, err := http.NewRequest(http.MethodGet, s.url+"/metrics", nil)
	if err != nil {
		b.Fatal(err)
	}
	req.Header.Set("Accept-Encoding", "gzip") // so that it is not unpacked here
	start := time.Now()
	resp, err := s.client.Do(req)
	if err != nil {
		b.Fatal(err)
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil || resp.Header.Get("Content-Encoding") != "gzip" {
		b.Fatalf("%s: %v, Content-Encoding %q", s.name, err, resp.Header.Get("Content-Encoding"))
	}
	return time.Since(start)
}

// cpuTicks returns the processor time that the store has used so far.
func (s *pushStoreUnderTest) cpuTicks(b *testing.B) (ticks int) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", s.cmd.Process.Pid))
	if err != nil {
		b.Skip(err)
	}
	_, rest, _ := strings.Cut(string(stat), ") ")
	for _, field := range strings.Fields(rest)[11:13] { // utime and stime
		n, err := strconv.Atoi(field)
		if err != nil {
			b.Fatal(err)
		}
		ticks += n
	}
	return ticks
}

// awaitRest waits until no store has anything left to do: the Pushgateway goes on to
// collect garbage for half a second, which would slow down whose turn is next.
func awaitRest(b *testing.B, stores []*pushStoreUnderTest) {
	used := func() (ticks int) {
		for _, s := range stores {
			ticks += s.cpuTicks(b)
		}
		return ticks
	}
	for last, end := used(), time.Now().Add(10*time.Second); time.Now().Before(end); {
		time.Sleep(200 * time.Millisecond)
		now := used()
		if now == last {
			return
		}
		last = now
	}
}

// resident returns the resident memory in MB.
func (s *pushStoreUnderTest) resident(b *testing.B) float64 {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.cmd.Process.Pid))
	if err != nil {
		b.Skip(err)
	}
	var kB float64
	_, rest, _ := strings.Cut(string(text), "VmRSS:")
	fmt.Sscan(rest, &kB)
	return kB / 1000
}

// BenchmarkPushStores compares culvert-proxy, which stores every push on disk before
// it answers, with Debian's Pushgateway, which keeps them in memory here and has its
// consistency check off. Rounds of the two alternate, and begin when both are at rest.
// The ratios are better the larger they are, but for memory.
func BenchmarkPushStores(b *testing.B) {
	gateway := startGateway(b, "--persistence.file=", "--push.disable-consistency-check", "--web.enable-admin-api")
	proxy := startProxy(b, "--storage.path="+b.TempDir(), "--log.level=info", "--web.enable-admin-api")
	culvert := &pushStoreUnderTest{name: "culvert", url: proxy.url, process: proxy.process}
	both := []*pushStoreUnderTest{culvert, gateway}
	for _, s := range both {
		s.client = &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 16}}
		defer s.client.CloseIdleConnections()
	}
	// The Pushgateway answers before it has stored: up to 1,000 pushes may wait in its
	// queue when a round ends.
	const perRound = 10_000
	rates := map[int64]float64{} // of culvert, by groups
	gauges := payloadOf(b, expfmt.TypeTextPlain, observeGauges)
	for _, groups := range []int64{100, 10_000} {
		b.Run(fmt.Sprintf("pushes/groups=%d", groups), func(b *testing.B) {
			rates[groups] = comparePushes(b, both, &gauges, perRound, groups)
			if groups > 100 {
				b.ReportMetric(rates[groups]/rates[100], "x-100-groups")
			}
		})
	}
	b.Run("pushes/groups=1000/check=on", func(b *testing.B) {
		const groups, few = 1000, 24 // with its check on the Pushgateway would take minutes for more
		file := "--persistence.file=" + filepath.Join(b.TempDir(), "groups")
		filled := startGateway(b, file, "--push.disable-consistency-check")
		filled.pushes(b, &gauges, groups, groups)
		awaitRest(b, []*pushStoreUnderTest{filled})
		filled.stop()
		checking := startGateway(b, file)
		culvert.pushes(b, &gauges, groups, groups)
		b.ResetTimer()
		var rate, slow float64
		for range b.N {
			awaitRest(b, []*pushStoreUnderTest{culvert, checking})
			rate += culvert.pushes(b, &gauges, perRound, groups) / float64(b.N)
			slow += checking.pushes(b, &gauges, few, groups) / float64(b.N)
		}
		b.ReportMetric(rate, "pushes/s")
		b.ReportMetric(slow, "pushgateway's-pushes/s")
		b.ReportMetric(rate/slow, "x-pushgateway")
	})
	// What has changed since the last scrape is encoded and compressed; so all of it, or none.
	for _, changed := range []int64{10_000, 0} {
		b.Run(fmt.Sprintf("scrape/groups=10000/changed=%d", changed), func(b *testing.B) {
			took := map[string]time.Duration{}
			for range b.N {
				for _, s := range both {
					if changed > 0 {
						s.pushes(b, &gauges, changed, changed)
					}
					awaitRest(b, both)
					took[s.name] += s.scrape(b)
				}
			}
			b.ReportMetric(took["culvert"].Seconds()/float64(b.N)*1000, "ms/scrape")
			b.ReportMetric(float64(took["pushgateway"])/float64(took["culvert"]), "x-pushgateway")
			b.ReportMetric(culvert.resident(b), "MB-resident")
			b.ReportMetric(culvert.resident(b)/gateway.resident(b), "of-pushgateway's-memory")
		})
	}
	b.Run("pushes-while-scraped/groups=10000", func(b *testing.B) {
		var rate, quiet float64
		for range b.N {
			awaitRest(b, both)
			quiet += culvert.pushes(b, &gauges, perRound, 10_000)
			stop := make(chan struct{})
			var scraper sync.WaitGroup
			scraper.Go(func() {
				for {
					select {
					case <-stop:
						return
					default:
						culvert.scrape(b)
					}
				}
			})
			rate += culvert.pushes(b, &gauges, perRound, 10_000)
			close(stop)
			scraper.Wait()
		}
		b.ReportMetric(rate/float64(b.N), "pushes/s")
		b.ReportMetric(rate/quiet, "x-not-scraped")
	})
	for _, s := range both {
		s.change(b, "/api/v1/admin/wipe", "")
		s.change(b, "/metrics/job/alone", "alone 1\n") // most stores have keys of several sets of names
	}
	for _, c := range []struct {
		name    string
		format  expfmt.FormatType
		observe func(promclient.Registerer, int)
	}{
		{"tables/format=text", expfmt.TypeTextPlain, observeTables},
		{"all/format=text", expfmt.TypeTextPlain, observeAll},
		{"others/format=text", expfmt.TypeTextPlain, observeOthers},
		{"gauges/format=protobuf", expfmt.TypeProtoDelim, observeGauges},
		{"all/format=protobuf", expfmt.TypeProtoDelim, observeAll},
		{"others/format=protobuf", expfmt.TypeProtoDelim, observeOthers},
	} {
		what := payloadOf(b, c.format, c.observe)
		b.Run("pushes/groups=100/of="+c.name, func(b *testing.B) { comparePushes(b, both, &what, perRound, 100) })
	}
}

// comparePushes reports how many pushes a second the two stores take, in rounds of n that
// alternate, and returns the number of the first one.
func comparePushes(b *testing.B, both []*pushStoreUnderTest, what *payload, n, groups int64) float64 {
	for range 3 { // what a job pushes for the first time is found out about
		for _, s := range both {
			s.pushes(b, what, groups, groups)
		}
	}
	b.ResetTimer()
	rate := map[*pushStoreUnderTest]float64{}
	for range b.N {
		for _, s := range both {
			awaitRest(b, both)
			rate[s] += s.pushes(b, what, n, groups) / float64(b.N)
		}
	}
	b.ReportMetric(rate[both[0]], "pushes/s")
	b.ReportMetric(rate[both[0]]/rate[both[1]], "x-pushgateway")
	return rate[both[0]]
}

// change makes a PUT request.
func (s *pushStoreUnderTest) change(b *testing.B, path, body string) {
	req, err := http.NewRequest(http.MethodPut, s.url+path, strings.NewReader(body))
	if err != nil {
		b.Fatal(err)
	}
	resp, err := s.client.Do(req)
	if err != nil {
		b.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode/100 != 2 {
		b.Fatal(resp.Status)
	}
}
