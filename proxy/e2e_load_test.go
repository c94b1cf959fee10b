package main_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"log/slog"
	"net/http"
	"os"
	"regexp"
	"runtime/pprof"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/culvert-io/culvert/client/agent"
)

// A large exposition passes through, and neither end holds more than a little of it.
func TestLargeExposition(t *testing.T) {
	t.Parallel()
	const blocks, most = 200, 64 << 20
	var block strings.Builder
	for i := 0; block.Len() < 1<<20; i++ {
		fmt.Fprintf(&block, "e2e_large{series=\"%d\"} %d\n", i, i)
	}
	sent := make(chan hash.Hash, 1)
	exporter := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; version=0.0.4")
		sum := sha256.New()
		for i := range blocks {
			if _, err := fmt.Fprintf(io.MultiWriter(w, sum), "e2e_block %d\n%s", i, block.String()); err != nil {
				t.Errorf("block %d: %v", i, err)
				break
			}
		}
		sent <- sum
	})
	proxy := startProxy(t)
	agent := startAgent(t, proxy.url, web1, "--target=large="+exporter.URL)

	resp, err := through(t, proxy.url, nil).Get("http://large." + web1 + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	received := sha256.New()
	n, err := io.Copy(received, resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK || n < blocks<<20 {
		t.Fatalf("%s, %d bytes, %v", resp.Status, n, err)
	}
	if want := (<-sent).Sum(nil); !bytes.Equal(received.Sum(nil), want) {
		t.Errorf("the %d bytes that came are not those that were sent", n)
	}
	for _, p := range []*process{proxy.process, agent} {
		peak := peakMemory(t, p)
		t.Logf("%s: at most %d MiB resident", p.name, peak>>20)
		// The race detector multiplies memory.
		if peak >= most && !raceEnabled {
			t.Errorf("%s: at most %d MiB were resident, want less than %d", p.name, peak>>20, most>>20)
		}
	}
}

var peakLine = regexp.MustCompile(`(?m)^VmHWM:\s+(\d+) kB$`)

// peakMemory returns the most resident memory that a process ever had, in bytes.
func peakMemory(t *testing.T, p *process) int {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		t.Skipf("this system doesn't tell the memory of a process: %v", err)
	}
	line := peakLine.FindSubmatch(status)
	if line == nil {
		t.Fatalf("/proc/PID/status has no VmHWM:\n%s", status)
	}
	kilobytes, _ := strconv.Atoi(string(line[1]))
	return kilobytes << 10
}

// Of a thousand agents that are scraped every second no scrape is lost, and
// nothing stays when they go.
func TestThousandAgents(t *testing.T) {
	t.Parallel()
	agents, rounds := 1000, 60
	if testing.Short() || raceEnabled {
		agents, rounds = 100, 10
	}
	proxy := startProxy(t, "--storage.path="+t.TempDir())
	atRest, heapAtRest, hereAtRest := proxy.gauge("go_goroutines"), proxy.gauge("go_memstats_heap_inuse_bytes"), ours(t)

	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	stop := func() { cancel(); running.Wait() }
	t.Cleanup(stop)
	name := func(i int) string { return fmt.Sprintf("agent-%d.example.net", i) }
	body := func(i int) string { return fmt.Sprintf("e2e_agent{number=\"%d\"} 1\n", i) }
	for i := range agents {
		a, err := agent.New(agent.Config{
			Name: name(i), ProxyURLs: []string{proxy.url}, Logger: slog.New(slog.DiscardHandler),
			Targets: []agent.Target{{Name: "app", Handler: exposition(body(i))}},
		})
		if err != nil {
			t.Fatal(err)
		}
		running.Go(func() { a.Run(ctx) })
	}
	connected := func(want int) {
		t.Helper()
		eventually(t, time.Minute, func() error {
			if n := proxy.gauge(`culvert_proxy_agents{state="connected"}`); n != float64(want) {
				return fmt.Errorf("%g agents are connected, want %d", n, want)
			}
			return nil
		})
	}
	connected(agents)

	client := through(t, proxy.url, nil)
	var good atomic.Int64
	var scraping sync.WaitGroup
	for i := range agents {
		scraping.Go(func() {
			time.Sleep(time.Duration(i) * time.Second / time.Duration(agents)) // as Prometheus spreads its scrapes
			tick := time.NewTicker(time.Second)
			defer tick.Stop()
			for range rounds {
				if err := expect(client, "http://app."+name(i)+"/metrics", "30", body(i)); err != nil {
					t.Errorf("agent %d: %v", i, err)
					return
				}
				good.Add(1)
				<-tick.C
			}
		})
	}
	scraping.Wait()
	client.CloseIdleConnections()
	connected(agents)
	t.Logf("%d scrapes were answered; the proxy has %g goroutines and %g MiB of heap",
		good.Load(), proxy.gauge("go_goroutines"), proxy.gauge("go_memstats_heap_inuse_bytes")/(1<<20))
	if want := int64(agents * rounds); good.Load() != want {
		t.Errorf("%d scrapes were answered in full, want %d", good.Load(), want)
	}

	stop()
	connected(0)
	eventually(t, time.Minute, func() error {
		get(t, proxy.url+"/targets") // work that makes the collector run
		goroutines, heap := proxy.gauge("go_goroutines"), proxy.gauge("go_memstats_heap_inuse_bytes")
		var errs []error
		if goroutines > atRest+10 {
			errs = append(errs, fmt.Errorf("the proxy has %g goroutines, and had %g", goroutines, atRest))
		}
		if heap > heapAtRest+16<<20 {
			errs = append(errs, fmt.Errorf("the proxy has %g MiB of heap, and had %g", heap/(1<<20), heapAtRest/(1<<20)))
		}
		if here := ours(t); here > hereAtRest {
			errs = append(errs, fmt.Errorf("the stopped agents have %d goroutines", here-hereAtRest))
		}
		return errors.Join(errs...)
	})
	t.Logf("after the agents: %g goroutines (%g before), %g MiB of heap (%g before)", proxy.gauge("go_goroutines"), atRest,
		proxy.gauge("go_memstats_heap_inuse_bytes")/(1<<20), heapAtRest/(1<<20))
}

// ours returns how many goroutines of this process run code of the agent or the
// tunnel; other tests run beside this one, as clients and exporters alone.
func ours(t *testing.T) (n int) {
	t.Helper()
	var stacks bytes.Buffer
	if err := pprof.Lookup("goroutine").WriteTo(&stacks, 2); err != nil {
		t.Fatal(err)
	}
	for stack := range strings.SplitSeq(stacks.String(), "\n\n") {
		if strings.Contains(stack, "culvert/client/") || strings.Contains(stack, "culvert/protocol.") || strings.Contains(stack, "hashicorp/yamux") {
			n++
		}
	}
	return n
}
