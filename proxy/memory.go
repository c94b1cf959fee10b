package main

import (
	"context"
	"os"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

// The collector's headroom, beside what is alive. The push store makes a large heap
// that hardly changes and has few pointers: collecting it often costs little, so
// six tenths of the default do. A small heap gets more than the default, or
// the collector would never rest.
const (
	largeHeapPercent = 60
	smallHeapPercent = 400
	minHeadroom      = 24 << 20 // bytes
	heapCheckEvery   = 2 * time.Second

	// A burst, as when thousands of agents come back, leaves its garbage where it is until
	// something else happens: the collector looks by itself once in two minutes, and keeps
	// what it frees for the next burst. So memory goes back to the system once the proxy is
	// quiet: at most quietBytes were allocated in each of quietChecks checks, and burstBytes,
	// or a tenth of what is alive where that is more, since memory was last given back.
	quietChecks = 3
	quietBytes  = 1 << 20
	burstBytes  = minHeadroom
)

// saveMemory fits the collector's headroom to the heap until ctx ends, and gives back
// what a burst has left. The environment variable GOGC switches it off.
func saveMemory(ctx context.Context) {
	if os.Getenv("GOGC") != "" {
		return
	}
	now := smallHeapPercent
	before := debug.SetGCPercent(now)
	defer debug.SetGCPercent(before)
	heap := []metrics.Sample{{Name: "/gc/heap/live:bytes"}, {Name: "/gc/heap/allocs:bytes"}}
	quiet, last, givenBack := 0, uint64(0), uint64(0) // checks, and what was allocated by then
	ticker := time.NewTicker(heapCheckEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return
		}
		metrics.Read(heap)
		live, allocated := heap[0].Value.Uint64(), heap[1].Value.Uint64()
		if quiet++; allocated-last > quietBytes {
			quiet = 0
		}
		last = allocated
		if quiet >= quietChecks && allocated-givenBack > max(burstBytes, live/10) {
			givenBack = allocated
			debug.FreeOSMemory() // collects first
			continue
		}
		want := int(minHeadroom * 100 / max(live, 1))
		want = min(max(want, largeHeapPercent), smallHeapPercent)
		// Setting it starts a collection, so small steps are left.
		if want*4 < now*3 || want*3 > now*4 {
			now = want
			debug.SetGCPercent(now)
		}
	}
}
