package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/culvert-io/culvert/client/agent"
	"github.com/culvert-io/culvert/protocol"
)

// leave has every proxy forget this agent.
func leave(ctx context.Context, out io.Writer, flags *flags) error {
	a, err := newAgent(flags)
	if err != nil {
		return err
	}
	var failed []error
	for _, proxy := range a.ProxyURLs() {
		err := leaveProxy(ctx, a, proxy)
		if refusal, ok := protocol.AsRefusal(err); ok && refusal.Code == protocol.CodeUnregistered {
			fmt.Fprintf(out, "%s did not know %q\n", proxy.Redacted(), a.Name())
			continue
		}
		if protocol.NoTunnel(err) {
			if _, noPolls := a.ListedByPushProx(ctx, proxy); noPolls == nil {
				fmt.Fprintf(out, "%s is a pushprox-proxy; it forgets %q some minutes after its last poll\n", proxy.Redacted(), a.Name())
				continue
			}
		}
		if err != nil {
			failed = append(failed, fmt.Errorf("%s: %w", proxy.Redacted(), err))
			continue
		}
		fmt.Fprintf(out, "%s has forgotten %q\n", proxy.Redacted(), a.Name())
	}
	return errors.Join(failed...)
}

func leaveProxy(ctx context.Context, a *agent.Agent, proxy *agent.ProxyURL) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	session, err := a.Dial(ctx, proxy)
	if err != nil {
		return err
	}
	defer session.Close()
	return session.Leave(ctx)
}

// newAgent returns the agent that the flags describe, not running.
func newAgent(flags *flags) (*agent.Agent, error) {
	settings, err := flags.load()
	if err != nil {
		return nil, err
	}
	return agent.New(settings.Agent)
}
