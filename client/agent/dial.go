package agent

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/culvert-io/culvert/protocol"
)

// guard makes the agent's connections to targets, all of them. Whoever answers for a name
// in DNS chooses where the name leads; the guard looks at the very address that is about
// to be connected to, and refuses those that hand out credentials, are this host, or are
// no host's. An address that the operator wrote down is not looked at.
type guard struct {
	agent   string
	allowed []netip.Prefix  // --scrape.allow-address
	own     map[string]bool // names of this host, which may lead to loopback
	warn    *rarely
}

func newGuard(s *snapshot) *guard {
	g := &guard{agent: s.name, allowed: s.AllowAddresses, own: map[string]bool{"localhost": true, s.name: true}, warn: &s.agent.refusedAddress}
	if _, err := netip.ParseAddr(s.LocalHost); err != nil {
		g.own[protocol.NormalizeName(s.LocalHost)] = true
	}
	// Debian's /etc/hosts has the host's name at 127.0.1.1.
	if name, err := os.Hostname(); err == nil {
		g.own[protocol.NormalizeName(name)] = true
	}
	return g
}

// dialTimeout bounds a connection attempt. The scrape's own timeout is often shorter.
const dialTimeout = 30 * time.Second

// dial connects to host and port. literal says that the operator wrote host down, so
// that it is to be reached whatever it is, if it is an address. What is refused comes as
// a *protocol.Refusal in the error's chain.
func (g *guard) dial(ctx context.Context, network, host, port string, literal bool) (net.Conn, error) {
	dialer := net.Dialer{Timeout: dialTimeout}
	if _, err := netip.ParseAddr(host); err != nil || !literal {
		dialer.ControlContext = func(_ context.Context, _, address string, _ syscall.RawConn) error {
			// It is called for each address that the name has, until one connects.
			return g.check(host, address)
		}
	}
	return dialer.DialContext(ctx, network, net.JoinHostPort(host, port))
}

// check returns the refusal of an address, with a port, that host has led to.
func (g *guard) check(host, address string) error {
	to, err := netip.ParseAddrPort(address)
	if err != nil {
		return fmt.Errorf("address %q: %w", address, err)
	}
	name := protocol.NormalizeName(host)
	own := g.own[name] || strings.HasSuffix(name, ".localhost") // RFC 6761, section 6.3
	what := forbidden(to.Addr(), own, g.allowed)
	if what == "" {
		return nil
	}
	plain := to.Addr().Unmap().WithZone("")
	g.warn.log("A name leads where the agent does not go", "name", host, "address", plain, "is", what)
	return protocol.Refusef(http.StatusForbidden, protocol.CodeNotAllowed,
		"agent %q does not connect to %q: the name leads to %s, %s; if it should, start the agent with --scrape.allow-address=%s", g.agent, host, plain, what, plain)
}

// closed are the addresses that no name may lead to.
var closed = []struct {
	prefix netip.Prefix
	what   string
}{
	// AWS, Google, Azure, OpenStack and most others serve an instance's credentials at
	// 169.254.169.254, and AWS those of containers at 169.254.170.2; OpenStack at
	// fe80::a9fe:a9fe too.
	{netip.MustParsePrefix("169.254.0.0/16"), "a link-local address, where clouds hand out credentials"},
	{netip.MustParsePrefix("fe80::/10"), "a link-local address, where clouds hand out credentials"},
	{netip.MustParsePrefix("fd00:ec2::/32"), "where AWS hands out credentials"},
	{netip.MustParsePrefix("fd20:ce::254/128"), "where Google Cloud hands out credentials"},
	{netip.MustParsePrefix("fd00:a9fe:a9fe::1/128"), "where Linode hands out metadata"},
	{netip.MustParsePrefix("fd00:42::42/128"), "where Scaleway hands out metadata"},
	{netip.MustParsePrefix("100.100.100.200/32"), "where Alibaba Cloud hands out credentials"},
	{netip.MustParsePrefix("192.0.0.192/32"), "where Oracle Cloud hands out metadata"},
	{netip.MustParsePrefix("168.63.129.16/32"), "where Azure hands out certificates and settings"},
	{netip.MustParsePrefix("0.0.0.0/8"), "no host's address"}, // connects to this host
	{netip.MustParsePrefix("::/128"), "no host's address"},
	{netip.MustParsePrefix("224.0.0.0/4"), "a multicast address"},
	{netip.MustParsePrefix("ff00::/8"), "a multicast address"},
	{netip.MustParsePrefix("255.255.255.255/32"), "a broadcast address"},
}

// loopback is closed to the names of other hosts: who may scrape those need not be who
// may scrape this host, and what listens there often trusts whoever connects.
var loopback = []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("::1/128")}

// forbidden says what is wrong with the address, "" where nothing is. own says that it
// was reached by a name of this host.
func forbidden(address netip.Addr, own bool, allowed []netip.Prefix) string {
	// A prefix contains no address with a zone.
	address = address.Unmap().WithZone("")
	in := func(prefixes []netip.Prefix, a netip.Addr) bool {
		for _, prefix := range prefixes {
			if prefix.Contains(a) {
				return true
			}
		}
		return false
	}
	if in(allowed, address) {
		return ""
	}
	for i, a := range append([]netip.Addr{address}, embedded(address)...) {
		if i > 0 && in(allowed, a) {
			continue
		}
		what := ""
		for _, c := range closed {
			if c.prefix.Contains(a) {
				what = c.what
			}
		}
		if !own && in(loopback, a) {
			what = "this host's own loopback"
		}
		if what != "" {
			if i > 0 {
				what = fmt.Sprintf("which stands for %s, %s", a, what)
			}
			return what
		}
	}
	return ""
}

// embedded returns the IPv4 addresses that an IPv6 address may be translated or
// tunnelled to: IPv4-compatible (RFC 4291, 2.5.5.1), NAT64 (RFC 6052, RFC 8215), 6to4
// (RFC 3056). A NAT64 prefix of a network's own can't be told from any other.
func embedded(a netip.Addr) []netip.Addr {
	if !a.Is6() {
		return nil
	}
	b := a.As16()
	at := func(i, j, k, l int) netip.Addr { return netip.AddrFrom4([4]byte{b[i], b[j], b[k], b[l]}) }
	switch {
	case compatible.Contains(a):
		if last := at(12, 13, 14, 15); b[12] != 0 { // :: and ::1 are themselves
			return []netip.Addr{last}
		}
	case nat64.Contains(a):
		return []netip.Addr{at(12, 13, 14, 15)}
	case sixToFour.Contains(a):
		return []netip.Addr{at(2, 3, 4, 5)}
	case nat64Local.Contains(a):
		// Which of its lengths the prefix has is the network's choice. In the wrong ones
		// the address begins with zeros.
		var found []netip.Addr
		for _, v4 := range []netip.Addr{at(12, 13, 14, 15), at(9, 10, 11, 12), at(7, 9, 10, 11), at(6, 7, 9, 10)} {
			if v4.As4()[0] != 0 {
				found = append(found, v4)
			}
		}
		return found
	}
	return nil
}

var (
	compatible = netip.MustParsePrefix("::/96")
	nat64      = netip.MustParsePrefix("64:ff9b::/96")
	nat64Local = netip.MustParsePrefix("64:ff9b:1::/48")
	sixToFour  = netip.MustParsePrefix("2002::/16")
)

// ParseAddresses reads an address, or a network as in 169.254.0.0/16, for
// Config.AllowAddresses.
func ParseAddresses(s string) (netip.Prefix, error) {
	prefix, err := netip.ParsePrefix(s)
	if err != nil {
		address, err := netip.ParseAddr(s)
		if err != nil || address.Zone() != "" {
			return netip.Prefix{}, fmt.Errorf("%q is no address or network; write it as in 169.254.7.7 or 169.254.0.0/16", s)
		}
		prefix = netip.PrefixFrom(address, address.BitLen())
	}
	if prefix.Addr().Is4In6() {
		return netip.Prefix{}, fmt.Errorf("%q is IPv4 in IPv6; write the IPv4 address or network", s)
	}
	return prefix.Masked(), nil
}
