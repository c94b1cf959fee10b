package main

import (
	"context"
	"fmt"
	"net"
	"net/url"
	"time"
)

// Scenarios over a slow link: scrapers and proxy are on this side of it, agent and
// exporter in a network namespace on the other.

// linkConfig says what a link is like.
type linkConfig struct {
	roundTrip time.Duration
	rate      int // bits per second in each direction; 0: as fast as it goes
}

// packetSize is the size of a full packet, in bytes.
const packetSize = 1500

// queue returns how many packets a direction of the link holds: those on their way,
// and a buffer of one bandwidth-delay product, the rule of thumb for routers (RFC
// 3439, section 3). A longer one would let a single sender add seconds of delay.
func (c linkConfig) queue() int {
	if c.rate == 0 {
		return 100_000
	}
	product := float64(c.rate) / 8 * c.roundTrip.Seconds() / packetSize
	return int(1.5 * product)
}

// link is a link to a network namespace.
type link struct {
	near, far string   // IP addresses
	enter     []string // runs a program on the far side
	kind      string   // what makes the delay
}

// linkWays starts proxy, agent and exporter with the link between, and returns the
// ways to what the exporter serves under a path: directly over the link, and by
// Culvert.
func (b *bench) linkWays(ctx context.Context, st *stage, config linkConfig, found *result, bodies map[string]size) (map[string][]*subject, error) {
	if err := b.ours(); err != nil {
		return nil, err
	}
	if b.TLS {
		return nil, errMissing("--tls is not for links: the scrape over the link that it is compared with has none")
	}
	l, err := newLink(st, config)
	if err != nil {
		return nil, err
	}
	found.About += " (" + l.kind + ")"
	exporter, err := l.startExporter(ctx, st, bodies["/metrics"], bodies["/large"])
	if err != nil {
		return nil, err
	}
	_, port, _ := net.SplitHostPort(exporter)
	proxy, err := b.startProxy(ctx, st, net.JoinHostPort(l.near, "0"), "--storage.path=")
	if err != nil {
		return nil, err
	}
	agent, err := b.startClient(ctx, st, l.enter, clientArgs(proxy.url, port, "--scrape.local-host="+l.far))
	if err != nil {
		return nil, err
	}
	ways := map[string][]*subject{}
	for path, body := range bodies {
		direct, err := newScrape(st, "direct", "", nil, body, always((&url.URL{Scheme: "http", Host: exporter, Path: path}).String()))
		if err != nil {
			return nil, err
		}
		culvert, err := newScrape(st, "culvert", proxy.url, nil, body, always("http://web-1:"+port+path))
		if err != nil {
			return nil, err
		}
		culvert.proxy, culvert.agent = proxy.process, agent
		ways[path] = []*subject{direct, culvert}
	}
	return ways, nil
}

func slowLink(ctx context.Context, b *bench, st *stage, found *result) error {
	ways, err := b.linkWays(ctx, st, linkConfig{roundTrip: 100 * time.Millisecond}, found,
		map[string]size{"/metrics": b.Body.or(5_000_000), "/large": 1000})
	if err != nil {
		return err
	}
	return b.compare(ctx, found, ways["/metrics"], b.scrapers(1))
}

// mixed measures small scrapes alone and beside a large one that never ends, by
// Culvert and directly. Directly they have connections of their own and share the
// link's queue only.
func mixed(ctx context.Context, b *bench, st *stage, found *result) error {
	ways, err := b.linkWays(ctx, st, linkConfig{roundTrip: 20 * time.Millisecond, rate: 100_000_000}, found,
		map[string]size{"/metrics": b.Body.or(1000), "/large": 50_000_000})
	if err != nil {
		return err
	}
	clients := b.scrapers(4)
	alone, beside := make([][]sample, 2), make([][]sample, 2)
	for round := range b.Rounds {
		for i, small := range ways["/metrics"] {
			b.progress.show("round %d of %d: %s, alone", round+1, b.Rounds, small.name)
			found, err := measure(ctx, small, clients, b.Duration)
			if err != nil {
				return err
			}
			alone[i] = append(alone[i], found)

			b.progress.show("round %d of %d: %s, beside 50 MB", round+1, b.Rounds, small.name)
			found, err = measureBeside(ctx, small, ways["/large"][i], clients, b.Duration)
			if err != nil {
				return err
			}
			beside[i] = append(beside[i], found)
		}
	}
	for i, small := range ways["/metrics"] {
		for _, part := range []struct {
			name    string
			samples []sample
		}{{" alone", alone[i]}, {" beside 50 MB", beside[i]}} {
			r := newRow(small, clients, part.samples)
			r.Subject += part.name
			found.Rows = append(found.Rows, r)
		}
		found.Ratios = append(found.Ratios, newRatio(small.name+" beside 50 MB", "alone", beside[i], alone[i]))
	}
	return nil
}

// measureBeside measures the small one while the large one is scraped without end.
func measureBeside(ctx context.Context, small, large *subject, clients int, duration time.Duration) (sample, error) {
	busy, stop := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() {
		buf := make([]byte, 64<<10)
		for {
			if _, err := large.do(busy, 0, buf); err != nil {
				ended <- err
				return
			}
		}
	}()
	// It has to have the link filled.
	err := pause(ctx, time.Second)
	var found sample
	if err == nil {
		found, err = measure(ctx, small, clients, duration)
	}
	select {
	case largeErr := <-ended:
		stop()
		return found, fmt.Errorf("%s: the large scrape ended: %w", large.name, largeErr)
	default:
	}
	stop()
	<-ended
	return found, err
}
