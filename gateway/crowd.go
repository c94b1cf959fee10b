package gateway

import (
	"runtime"
	"time"
)

// crowd is what Run knows of those who push again and again, as soon as they have an
// answer.
type crowd struct {
	size  int           // how many were stored together, and waited then, at the most
	flush time.Duration // how long it takes to store some, on the average
	timer *time.Timer
	// alone is how often it is not waited for after the last wait in vain, skipped how often
	// that has been already.
	alone, skipped int
	// One more than size is waited for when patience waits in a row, of which there were met,
	// were not in vain: who always comes while nobody looks would never be counted.
	met, patience int
}

const (
	// maxAlone bounds crowd.alone: with it, who pushes now and then waits in vain once in so
	// many times.
	maxAlone = 127
	// minPatience and maxPatience bound crowd.patience, which doubles when nobody more came.
	minPatience, maxPatience = 16, 1024
	// maxGather bounds the time that a crowd is waited for.
	maxGather = time.Millisecond
)

// wanted returns how many are waited for.
func (c *crowd) wanted() int {
	if c.met >= c.patience {
		return c.size + 1
	}
	return c.size
}

// waited notes how a wait for so many ended.
func (c *crowd) waited(wanted int, came bool) {
	c.skipped = 0
	switch {
	case came && wanted > c.size:
		c.size, c.met, c.patience = wanted, 0, minPatience
	case came:
		c.alone /= 4
		c.met++
	case wanted > c.size:
		c.met, c.patience = 0, min(2*c.patience, maxPatience)
	default:
		// Those who pause between their pushes meet by chance. To wait for them costs up to a
		// millisecond: where nothing else is to be done, timers are no finer.
		if c.met = 0; c.alone > 0 {
			c.size, c.patience = 0, minPatience // who did not come twice is not waited for again
		}
		c.alone = min(2*c.alone+1, maxAlone)
	}
}

// gather waits for the crowd: a flush costs as much for all of them as for one. It waits
// for four times as long as one takes, which a crowd of eight needs on one processor.
func (s *Store) gather() {
	// Requests that can go on without waiting for anything go first.
	runtime.Gosched()
	if s.crowd.size <= 1 || s.crowd.flush < 20*time.Microsecond || s.shared != nil {
		return
	}
	if s.crowd.skipped < s.crowd.alone {
		s.crowd.skipped++
		return
	}
	wanted := s.crowd.wanted()
	s.mu.Lock()
	waiting := 0
	if len(s.batches) > 0 {
		waiting = len(s.batches[0].changes)
	}
	if s.closed || len(s.batches) > 1 || waiting >= wanted {
		s.mu.Unlock()
		return
	}
	s.rest = wanted
	s.mu.Unlock()
	if s.crowd.timer == nil {
		s.crowd.timer = time.NewTimer(0)
	}
	s.crowd.timer.Reset(min(4*s.crowd.flush, maxGather))
	select {
	case <-s.wake:
		s.crowd.waited(wanted, true)
	case <-s.crowd.timer.C:
		s.crowd.waited(wanted, false)
	}
}
