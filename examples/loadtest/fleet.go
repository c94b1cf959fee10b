package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Scenarios with many agents, which one process plays.

// settleTime is how long an idle proxy is left alone before its memory is read: the
// garbage of the handshakes goes meanwhile.
const settleTime = 15 * time.Second

func idleAgents(ctx context.Context, b *bench, st *stage, found *result) error {
	if err := b.ours(); err != nil {
		return err
	}
	proxy, err := b.startProxy(ctx, st, "127.0.0.1:0", "--storage.path=")
	if err != nil {
		return err
	}
	if _, err := proxy.gauge(ctx, "go_goroutines"); err != nil { // what the first scrape needs is no agent's
		return err
	}
	before := proxy.resident()
	start, cpu := time.Now(), proxy.cpu()
	agents, err := b.startAgents(ctx, st, proxy, b.Agents, 1, b.Body.or(1000))
	if err != nil {
		return err
	}
	number := float64(b.Agents)
	found.add("agents", number, "")
	found.add("time until all were connected", time.Since(start).Seconds(), "s")
	found.add("CPU time of the proxy for a handshake", (proxy.cpu()-cpu)/number*1e3, "ms")
	found.add("resident memory of the proxy without agents", before/(1<<20), "MiB")
	found.add("resident memory of the proxy an agent, at once", (proxy.resident()-before)/number/1000, "kB")
	b.progress.show("leaving %d agents alone for %s", b.Agents, settleTime)
	if err := pause(ctx, settleTime); err != nil {
		return err
	}
	found.add("resident memory of the proxy an agent", (proxy.resident()-before)/number/1000, "kB")
	found.add("resident memory of the agents' process an agent", agents.resident()/number/1000, "kB")
	for _, part := range []struct{ name, series string }{{"heap", "go_memstats_heap_inuse_bytes"}, {"stacks", "go_memstats_stack_inuse_bytes"}} {
		n, err := proxy.gauge(ctx, part.series)
		if err != nil {
			return err
		}
		found.add(part.name+" of the proxy in use an agent, its own included", n/number/1000, "kB")
	}
	goroutines, err := proxy.gauge(ctx, "go_goroutines")
	if err != nil {
		return err
	}
	found.add("goroutines of the proxy an agent", goroutines/number, "")
	cpu = proxy.cpu()
	if err := pause(ctx, settleTime); err != nil {
		return err
	}
	found.add("CPU time of the proxy while idle", (proxy.cpu()-cpu)/settleTime.Seconds()*1e3, "ms/s")
	return nil
}

func manyAgents(ctx context.Context, b *bench, st *stage, found *result) error {
	if err := b.ours(); err != nil {
		return err
	}
	body := b.Body.or(20_000)
	var subjects []*subject
	for _, number := range []int{1, b.Agents} {
		proxy, err := b.startProxy(ctx, st, "127.0.0.1:0", "--storage.path=")
		if err != nil {
			return err
		}
		agents, err := b.startAgents(ctx, st, proxy, number, 1, body)
		if err != nil {
			return err
		}
		s, err := newScrape(st, fmt.Sprintf("agents: %d", number), proxy.url, st.cert.clientTLS(), body, func(n int) string {
			return "http://" + targetName(0) + "." + agentName(n%number) + "/metrics"
		})
		if err != nil {
			return err
		}
		s.proxy, s.agent = proxy.process, agents
		subjects = append(subjects, s)
	}
	return b.compare(ctx, found, subjects, b.scrapers(32))
}

func discovery(ctx context.Context, b *bench, st *stage, found *result) error {
	if err := b.ours(); err != nil {
		return err
	}
	const targets = 3
	proxy, err := b.startProxy(ctx, st, "127.0.0.1:0", "--storage.path=")
	if err != nil {
		return err
	}
	agents, err := b.startAgents(ctx, st, proxy, b.Agents, targets, 1000)
	if err != nil {
		return err
	}
	body, err := proxy.get(ctx, "/targets")
	if err != nil {
		return err
	}
	var groups []json.RawMessage
	if err := json.Unmarshal(body, &groups); err != nil {
		return err
	}
	found.add("entries", float64(len(groups)), "")
	if len(groups) < b.Agents*targets {
		return fmt.Errorf("/targets has %d entries, want at least %d", len(groups), b.Agents*targets)
	}
	var subjects []*subject
	encodings := []string{"identity", "gzip"}
	answers := make([]atomic.Pointer[figure], len(encodings))
	for i, encoding := range encodings {
		s, err := newScrape(st, encoding, "", st.cert.clientTLS(), 0, always(proxy.url+"/targets"))
		if err != nil {
			return err
		}
		request := s.request
		s.request = func(ctx context.Context, n int) (*http.Request, error) {
			req, err := request(ctx, n)
			if err == nil {
				req.Header.Set("Accept-Encoding", encoding)
			}
			return req, err
		}
		s.got = func(resp *http.Response, body int64) {
			used := resp.Header.Get("Content-Encoding")
			if used == "" {
				used = "identity"
			}
			answers[i].Store(&figure{fmt.Sprintf("answer to Accept-Encoding: %s (%s)", encoding, used), float64(body) / 1000, "kB"})
		}
		s.proxy, s.agent = proxy.process, agents
		subjects = append(subjects, s)
	}
	if err := b.compare(ctx, found, subjects, b.scrapers(1)); err != nil {
		return err
	}
	for i := range answers {
		found.Figures = append(found.Figures, *answers[i].Load())
	}
	return nil
}

// get fetches a path of the proxy itself.
func (p *proxyProcess) get(ctx context.Context, path string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, p.url+path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := p.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s: %s", path, resp.Status, bytes.TrimSpace(body))
	}
	return body, err
}

// scrapeEvery is the distance of the scrapes of one agent under restart.
const scrapeEvery = 15 * time.Second

// restart stops the proxy in good order and starts it again, and then once more
// kills it first. It counts the failed scrapes by when they began.
func restart(ctx context.Context, b *bench, st *stage, found *result) error {
	if err := b.ours(); err != nil {
		return err
	}
	address, err := freeAddress()
	if err != nil {
		return err
	}
	start := func() (*proxyProcess, error) {
		return b.startProxy(ctx, st, address, "--storage.path="+filepath.Join(st.dir, "data"))
	}
	proxy, err := start()
	if err != nil {
		return err
	}
	agents, err := b.startAgents(ctx, st, proxy, b.Agents, 1, b.Body.or(1000))
	if err != nil {
		return err
	}
	for _, how := range []struct {
		name   string
		signal os.Signal
	}{{"SIGTERM", syscall.SIGTERM}, {"SIGKILL", syscall.SIGKILL}} {
		s, err := newScrape(st, "culvert", proxy.url, st.cert.clientTLS(), 0, func(n int) string {
			return "http://" + targetName(0) + "." + agentName(n%b.Agents) + "/metrics"
		})
		if err != nil {
			return err
		}
		// phase is that of the scrapes which begin now.
		phases := []string{"before", "without a proxy", "while agents came back", "after"}
		var phase atomic.Int32
		var good, failed [4]atomic.Int64
		var firstErr atomic.Pointer[error] // of the last phase
		paced, stop := context.WithCancel(ctx)
		var scraping sync.WaitGroup
		scraping.Go(func() {
			tick := time.NewTicker(scrapeEvery / time.Duration(b.Agents))
			defer tick.Stop()
			for n := 0; ; n++ {
				select {
				case <-tick.C:
				case <-paced.Done():
					return
				}
				scraping.Go(func() {
					began := phase.Load()
					_, err := s.do(ctx, n, make([]byte, 4<<10))
					if err == nil {
						good[began].Add(1)
						return
					}
					failed[began].Add(1)
					if began == 3 {
						firstErr.CompareAndSwap(nil, &err)
					}
				})
			}
		})
		play := func() error {
			b.progress.show("scraping before %s", how.name)
			if err := pause(ctx, b.Duration); err != nil {
				return err
			}
			phase.Store(1)
			stopped := time.Now()
			if err := proxy.stop(how.signal); err != nil {
				return err
			}
			gone := time.Now()
			if proxy, err = start(); err != nil {
				return err
			}
			phase.Store(2)
			listening, cpu := time.Now(), proxy.cpu()
			if err := b.awaitConnected(ctx, proxy, b.Agents, agents); err != nil {
				return err
			}
			phase.Store(3)
			found.add(how.name+": time until the old proxy was gone", gone.Sub(stopped).Seconds(), "s")
			found.add(how.name+": time from then until the new one listened", listening.Sub(gone).Seconds(), "s")
			found.add(how.name+": time from then until all agents were back", time.Since(listening).Seconds(), "s")
			found.add(how.name+": CPU time of the proxy for it", proxy.cpu()-cpu, "s")
			b.progress.show("scraping after %s", how.name)
			return pause(ctx, max(b.Duration, 10*time.Second))
		}
		err = play()
		stop()
		scraping.Wait()
		if err != nil {
			return err
		}
		for i, name := range phases {
			bad := failed[i].Load()
			found.add(fmt.Sprintf("%s: scrapes %s that failed, of %d", how.name, name, good[i].Load()+bad), float64(bad), "")
		}
		if err := firstErr.Load(); err != nil {
			b.progress.note("%s: the first scrape that failed after all were back: %v", how.name, *err)
		}
	}
	return nil
}
