package main

import "context"

// scenario is something to measure.
type scenario struct {
	name, about string
	run         func(ctx context.Context, b *bench, st *stage, found *result) error
}

// latencyScenario is the one that --svg plots.
const latencyScenario = "latency"

var scenarios = []scenario{
	{"100kB-64", "100 kB bodies, 64 scrapers, one agent", scrapes(100_000, 64)},
	{"100kB-1", "100 kB bodies, one scraper", scrapes(100_000, 1)},
	{"5MB-4", "5 MB bodies, 4 scrapers", scrapes(5_000_000, 4)},
	{"1kB-64", "1 kB bodies, 64 scrapers", scrapes(1_000, 64)},
	{latencyScenario, "latency against load: 100 kB bodies, 1 to 64 scrapers", latency},
	{"idle-agents", "--agents that nobody scrapes: the proxy's memory", idleAgents},
	{"many-agents", "--agents with 20 kB each, 32 scrapers, beside one agent with the same body", manyAgents},
	{"restart", "the proxy restarts under --agents, each scraped every 15 s", restart},
	{"discovery", "/targets of --agents with 3 targets each", discovery},
	{"push", "8 pushers of 50 series each, beside the Pushgateway where it is installed", push},
	{"slow-link", "5 MB bodies over a link with 100 ms round trip, beside a direct scrape over it", slowLink},
	{"mixed", "1 kB scrapes beside 50 MB scrapes of the same agent, over 100 Mbit/s with 20 ms round trip", mixed},
}

// scrapes returns a scenario that scrapes one exporter over all ways.
func scrapes(body size, scrapers int) func(context.Context, *bench, *stage, *result) error {
	return func(ctx context.Context, b *bench, st *stage, found *result) error {
		subjects, err := b.ways(ctx, st, b.Body.or(body))
		if err != nil {
			return err
		}
		return b.compare(ctx, found, subjects, b.scrapers(scrapers))
	}
}

// scrapers returns how many there are, where the scenario has so many of itself.
func (b *bench) scrapers(n int) int {
	if b.Scrapers > 0 {
		return b.Scrapers
	}
	return n
}

// latency scrapes one exporter with ever more scrapers, up to those of the command
// line or 64.
func latency(ctx context.Context, b *bench, st *stage, found *result) error {
	subjects, err := b.ways(ctx, st, b.Body.or(100_000))
	if err != nil {
		return err
	}
	for n := 1; n <= b.scrapers(64); n *= 2 {
		samples, err := b.alternate(ctx, subjects, n)
		if err != nil {
			return err
		}
		for i, s := range subjects {
			found.Rows = append(found.Rows, newRow(s, n, samples[i]))
		}
	}
	return nil
}

// ours returns an error where a scenario needs a proxy of its own, and a running
// one was named.
func (b *bench) ours() error {
	if b.ProxyURL != "" {
		return errMissing("it starts its own proxy, and --proxy-url names one")
	}
	return nil
}
