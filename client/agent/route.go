package agent

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/culvert-io/culvert/protocol"
)

// ParsePortRange reads PORT, PORT-PORT or "all".
func ParsePortRange(s string) (PortRange, error) {
	if s == "all" {
		return PortRange{1, 65535}, nil
	}
	first, last, isRange := strings.Cut(s, "-")
	if !isRange {
		last = first
	}
	a, errA := strconv.ParseUint(strings.TrimSpace(first), 10, 16)
	b, errB := strconv.ParseUint(strings.TrimSpace(last), 10, 16)
	if errA != nil || errB != nil || a == 0 || a > b {
		return PortRange{}, fmt.Errorf("port range %q: use PORT, PORT-PORT or \"all\", with ports from 1 to 65535", s)
	}
	return PortRange{uint16(a), uint16(b)}, nil
}

// ParseTarget reads NAME=URL.
func ParseTarget(s string) (Target, error) {
	name, u, ok := strings.Cut(s, "=")
	if !ok {
		return Target{}, fmt.Errorf("target %q: use NAME=URL, as in node=http://localhost:9100/metrics", s)
	}
	return Target{Name: name, URL: u}, nil
}

// ParseHost reads NAME or NAME=ADDRESS.
func ParseHost(s string) Host {
	name, address, _ := strings.Cut(s, "=")
	return Host{Name: name, Address: address}
}

// addRoutes fills in what the snapshot answers for.
func (s *snapshot) addRoutes() error {
	s.guard = newGuard(s)
	s.targets = map[string]*target{}
	for i := range s.Config.Targets {
		t, err := newTarget(s.Config.Targets[i], s.guard)
		if err != nil {
			return fmt.Errorf("target %q: %w", s.Config.Targets[i].Name, err)
		}
		s.targets[t.declared.Name] = t
		s.registration.Targets = append(s.registration.Targets, t.declared)
	}
	s.hosts, s.wildcards = map[string]place{}, map[string]place{}
	for _, h := range s.Config.Hosts {
		name := protocol.NormalizeName(h.Name)
		if strings.Contains(h.Address, "/") {
			return fmt.Errorf("host %q: address %q: use a host name or an IP address", name, h.Address)
		}
		if _, _, err := net.SplitHostPort(h.Address); err == nil {
			return fmt.Errorf("host %q: address %q has a port; the port is the scraper's choice, within --allow", name, h.Address)
		}
		address := strings.Trim(h.Address, "[]")
		if suffix, ok := protocol.WildcardSuffix(name); ok {
			s.wildcards[suffix] = place{address, address != ""}
		} else {
			s.hosts[name] = place{cmp.Or(address, name), true}
		}
		s.registration.Hosts = append(s.registration.Hosts, name)
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	if s.TLS != nil {
		config = s.TLS.Clone()
	}
	s.ports = &http.Transport{
		// No Proxy: what the environment says is for the way out, not for the
		// exporter next door.
		DialContext:         s.dialPort,
		TLSClientConfig:     config,
		TLSHandshakeTimeout: 10 * time.Second,
		DisableCompression:  true,
		// As many as the proxy lets run at once: with fewer it dials again and again.
		MaxIdleConnsPerHost: 64,
		MaxIdleConns:        512,
		IdleConnTimeout:     5 * time.Minute,
		ReadBufferSize:      16 << 10,
		// More is refused below; a response with less may end in good order.
		MaxResponseHeaderBytes: maxTargetHead,
	}
	return nil
}

// place is where a name is to be reached.
type place struct {
	host    string // "" for a wildcard: the name itself
	literal bool   // the operator wrote host down, and not the scraper
}

// address returns where a name of the own host, or of a host that the agent
// answers for, is to be reached.
func (s *snapshot) address(name string) (to place, ok bool) {
	if name == s.name {
		return place{s.LocalHost, true}, true
	}
	if to, ok := s.hosts[name]; ok {
		return to, true
	}
	for suffix := range protocol.Suffixes(name) {
		if to, ok := s.wildcards[suffix]; ok {
			to.host = cmp.Or(to.host, name)
			return to, true
		}
	}
	return place{}, false
}

// dialPort connects to the port of a name that the agent answers for.
func (s *snapshot) dialPort(ctx context.Context, network, addr string) (net.Conn, error) {
	name, port := protocol.SplitAuthority(addr)
	to, ok := s.address(name)
	if !ok {
		return nil, fmt.Errorf("no address for %q", name)
	}
	return s.guard.dial(ctx, network, to.host, port, to.literal)
}

// named returns the target that name stands for: TARGET.NAME. An exact host wins
// over it, a wildcard doesn't.
func (s *snapshot) named(name string) (target string, ok bool) {
	if _, exact := s.hosts[name]; exact {
		return "", false
	}
	target, agent, ok := protocol.SplitTarget(name)
	if !ok || agent != s.name {
		return "", false
	}
	if _, declared := s.targets[target]; !declared && target != protocol.AgentTarget {
		return "", false
	}
	return target, true
}

// allowed returns the refusal for a port that no --allow names.
func (s *snapshot) allowed(name, port string) *protocol.Refusal {
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 {
		return protocol.Refusef(http.StatusBadRequest, protocol.CodeBadRequest, "agent %q: port %q of %q is not a number from 1 to 65535", s.name, port, name)
	}
	for _, r := range s.Allow {
		if uint16(n) >= r.First && uint16(n) <= r.Last {
			return nil
		}
	}
	s.agent.refusedPort.log("A scrape was refused: no --allow names its port", "name", name, "port", n,
		"hint", fmt.Sprintf("start the agent with --allow=%d; --allow=all opens every port, as PushProx's client does", n))
	return protocol.Refusef(http.StatusForbidden, protocol.CodeNotAllowed,
		"agent %q does not allow port %d of %q; start it with --allow=%d, or name the exporter with --target=NAME=URL", s.name, n, name, n)
}

// mismatch is the refusal for a name that the agent doesn't answer for.
func (s *snapshot) mismatch(name string) *protocol.Refusal {
	if target, agent, ok := protocol.SplitTarget(name); ok && agent == s.name {
		return protocol.Refusef(http.StatusForbidden, protocol.CodeNotAllowed,
			"agent %q has no target %q; declare it with --target=%s=URL", s.name, target, target)
	}
	return protocol.Refusef(http.StatusMisdirectedRequest, protocol.CodeMismatch,
		"agent %q does not answer for %q; add --host=%s if it should", s.name, name, name)
}

// unreachable is the refusal for a target that could not be connected to.
func (s *snapshot) unreachable(what string, err error) *protocol.Refusal {
	var op *net.OpError
	if errors.As(err, &op) && op.Op == "dial" && op.Addr != nil {
		return protocol.Refusef(http.StatusBadGateway, protocol.CodeTargetUnreachable,
			"agent %q can't connect to %s at %s: %v; is the exporter running there?", s.name, what, op.Addr, op.Err)
	}
	return protocol.Refusef(http.StatusBadGateway, protocol.CodeTargetUnreachable,
		"agent %q can't scrape %s: %v", s.name, what, err)
}
