package agent

import (
	"context"
	"errors"
	"math/rand/v2"
	"net/netip"
	"slices"
	"sort"
	"time"
)

const (
	// resolveEvery is the mean distance of look-ups of the proxies' names.
	resolveEvery = 30 * time.Second
	// resolveTimeout bounds one of them.
	resolveTimeout = 10 * time.Second
	// maxAddresses bounds what is taken of an answer.
	maxAddresses = 64
)

// linkKey names a link: of a proxy URL, and of an address where the URL stands for all
// addresses of its host.
type linkKey struct {
	url     string
	address netip.Addr
}

// resolveLoop looks the proxies' names up again and again, so that there is a link to
// each address of theirs, until ctx ends.
func (a *Agent) resolveLoop(ctx context.Context) {
	failures := map[string]string{}
	for {
		snap := a.current.Load()
		complete := true
		for _, u := range snap.proxies {
			host := u.Hostname()
			if !snap.ResolveAll || isAddress(host) {
				continue
			}
			lookupCtx, cancel := context.WithTimeout(ctx, resolveTimeout)
			found, err := snap.LookupHost(lookupCtx, host)
			cancel()
			if ctx.Err() != nil {
				return
			}
			if err == nil && len(found) == 0 {
				err = errors.New("the name has no address")
			}
			if err != nil {
				complete = false
				if failures[host] != err.Error() {
					failures[host] = err.Error()
					snap.Logger.Warn("A proxy's name can't be looked up; what is known of it stays", "host", host, "err", err)
				}
				continue
			}
			delete(failures, host)
			found = slices.Clone(found)
			for i := range found {
				found[i] = found[i].Unmap()
			}
			sort.Slice(found, func(i, j int) bool { return found[i].Less(found[j]) })
			found = slices.Compact(found)
			a.mu.Lock()
			a.resolved[host] = found[:min(len(found), maxAddresses)]
			a.mu.Unlock()
		}
		a.mu.Lock()
		if ctx.Err() == nil {
			a.startLinks()
		}
		a.mu.Unlock()
		wait := resolveEvery/2 + rand.N(resolveEvery)
		if !complete {
			wait = snap.RetryMaxWait/2 + rand.N(snap.RetryMaxWait)
		}
		select {
		case <-ctx.Done():
			return
		case <-a.resolveNow:
		case <-time.After(wait):
		}
	}
}

func isAddress(host string) bool {
	_, err := netip.ParseAddr(host)
	return err == nil
}

// wantedLinks returns the links that there should be. It is called with mu held.
func (a *Agent) wantedLinks() map[linkKey]*ProxyURL {
	snap := a.current.Load()
	wanted := map[linkKey]*ProxyURL{}
	for _, u := range snap.proxies {
		host := u.Hostname()
		if !snap.ResolveAll || isAddress(host) {
			wanted[linkKey{url: u.String()}] = u
			continue
		}
		for _, address := range a.resolved[host] {
			wanted[linkKey{u.String(), address}] = u
		}
		// An address that has left the name is of no more use for dialling; but a
		// session there goes on until the proxy ends it.
		for key, l := range a.links {
			if key.url == u.String() && key.address.IsValid() && l.connected.Load() {
				wanted[key] = u
			}
		}
	}
	return wanted
}

// linksOf returns the links of a proxy URL, in the order of their addresses. It is called
// with mu held.
func (a *Agent) linksOf(u *ProxyURL) []*link {
	var links []*link
	for key, l := range a.links {
		if key.url == u.String() {
			links = append(links, l)
		}
	}
	slices.SortFunc(links, func(a, b *link) int { return a.address.Compare(b.address) })
	return links
}
