package protocol

import (
	"errors"
	"fmt"
	"iter"
	"net"
	"strings"
)

// AgentTarget is the name of the target that every agent has: itself.
const AgentTarget = "agent"

// NormalizeName lower-cases a host name and drops one trailing dot. Names are
// compared in this form only.
func NormalizeName(name string) string {
	return strings.TrimSuffix(strings.ToLower(name), ".")
}

// CheckName reports why name, in its normal form, can't be the name of an agent
// or a host. It takes what DNS takes (RFC 1123, with underscores): labels of
// letters, digits, "-" and "_", 1 to 63 bytes each, 253 bytes in all.
func CheckName(name string) error {
	if name == "" {
		return errors.New("the name is empty")
	}
	if len(name) > 253 {
		return fmt.Errorf("the name has %d bytes; at most 253 are allowed", len(name))
	}
	for label := range strings.SplitSeq(name, ".") {
		if err := checkLabel(label); err != nil {
			return fmt.Errorf("name %q: %w", name, err)
		}
	}
	return nil
}

// CheckTargetName reports why name can't be the name of a target: it has to be
// one DNS label, not all digits, and not "agent".
func CheckTargetName(name string) error {
	if err := checkLabel(name); err != nil {
		return fmt.Errorf("target name %q: %w", name, err)
	}
	if strings.Trim(name, "0123456789") == "" {
		return fmt.Errorf("target name %q: all digits would read as a port; add a letter", name)
	}
	if name == AgentTarget {
		return fmt.Errorf("target name %q is taken: it is the agent itself; choose another", name)
	}
	return nil
}

func checkLabel(label string) error {
	if label == "" || len(label) > 63 {
		return errors.New("each part between dots needs 1 to 63 characters")
	}
	for _, c := range []byte(label) {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' && c != '_' {
			return fmt.Errorf("character %q is not allowed; use a-z, 0-9, \"-\", \"_\" (international names in their xn-- form)", c)
		}
	}
	if label[0] == '-' || label[len(label)-1] == '-' {
		return errors.New(`a part can't start or end with "-"`)
	}
	return nil
}

// CheckHost reports why host, in its normal form, can't be a host that an agent
// answers for: a name, or "*." and a name, where "*" is one or more labels.
func CheckHost(host string) error {
	if host == "*" {
		return errors.New(`host "*": add a domain, as in "*.example.net"`)
	}
	name := strings.TrimPrefix(host, "*.")
	if err := CheckName(name); err != nil {
		return fmt.Errorf("host %q: %w", host, err)
	}
	return nil
}

// WildcardSuffix returns ".example.net" for "*.example.net", and false for a
// host that is no wildcard.
func WildcardSuffix(host string) (string, bool) {
	if strings.HasPrefix(host, "*.") {
		return host[1:], true
	}
	return "", false
}

// Suffixes returns ".example.net", ".net" for "web-1.example.net": what wildcards
// are compared with, the longest first.
func Suffixes(name string) iter.Seq[string] {
	return func(yield func(string) bool) {
		for i := 1; i < len(name); i++ {
			if name[i] == '.' && !yield(name[i:]) {
				return
			}
		}
	}
}

// SplitTarget cuts TARGET.AGENT at its first dot.
func SplitTarget(name string) (target, agent string, ok bool) {
	return strings.Cut(name, ".")
}

// SplitAuthority splits "host:port", "host", "[v6]:port" or "[v6]" into the
// normal form of the host and the port, "" where there is none.
func SplitAuthority(authority string) (name, port string) {
	if host, p, err := net.SplitHostPort(authority); err == nil {
		return NormalizeName(host), p
	}
	return NormalizeName(strings.Trim(authority, "[]")), ""
}
