package main

import (
	"context"
	"os"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

// The push store makes a large heap that hardly changes and has few pointers, so
// collecting it often costs little: less than half of the default headroom does. A small
// heap keeps the default, or the collector would never rest.
const (
	largeHeap        = 64 << 20 // bytes alive
	largeHeapPercent = 40
	heapCheckEvery   = 2 * time.Second
)

// saveMemory lowers the collector's headroom while the heap is large, until ctx
// ends. The environment variable GOGC switches it off.
func saveMemory(ctx context.Context) {
	if os.Getenv("GOGC") != "" {
		return
	}
	normal := debug.SetGCPercent(100)
	defer debug.SetGCPercent(normal)
	live := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
	ticker := time.NewTicker(heapCheckEvery)
	defer ticker.Stop()
	for now := 100; ; {
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return
		}
		metrics.Read(live)
		want := 100
		// A gap between the two bounds, so that it does not go to and fro.
		if bytes := live[0].Value.Uint64(); bytes > largeHeap || now != 100 && bytes > largeHeap/2 {
			want = largeHeapPercent
		}
		if want != now {
			now = want
			debug.SetGCPercent(now)
		}
	}
}
