package agent

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

// warnEvery is how often what a stranger can bring about is logged as a warning.
const warnEvery = time.Minute

// rarely logs one line as a warning each minute, and the others for who debugs.
type rarely struct {
	logger func() *slog.Logger

	mu     sync.Mutex // protects what follows
	last   time.Time
	missed int // lines since then
}

func (r *rarely) log(message string, attrs ...any) {
	level := slog.LevelDebug
	r.mu.Lock()
	if now := time.Now(); now.Sub(r.last) >= warnEvery {
		level, r.last = slog.LevelWarn, now
		if r.missed > 0 {
			attrs = append(attrs, "and_before", r.missed)
		}
		r.missed = 0
	} else {
		r.missed++
	}
	r.mu.Unlock()
	r.logger().Log(context.Background(), level, message, attrs...)
}
