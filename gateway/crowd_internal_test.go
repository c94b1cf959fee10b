package gateway

import (
	"log/slog"
	"testing"
	"testing/synctest"
	"time"
)

// Those who pause between their pushes are stored together by chance. Run soon leaves off
// waiting for them, and takes it up again for those who come.
func TestGather(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStore(StoreConfig{})
		gather := func(times int, comes bool) (waits int) {
			for range times {
				s.crowd.size, s.crowd.flush = 2, time.Millisecond
				if comes && len(s.wake) == 0 {
					s.wake <- struct{}{}
				}
				if s.gather(); s.crowd.skipped == 0 {
					waits++
				}
			}
			return waits
		}
		if n := gather(2000, false); n == 0 || n > 30 {
			t.Errorf("of 2000 waits in vain, %d were made", n)
		}
		gather(2*maxAlone, true)
		if n := gather(100, true); n != 100 {
			t.Errorf("of 100 times that others came, they were waited for %d times", n)
		}
	})
}

// Who has not come back yet when a batch is stored is not forgotten, but by two waits in
// vain.
func TestCrowd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStore(StoreConfig{Logger: slog.New(slog.DiscardHandler)})
		store := func(pushers, crowd int) {
			t.Helper()
			for range pushers {
				s.places.Acquire(t.Context(), 1)
				s.take(&change{match: func(Key) bool { return false }})
			}
			if !s.storeNext() {
				t.Fatal("nothing was stored")
			}
			if s.crowd.flush = time.Millisecond; s.crowd.size != crowd {
				t.Errorf("the crowd is %d, want %d", s.crowd.size, crowd)
			}
		}
		store(8, 8)
		store(5, 8) // after a wait
		store(5, 8) // without one
		store(5, 5) // after a wait
		store(6, 6)
	})
}

// Who always comes too late to be seen is found by waiting for one more, now and then.
func TestCrowdGrows(t *testing.T) {
	c := crowd{size: 5, patience: minPatience}
	waits := 0
	come := func(there int) {
		wanted := c.wanted()
		c.waited(wanted, there >= wanted)
		waits++
	}
	for c.size < 8 && waits < 1000 {
		come(8)
	}
	if waits > 4*minPatience {
		t.Errorf("after %d waits for a crowd of 8 it is %d", waits, c.size)
	}
	vain := 0
	for range 10_000 {
		if c.wanted() > 8 {
			vain++
		}
		come(8)
	}
	if c.size != 8 || vain > 20 {
		t.Errorf("the crowd of 8 is %d, after %d waits for one more", c.size, vain)
	}
}
