package main

import (
	"context"
	"fmt"
	"io"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// requestTimeout bounds one request; the scrape's own timeout is a little shorter.
const requestTimeout = 60 * time.Second

// sample is what one round gave of one subject.
type sample struct {
	elapsed            time.Duration
	latencies          []time.Duration // of the good requests, sorted
	bytes              int64           // of their bodies
	failed             int
	firstErr           error
	proxyCPU, agentCPU float64 // seconds
	proxyRSS, agentRSS float64 // bytes, at the end
}

// rate returns good requests per second.
func (s *sample) rate() float64 { return float64(len(s.latencies)) / s.elapsed.Seconds() }

func (s *sample) mbps() float64 { return float64(s.bytes) / 1e6 / s.elapsed.Seconds() }

// quantile returns the latency that a share q of the good requests did not exceed,
// in milliseconds.
func (s *sample) quantile(q float64) float64 {
	if len(s.latencies) == 0 {
		return 0
	}
	at := min(int(q*float64(len(s.latencies))), len(s.latencies)-1)
	return s.latencies[at].Seconds() * 1000
}

// measure has clients make requests one after the other for a while. The last one
// of each client is waited for and counts.
func measure(ctx context.Context, s *subject, clients int, duration time.Duration) (sample, error) {
	// What another subject left behind is not this one's to collect.
	runtime.GC()
	var (
		next    atomic.Int64
		mu      sync.Mutex // protects out
		out     sample
		working sync.WaitGroup
	)
	proxyCPU, agentCPU := s.proxy.cpu(), s.agent.cpu()
	start := time.Now()
	for range clients {
		working.Go(func() {
			buf := make([]byte, 64<<10)
			var latencies []time.Duration
			var bytes int64
			var failed int
			var firstErr error
			for time.Since(start) < duration && ctx.Err() == nil {
				began := time.Now()
				n, err := s.do(ctx, int(next.Add(1)-1), buf)
				if err != nil {
					if ctx.Err() != nil {
						break
					}
					failed++
					if firstErr == nil {
						firstErr = err
					}
					continue
				}
				latencies = append(latencies, time.Since(began))
				bytes += n
			}
			mu.Lock()
			defer mu.Unlock()
			out.latencies = append(out.latencies, latencies...)
			out.bytes += bytes
			out.failed += failed
			if out.firstErr == nil {
				out.firstErr = firstErr
			}
		})
	}
	working.Wait()
	out.elapsed = time.Since(start)
	out.proxyCPU, out.agentCPU = s.proxy.cpu()-proxyCPU, s.agent.cpu()-agentCPU
	out.proxyRSS, out.agentRSS = s.proxy.resident(), s.agent.resident()
	slices.Sort(out.latencies)
	if ctx.Err() != nil {
		return out, ctx.Err()
	}
	if len(out.latencies) == 0 {
		return out, fmt.Errorf("%s: no request was answered: %w", s.name, out.firstErr)
	}
	return out, nil
}

// do makes the n-th request and reads the answer. It returns the body's length.
func (s *subject) do(ctx context.Context, n int, buf []byte) (int64, error) {
	req, err := s.request(ctx, n)
	if err != nil {
		return 0, err
	}
	resp, err := s.client.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	if resp.StatusCode/100 != 2 {
		n, _ := io.ReadFull(resp.Body, buf[:min(200, len(buf))])
		return 0, fmt.Errorf("%s: %s", resp.Status, buf[:n])
	}
	// Hide that Discard has a buffer of its own.
	got, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, resp.Body, buf)
	switch {
	case err != nil:
		return 0, err
	case s.size > 0 && got != int64(s.size):
		return 0, fmt.Errorf("%s: the body has %d bytes, want %d", req.URL, got, s.size)
	}
	if s.got != nil {
		s.got(resp, got)
	}
	return got, nil
}

// alternate measures the subjects in turns, so that whatever else the machine does
// meets all of them alike. It returns the rounds of each.
func (b *bench) alternate(ctx context.Context, subjects []*subject, clients int) ([][]sample, error) {
	for _, s := range subjects {
		b.progress.show("warming %s up", s.name)
		if _, err := measure(ctx, s, clients, min(b.Duration/2, time.Second)); err != nil {
			return nil, err
		}
	}
	samples := make([][]sample, len(subjects))
	for round := range b.Rounds {
		for i := range subjects {
			i = (i + round) % len(subjects) // nobody is always first
			s := subjects[i]
			b.progress.show("round %d of %d: %s, %d at a time", round+1, b.Rounds, s.name, clients)
			found, err := measure(ctx, s, clients, b.Duration)
			if err != nil {
				return nil, err
			}
			samples[i] = append(samples[i], found)
		}
	}
	return samples, nil
}

// median returns the middle of the values that f has.
func median(samples []sample, f func(*sample) float64) float64 {
	values := make([]float64, len(samples))
	for i := range samples {
		values[i] = f(&samples[i])
	}
	slices.Sort(values)
	if n := len(values); n%2 == 0 {
		return (values[n/2-1] + values[n/2]) / 2
	}
	return values[len(values)/2]
}

// newRow puts the rounds of a subject together.
func newRow(s *subject, clients int, samples []sample) row {
	r := row{
		Subject: s.name, Clients: clients,
		Rate:  median(samples, (*sample).rate),
		MBps:  median(samples, (*sample).mbps),
		P50:   median(samples, func(s *sample) float64 { return s.quantile(0.5) }),
		P95:   median(samples, func(s *sample) float64 { return s.quantile(0.95) }),
		P99:   median(samples, func(s *sample) float64 { return s.quantile(0.99) }),
		Proxy: usage{Resident: median(samples, func(s *sample) float64 { return s.proxyRSS })},
		Agent: usage{Resident: median(samples, func(s *sample) float64 { return s.agentRSS })},
	}
	r.Proxy.CPU = median(samples, func(s *sample) float64 { return s.proxyCPU / float64(len(s.latencies)) * 1000 })
	r.Agent.CPU = median(samples, func(s *sample) float64 { return s.agentCPU / float64(len(s.latencies)) * 1000 })
	for _, s := range samples {
		r.Failed += s.failed
		if r.Error == "" && s.firstErr != nil {
			r.Error = s.firstErr.Error()
		}
	}
	return r
}

// newRatio compares a subject with a baseline round by round.
func newRatio(subject, baseline string, samples, baselines []sample) ratio {
	of := func(f func(*sample) float64) spread {
		quotients := make([]float64, len(samples))
		for i := range samples {
			quotients[i] = f(&samples[i]) / f(&baselines[i])
		}
		slices.Sort(quotients)
		n := len(quotients)
		return spread{Median: (quotients[(n-1)/2] + quotients[n/2]) / 2, Least: quotients[0], Most: quotients[n-1]}
	}
	return ratio{
		Subject: subject, Baseline: baseline,
		Rate: of((*sample).rate),
		P50:  of(func(s *sample) float64 { return s.quantile(0.5) }),
		P99:  of(func(s *sample) float64 { return s.quantile(0.99) }),
	}
}

// compare measures the subjects, the last of which is compared with all others.
func (b *bench) compare(ctx context.Context, found *result, subjects []*subject, clients int) error {
	samples, err := b.alternate(ctx, subjects, clients)
	if err != nil {
		return err
	}
	last := len(subjects) - 1
	for i, s := range subjects {
		found.Rows = append(found.Rows, newRow(s, clients, samples[i]))
		if i < last {
			found.Ratios = append(found.Ratios, newRatio(subjects[last].name, s.name, samples[last], samples[i]))
		}
	}
	return nil
}
