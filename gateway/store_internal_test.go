package gateway

import (
	"errors"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"
	"unique"
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
		if n := gather(2000, false); n == 0 || n > 20 {
			t.Errorf("of 2000 waits in vain, %d were made", n)
		}
		gather(2*maxAlone, true)
		if n := gather(100, true); n != 100 {
			t.Errorf("of 100 times that others came, they were waited for %d times", n)
		}
	})
}

// Who has not come back yet when a batch is stored is not forgotten, but by a wait in vain.
func TestCrowd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStore(StoreConfig{Logger: slog.New(slog.DiscardHandler)})
		store := func(pushers int) {
			t.Helper()
			for range pushers {
				s.places.Acquire(t.Context(), 1)
				s.take(&change{match: func(Key) bool { return false }})
			}
			if !s.storeNext() {
				t.Fatal("nothing was stored")
			}
		}
		store(8)
		if store(5); s.crowd.size != 8 {
			t.Errorf("after 8 and 5 together the crowd is %d", s.crowd.size)
		}
		s.crowd.flush = time.Millisecond
		if store(5); s.crowd.size != 5 {
			t.Errorf("after a wait for 8, of which 5 came, the crowd is %d", s.crowd.size)
		}
	})
}

// A short body may become long by the labels of its grouping key. Here its families share
// their text, so that no memory is needed for all of it.
func TestImageTooLarge(t *testing.T) {
	s := newStore(StoreConfig{})
	e := edit{key: Key{{"job", "j"}}}
	text := make([]byte, 1<<30)
	for _, name := range []string{"a", "b", "c", "d"} {
		e.pushed.families = append(e.pushed.families, prepared{meta: unique.Make(meta{name: name}), series: []uint64{1}, text: text})
	}
	if _, err := s.edit(&e); !errors.Is(err, ErrBodyTooLarge) || s.Len() != 0 {
		t.Errorf("got %v, and %d groups", err, s.Len())
	}
}
