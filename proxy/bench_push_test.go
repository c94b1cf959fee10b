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
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// pushStoreUnderTest is a push store that BenchmarkPushStores measures.
type pushStoreUnderTest struct {
	*process
	name, url string
	client    *http.Client
	next      atomic.Int64
}

// pushedBodies are bodies of 50 series, one a metric, each with other values.
var pushedBodies = func() (bodies [64]string) {
	for n := range bodies {
		var body strings.Builder
		for i := range 50 {
			fmt.Fprintf(&body, "# TYPE bench_metric_%02d gauge\nbench_metric_%02d{kind=\"value\"} %d\n", i, i, n)
		}
		bodies[n] = body.String()
	}
	return bodies
}()

// pushes has 8 clients push n times, each on a connection of its own, and returns how
// many pushes a second went. They share the processor with the store that they
// measure, so they do as little as they can: an HTTP client library would take more
// of it than the fastest store, and so would threads that look for more to do.
func (s *pushStoreUnderTest) pushes(b *testing.B, n, groups int64) float64 {
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
				body := pushedBodies[n%int64(len(pushedBodies))]
				// Steps of a prime go through all groups.
				request = fmt.Appendf(request[:0], "PUT /metrics/job/bench/instance/host-%06d HTTP/1.1\r\nHost: store\r\nContent-Length: %d\r\n\r\n", n*7919%groups, len(body))
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
// consistency check off. Rounds of the two alternate. The ratios are better the
// larger they are, but for memory.
func BenchmarkPushStores(b *testing.B) {
	gatewayAddress := fixedAddress(b)
	gateway := &pushStoreUnderTest{name: "pushgateway", url: "http://" + gatewayAddress, process: start(b, "prometheus-pushgateway",
		external(b, "prometheus-pushgateway"), "--persistence.file=", "--push.disable-consistency-check", "--web.listen-address="+gatewayAddress)}
	gateway.awaitLog("[Ll]istening on|listen_address")
	proxy := startProxy(b, "--storage.path="+b.TempDir(), "--log.level=info")
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
	for _, groups := range []int64{100, 10_000} {
		b.Run(fmt.Sprintf("pushes/groups=%d", groups), func(b *testing.B) {
			for _, s := range both {
				s.pushes(b, groups, groups)
			}
			b.ResetTimer()
			rate := map[string]float64{}
			for range b.N {
				for _, s := range both {
					rate[s.name] += s.pushes(b, perRound, groups) / float64(b.N)
				}
			}
			b.ReportMetric(rate["culvert"], "pushes/s")
			b.ReportMetric(rate["culvert"]/rate["pushgateway"], "x-pushgateway")
			if groups > 100 {
				b.ReportMetric(rate["culvert"]/rates[100], "x-100-groups")
			}
			rates[groups] = rate["culvert"]
		})
	}
	// What has changed since the last scrape is encoded and compressed; so all of it, or none.
	for _, changed := range []int64{10_000, 0} {
		b.Run(fmt.Sprintf("scrape/groups=10000/changed=%d", changed), func(b *testing.B) {
			took := map[string]time.Duration{}
			for range b.N {
				for _, s := range both {
					if changed > 0 {
						s.pushes(b, changed, changed)
					}
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
			quiet += culvert.pushes(b, perRound, 10_000)
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
			rate += culvert.pushes(b, perRound, 10_000)
			close(stop)
			scraper.Wait()
		}
		b.ReportMetric(rate/float64(b.N), "pushes/s")
		b.ReportMetric(rate/quiet, "x-not-scraped")
	})
}
