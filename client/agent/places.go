package agent

import (
	"context"
	"slices"
	"sync"
	"time"
)

// places bounds how many of something run at a time. Who waits longest comes first.
type places struct {
	mu      sync.Mutex // protects what follows
	most    int        // 0 or less: no limit
	taken   int
	waiting []chan struct{} // closed with the place
}

// resize changes the limit; what runs goes on.
func (p *places) resize(most int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.most = most
	p.hand()
}

// limit returns the limit, 0 where there is none.
func (p *places) limit() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return max(p.most, 0)
}

// take waits for a place, for at most as long as given. Who got one gives it back.
func (p *places) take(ctx context.Context, wait time.Duration) bool {
	p.mu.Lock()
	if p.free() && len(p.waiting) == 0 {
		p.taken++
		p.mu.Unlock()
		return true
	}
	mine := make(chan struct{})
	p.waiting = append(p.waiting, mine)
	p.mu.Unlock()
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-mine:
		return true
	case <-timer.C:
	case <-ctx.Done():
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if i := slices.Index(p.waiting, mine); i >= 0 {
		p.waiting = slices.Delete(p.waiting, i, i+1)
		return false
	}
	return true // it came at the last moment
}

// give gives a place back.
func (p *places) give() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.taken--
	p.hand()
}

// free is called with mu held.
func (p *places) free() bool { return p.most <= 0 || p.taken < p.most }

// hand gives free places to those who wait. It is called with mu held.
func (p *places) hand() {
	for len(p.waiting) > 0 && p.free() {
		p.taken++
		close(p.waiting[0])
		p.waiting = slices.Delete(p.waiting, 0, 1)
	}
}
