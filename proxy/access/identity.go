package access

import (
	"crypto/x509"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/culvert-io/culvert/protocol"
)

// Identity is whom the proxy takes a request or a session for: the entries of the
// roles whose credentials it showed. It asks the clock each time, so that an entry
// that expires ends at once.
type Identity struct {
	open    bool
	roles   *Roles // that know the entries
	entries []*entry
	// What was shown, for Renew.
	proofs []proof
	names  []string // of the certificate
}

// Anybody is who comes while everything is open.
var Anybody = &Identity{open: true}

// any reports whether an entry that has not expired takes it.
func (id *Identity) any(take func(*entry) bool) bool {
	if id.open {
		return true
	}
	now := time.Now()
	return slices.ContainsFunc(id.entries, func(e *entry) bool {
		return !e.expired(now) && (e.role == roleOperator || take(e))
	})
}

// Operator reports whether it may do everything.
func (id *Identity) Operator() bool { return id.any(func(*entry) bool { return false }) }

// Scraper reports whether it may read discovery and /metrics.
func (id *Identity) Scraper() bool {
	return id.any(func(e *entry) bool { return e.role == roleScraper })
}

// MayScrape reports whether it may scrape what an agent answers for, and see the
// agent in discovery.
func (id *Identity) MayScrape(agent string) bool {
	return id.any(func(e *entry) bool { return e.role == roleScraper && (e.anyAgent || e.agents.cover(agent)) })
}

// MayScrapeAll reports whether it may scrape every agent.
func (id *Identity) MayScrapeAll() bool {
	return id.any(func(e *entry) bool { return e.role == roleScraper && e.anyAgent })
}

// Pusher reports whether it may push for some job.
func (id *Identity) Pusher() bool {
	return id.any(func(e *entry) bool { return e.role == rolePusher })
}

// MayPush reports whether it may push and delete groups of a job.
func (id *Identity) MayPush(job string) bool {
	return id.any(func(e *entry) bool { return e.role == rolePusher && e.jobs.match(job) })
}

// Agent reports whether it may be an agent of some name.
func (id *Identity) Agent() bool {
	return id.any(func(e *entry) bool { return e.role == roleAgent })
}

// MayBe reports whether it may be the agent of a name.
func (id *Identity) MayBe(agent string) bool {
	return id.any(func(e *entry) bool { return id.isAgent(e, agent) })
}

func (id *Identity) isAgent(e *entry, name string) bool {
	if e.role != roleAgent {
		return false
	}
	return e.agents.cover(name) || e.ownName && slices.Contains(id.names, name)
}

// MayBeWithoutKey is MayBe for an agent that shows no key of its own.
func (id *Identity) MayBeWithoutKey(agent string) bool {
	return id.any(func(e *entry) bool { return id.isAgent(e, agent) && !e.requireKey })
}

// MayAnswerFor reports whether the agent may answer for a host, or a wildcard.
func (id *Identity) MayAnswerFor(agent, host string) bool {
	return id.any(func(e *entry) bool { return id.isAgent(e, agent) && e.hosts.coverHost(host) })
}

// MayRelay reports whether the agent may relay pushes for a job.
func (id *Identity) MayRelay(agent, job string) bool {
	return id.any(func(e *entry) bool { return id.isAgent(e, agent) && e.jobs.match(job) })
}

// Empty reports whether all its entries have expired.
func (id *Identity) Empty() bool { return !id.any(func(*entry) bool { return true }) }

// String tells for logs who it is.
func (id *Identity) String() string {
	if id.open {
		return "anybody"
	}
	var names []string
	for _, e := range id.entries {
		names = append(names, e.String())
	}
	return strings.Join(names, ", ")
}

// Expired reports whether one of its entries has expired.
func (id *Identity) Expired() bool {
	now := time.Now()
	return slices.ContainsFunc(id.entries, func(e *entry) bool { return e.expired(now) })
}

// Renew returns the identity that the same credentials have in these roles: id itself
// where it is of these.
func (r *Roles) Renew(id *Identity) *Identity {
	if r.Open() {
		return Anybody
	}
	if id.roles == r {
		return id
	}
	renewed := &Identity{roles: r, proofs: id.proofs, names: id.names, entries: r.byNames(id.names)}
	for _, p := range id.proofs {
		for _, e := range r.proofs[p] {
			if !slices.Contains(renewed.entries, e) {
				renewed.entries = append(renewed.entries, e)
			}
		}
	}
	return renewed
}

// CheckRegistration returns a *protocol.Refusal where the registration of an agent
// claims what its credentials don't cover.
func (r *Roles) CheckRegistration(id *Identity, agent string, reg *protocol.Registration) error {
	if r.Open() {
		return nil
	}
	forbidden := func(format string, args ...any) error {
		return protocol.Refusef(403, protocol.CodeForbidden, "registration of %q: %s", agent, fmt.Sprintf(format, args...))
	}
	if !id.MayBe(agent) {
		return forbidden("the credential (%s) does not cover this name; see agents: there", id)
	}
	for _, host := range reg.Hosts {
		if !id.MayAnswerFor(agent, host) {
			return forbidden("the host %q is not among what the credential (%s) may answer for; see hosts: there", host, id)
		}
	}
	for _, t := range reg.Targets {
		// An agent "example.net" with a target "web-1" would pass for the agent
		// "web-1.example.net" of somebody else, who may not be here yet. What covers
		// the agent's own name too is no claim to the names below it: it would make
		// *.example.net a claim to every target there.
		full := t.Name + "." + agent
		if id.MayBe(full) {
			continue
		}
		for _, e := range slices.Concat(r.exact[full], r.wild) {
			if e.agents.cover(full) && !e.agents.cover(agent) {
				return forbidden("the target %q would have the name %q, which belongs to an agent of %s; choose another name for it", t.Name, full, e)
			}
		}
	}
	return nil
}

// byNames returns the entries that a certificate of these names stands for.
func (r *Roles) byNames(names []string) []*entry {
	if len(names) == 0 {
		return nil
	}
	var entries []*entry
	for _, e := range r.entries {
		if slices.ContainsFunc(names, e.certs.cover) {
			entries = append(entries, e)
		}
	}
	return entries
}

// certNames returns the common name and the DNS names of a certificate.
func certNames(cert *x509.Certificate) []string {
	var names []string
	for _, name := range append([]string{cert.Subject.CommonName}, cert.DNSNames...) {
		if name = protocol.NormalizeName(name); name != "" && !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	return names
}
