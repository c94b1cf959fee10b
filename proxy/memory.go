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
// a third of the default does. A small heap gets more than the default, or
// the collector would never rest.
const (
	largeHeapPercent = 30
	smallHeapPercent = 400
	minHeadroom      = 24 << 20 // bytes
	heapCheckEvery   = 2 * time.Second
)

// saveMemory fits the collector's headroom to the heap until ctx ends. The
// environment variable GOGC switches it off.
func saveMemory(ctx context.Context) {
	if os.Getenv("GOGC") != "" {
		return
	}
	now := smallHeapPercent
	before := debug.SetGCPercent(now)
	defer debug.SetGCPercent(before)
	live := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
	ticker := time.NewTicker(heapCheckEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return
		}
		metrics.Read(live)
		want := int(minHeadroom * 100 / max(live[0].Value.Uint64(), 1))
		want = min(max(want, largeHeapPercent), smallHeapPercent)
		// Setting it starts a collection, so small steps are left.
		if want*4 < now*3 || want*3 > now*4 {
			now = want
			debug.SetGCPercent(now)
		}
	}
}
