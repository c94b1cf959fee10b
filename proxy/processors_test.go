package main

import (
	"context"
	"runtime"
	"sync"
	"testing"
	"time"
)

// TestFrugality: one processor as long as that is enough.
func TestFrugality(t *testing.T) {
	const step = processorsCheck
	var f frugality
	var now look
	now.at = time.Unix(1_800_000_000, 0)
	// pass lets time go by with so much of one processor used, and so many waits in each step.
	pass := func(d time.Duration, share float64, waits, long uint64) {
		for end := now.at.Add(d); now.at.Before(end); {
			last := now
			now.at = now.at.Add(step)
			now.used += time.Duration(share * float64(step))
			now.waits += waits
			now.long += long
			f.see(last, now)
		}
	}
	want := func(what string, one bool) {
		t.Helper()
		if f.one != one {
			t.Fatalf("%s: one processor alone: %v, want %v", what, f.one, one)
		}
	}
	pass(step, 0, 0, 0)
	want("at first", true)
	pass(time.Minute, 0.8, 1000, 10)
	want("few waits are long", true)
	pass(time.Minute, 0.1, 3, 3)
	want("few waits at all", true)
	pass(step, 0.1, 80, 4)
	want("one wait in twenty is long", false)
	pass(firstPause-2*step, 0, 0, 0)
	want("before the pause has passed", false)
	pass(2*step, 0, 0, 0)
	want("after it", true)
	pass(step, 0.1, 80, 4)
	want("again not enough", false)
	pass(2*firstPause-2*step, 0, 0, 0)
	want("before twice the pause has passed", false)
	pass(2*step, 0, 0, 0)
	want("after twice the pause", true)
	for range 10 {
		pass(step, 0.1, 80, 8)
		pass(lastPause+step, 0, 0, 0)
		want("after the longest pause", true)
	}
	pass(calmAfter, 0, 0, 0)
	pass(step, 0.1, 80, 8)
	pass(firstPause+step, 0, 0, 0)
	want("after the first pause, since it was enough for a while", true)
	pass(300*time.Millisecond, 1, 10, 0)
	want("used wholly for a moment", true)
	pass(3*time.Second, 1, 10, 0)
	want("used wholly for seconds", false)
	pass(time.Hour, 1.5, 10, 0)
	want("as long as more than one is used", false)
	pass(2*time.Second, 1.1, 10, 0)
	want("when hardly more than one is used", true)
	pass(time.Second, 0.8, 10, 0)
	want("when that is less with one", true)
}

// TestProcessors lets the real thing switch.
func TestProcessors(t *testing.T) {
	if runtime.NumCPU() == 1 {
		t.Skip("this machine has one processor")
	}
	t.Setenv("GOMAXPROCS", "") // what the tests were started with
	runtime.SetDefaultGOMAXPROCS()
	all := runtime.GOMAXPROCS(0)
	p := newProcessors()
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { p.run(ctx) })
	want := func(what string, processors int) {
		t.Helper()
		for end := time.Now().Add(2 * time.Minute); runtime.GOMAXPROCS(0) != processors; time.Sleep(10 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%s: %d processors are used, want %d", what, runtime.GOMAXPROCS(0), processors)
			}
		}
	}
	want("with nothing to do", 1)
	p.useAll()
	if n := runtime.GOMAXPROCS(0); n != all {
		t.Errorf("with work for all: %d processors are used, want %d", n, all)
	}
	time.Sleep(3 * processorsCheck)
	if n := runtime.GOMAXPROCS(0); n != all {
		t.Errorf("shortly after that: %d processors are used, want %d", n, all)
	}
	want("long after it", 1)
	stop := make(chan struct{})
	for range 64 {
		running.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					for start := time.Now(); time.Since(start) < 100*time.Microsecond; {
					}
					runtime.Gosched()
				}
			}
		})
	}
	want("in a crowd", all)
	close(stop)
	cancel()
	running.Wait()
	want("at the end", all)

	t.Setenv("GOMAXPROCS", "2")
	if p := newProcessors(); !p.fixed {
		t.Error("GOMAXPROCS in the environment does not count")
	}
}
