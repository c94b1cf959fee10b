package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/culvert-io/culvert/client/agent"
)

// agentsOptions is the command line of a process that plays many agents.
type agentsOptions struct {
	proxyURLs       []string
	caFile          string // of the proxies' certificates; "" for the system's
	number, targets int
	first           int // of their numbers
	body            size
}

// agentName and targetName are what an agent of agentsOptions and its targets are
// called.
func agentName(i int) string  { return fmt.Sprintf("agent-%d", i) }
func targetName(i int) string { return fmt.Sprintf("app-%d", i) }

func (o *agentsOptions) run(ctx context.Context) error {
	handler := serveBody(exposition(int(o.body)), false)
	config := new(tls.Config)
	if o.caFile != "" {
		pem, err := os.ReadFile(o.caFile)
		if err != nil {
			return err
		}
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(pem) {
			return fmt.Errorf("%s has no PEM certificate", o.caFile)
		}
	}
	var running sync.WaitGroup
	defer running.Wait()
	for i := o.first; i < o.first+o.number; i++ {
		cfg := agent.Config{
			Name:      agentName(i),
			ProxyURLs: o.proxyURLs,
			TLS:       config,
			Labels:    map[string]string{"env": "loadtest", "rack": strconv.Itoa(i % 40)},
			Logger:    slog.New(slog.DiscardHandler), // thousands would say the same
		}
		for t := range o.targets {
			cfg.Targets = append(cfg.Targets, agent.Target{Name: targetName(t), Handler: handler})
		}
		a, err := agent.New(cfg)
		if err != nil {
			return err
		}
		running.Go(func() { a.Run(ctx) })
		// A few hundred at once are more than enough to keep the proxy busy; more would
		// only be told to come back.
		select {
		case <-time.After(time.Millisecond):
		case <-ctx.Done():
			return nil
		}
	}
	<-ctx.Done()
	return nil
}

// startAgents starts a process with many agents and waits until the proxy has
// them all.
func (b *bench) startAgents(ctx context.Context, st *stage, proxy *proxyProcess, number, targets int, body size) (*process, error) {
	// Each has one connection, at both ends.
	if limit := fileLimit(); limit > 0 && number+1000 > limit {
		return nil, errMissing(fmt.Sprintf("%d agents take more than the %d open files that a process may have: use fewer --agents, or raise ulimit -n", number, limit))
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	args := []string{"agents", "--proxy-url=" + proxy.url, fmt.Sprintf("--agents=%d", number), fmt.Sprintf("--targets=%d", targets), "--body=" + body.String()}
	if st.cert != nil {
		args = append(args, "--tls.cacert="+st.cert.certFile)
	}
	p, err := st.start(fmt.Sprintf("%d agents", number), self, args...)
	if err != nil {
		return nil, err
	}
	return p, b.awaitConnected(ctx, proxy, number, p)
}

// awaitConnected waits until the proxy has so many agents. It gives up when there
// was none more for half a minute, and when one of the processes ends.
func (b *bench) awaitConnected(ctx context.Context, proxy *proxyProcess, want int, others ...*process) error {
	most, since := -1.0, time.Now()
	for {
		n, err := proxy.gauge(ctx, `culvert_proxy_agents{state="connected"}`)
		if err == nil && n >= float64(want) {
			return nil
		}
		if n > most {
			most, since = n, time.Now()
		}
		if time.Since(since) > 30*time.Second {
			return fmt.Errorf("%g of %d agents are connected, and no more come (%v)", max(most, 0), want, err)
		}
		for _, p := range append(others, proxy.process) {
			if p.ended() {
				return p.failure("has ended")
			}
		}
		b.progress.show("%g of %d agents are connected", max(most, 0), want)
		if err := pause(ctx, 50*time.Millisecond); err != nil {
			return err
		}
	}
}

// gauge returns the value of a series of a proxy's own metrics.
func (p *proxyProcess) gauge(ctx context.Context, series string) (float64, error) {
	text, err := p.get(ctx, "/metrics?only=self")
	if err != nil {
		return 0, err
	}
	for line := range strings.SplitSeq(string(text), "\n") {
		if value, ok := strings.CutPrefix(line, series+" "); ok {
			return strconv.ParseFloat(value, 64)
		}
	}
	return 0, errors.New("the proxy has no series " + series)
}

// pause waits, and returns an error when ctx ends before.
func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
