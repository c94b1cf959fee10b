package main

import (
	"context"
	"os"
	"runtime"
	"runtime/metrics"
	"sync"
	"time"
)

// A scrape is a chain of goroutines of which one works at a time. Where processors are
// idle Go wakes a thread for most of them, to look whether there is more to do: that is a
// fifth of the processor time of a proxy that has little to do, and delays the scrape. So
// the program keeps to one processor as long as that is enough.
const (
	processorsCheck = 100 * time.Millisecond // between looks at whether it is
	// longWait is a wait for the processor that should not be, in seconds. Go measures
	// one wait in eight. Where longWaits of them were long since the last look, and one
	// in longShare, one processor is not enough.
	longWait             = 1e-3
	longWaits, longShare = 4, 20
	// It is not enough either where it was used for fullShare of the last fullChecks.
	fullShare, fullChecks = 0.9, 10
	// With all, less than looseShare of one may be enough for it: a fifth goes into looking.
	looseShare = 1.2
	// One is tried again after firstPause, and after twice as long, at most lastPause,
	// each time that it was not enough for calmAfter.
	firstPause, lastPause = time.Second, 5 * time.Minute
	calmAfter             = 10 * time.Second
	// allFor is how long all are used where somebody knows that it is better.
	allFor = 5 * time.Second
)

// processors switches between one processor and all.
type processors struct {
	fixed bool // by the environment variable GOMAXPROCS, or there is but one

	mu     sync.Mutex // protects what follows
	frugal frugality
	until  time.Time // until when useAll has all used
	all    bool      // all are used
}

func newProcessors() *processors {
	return &processors{fixed: os.Getenv("GOMAXPROCS") != "" || runtime.GOMAXPROCS(0) == 1, all: true}
}

// useAll has the program use all processors for some seconds.
func (p *processors) useAll() {
	if p.fixed {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.until = time.Now().Add(allFor)
	p.set(true)
}

// set has all processors used, or one. It stops the program for some ten microseconds
// where that changes. It is called with mu held.
func (p *processors) set(all bool) {
	if p.all == all {
		return
	}
	if p.all = all; all {
		runtime.SetDefaultGOMAXPROCS()
	} else {
		runtime.GOMAXPROCS(1)
	}
}

// run looks at whether one processor is enough until ctx ends. Then all are used.
func (p *processors) run(ctx context.Context) {
	if p.fixed {
		return
	}
	sample := []metrics.Sample{{Name: "/sched/latencies:seconds"}}
	ticker := time.NewTicker(processorsCheck)
	defer ticker.Stop()
	for last := (look{}); ; {
		select {
		case <-ticker.C:
		case <-ctx.Done():
			p.mu.Lock()
			defer p.mu.Unlock()
			p.set(true)
			return
		}
		metrics.Read(sample)
		seen := look{at: time.Now(), used: cpuTime()}
		seen.waits, seen.long = countWaits(sample[0].Value.Float64Histogram())
		if !last.at.IsZero() {
			p.mu.Lock()
			p.frugal.see(last, seen)
			p.set(!p.frugal.one || seen.at.Before(p.until))
			p.mu.Unlock()
		}
		last = seen
	}
}

// look is what was used and waited for until a time.
type look struct {
	at          time.Time
	used        time.Duration // processor time
	waits, long uint64
}

// countWaits returns how many waits a histogram has, and how many of them are long.
func countWaits(h *metrics.Float64Histogram) (all, long uint64) {
	for i, n := range h.Counts {
		all += n
		if h.Buckets[i] >= longWait {
			long += n
		}
	}
	return all, long
}

// frugality decides between one processor and all.
type frugality struct {
	one   bool
	since time.Time     // of that, zero: it was always so
	pause time.Duration // before one is tried again
	// share is how much of one processor was used since then, on the average, the last look
	// most. It begins low with one and high with all.
	share float64
}

// see decides anew, given two looks in a row.
func (f *frugality) see(last, now look) {
	used := float64(now.used-last.used) / float64(max(now.at.Sub(last.at), 1))
	f.share += (used - f.share) / fullChecks
	long := now.long - last.long
	waited := long >= longWaits && long*longShare >= now.waits-last.waits
	switch {
	case f.one && (waited || f.share >= fullShare):
		if f.pause *= 2; now.at.Sub(f.since) >= calmAfter {
			f.pause = firstPause
		}
		f.pause = min(max(f.pause, firstPause), lastPause)
		f.one, f.since, f.share = false, now.at, 2
	case !f.one && now.at.Sub(f.since) >= f.pause && f.share < looseShare:
		f.one, f.since, f.share = true, now.at, 0
	}
}
