package cluster

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/culvert-io/culvert/proxy/fleet"
)

const (
	// askEvery is the time between two questions to another proxy whether it is there,
	// and how long it has to answer.
	askEvery = time.Second
	// silentAfter is the time without an answer after which a proxy counts as silent. A
	// busy one takes some time, and etcd tells of one that is gone only after the TTL.
	silentAfter = 2500 * time.Millisecond
)

// hearing is what this proxy hears of the others by itself. A proxy that is cut off
// refuses nothing: a scrape that is passed on to it would wait until its time is over.
type hearing struct {
	mu    sync.Mutex // protects peers, and their fields
	peers map[string]*peerHearing
}

type peerHearing struct {
	asking bool
	heard  time.Time
	// silence ends when the proxy has fallen silent; a new one begins when it is heard.
	silence context.Context
	fall    context.CancelFunc
}

var errSilent = errors.New("it does not answer, and another proxy holds the agent too")

// of returns what is heard of a proxy. It is called with mu held.
func (h *hearing) of(proxy string) *peerHearing {
	p := h.peers[proxy]
	if p == nil {
		p = &peerHearing{heard: time.Now()}
		p.silence, p.fall = context.WithCancel(context.Background())
		h.peers[proxy] = p
	}
	return p
}

// silent reports whether a proxy does not answer now.
func (c *Cluster) silent(proxy string) bool {
	c.hearing.mu.Lock()
	defer c.hearing.mu.Unlock()
	p := c.hearing.peers[proxy]
	return p != nil && p.silence.Err() != nil
}

// unlessSilent returns a context that ends with errSilent when the proxy falls silent, or
// is, while there is a better way, and a function to call once the proxy has answered.
func (c *Cluster) unlessSilent(ctx context.Context, proxy string, better func() bool) (context.Context, func()) {
	c.hearing.mu.Lock()
	silence := c.hearing.of(proxy).silence
	c.hearing.mu.Unlock()
	ctx, cancel := context.WithCancelCause(ctx) // ends with ctx: the answer's body needs it
	stop := context.AfterFunc(silence, func() {
		if better() {
			cancel(errSilent)
		}
	})
	return ctx, func() { stop() }
}

// listen asks the other proxies again and again whether they are there, until ctx ends.
func (c *Cluster) listen(ctx context.Context) {
	var asking sync.WaitGroup
	defer asking.Wait()
	tick := time.NewTicker(askEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		c.mu.Lock()
		known := make(map[string]bool, len(c.peers))
		for proxy := range c.peers {
			known[proxy] = true
		}
		c.mu.Unlock()
		c.hearing.mu.Lock()
		for proxy, p := range c.hearing.peers {
			if !known[proxy] && !p.asking {
				p.fall()
				delete(c.hearing.peers, proxy)
			}
		}
		for proxy := range known {
			p := c.hearing.of(proxy)
			if p.asking {
				continue
			}
			p.asking = true
			asking.Go(func() { c.ask(ctx, proxy, p) })
		}
		c.hearing.mu.Unlock()
	}
}

// ask asks a proxy once, of an agent that there is not: one that takes this proxy for one
// of its cluster answers.
func (c *Cluster) ask(ctx context.Context, proxy string, p *peerHearing) {
	askCtx, cancel := context.WithTimeout(ctx, askEvery)
	defer cancel()
	_, err := c.alive(askCtx, "", fleet.Held{Proxy: proxy})
	h := &c.hearing
	h.mu.Lock()
	defer h.mu.Unlock()
	p.asking = false
	switch now := time.Now(); {
	case err == nil:
		p.heard = now
		if p.silence.Err() != nil {
			c.logger.Info("Another proxy answers again", "proxy", proxy)
			p.silence, p.fall = context.WithCancel(context.Background())
		}
	case ctx.Err() == nil && p.silence.Err() == nil && now.Sub(p.heard) > silentAfter:
		c.logger.Warn("Another proxy does not answer; scrapes go through others where they can", "proxy", proxy, "err", err)
		p.fall()
	}
}
