package protocol

import (
	"fmt"
	"net/url"
	"runtime/debug"
	"strings"
	"unicode/utf8"

	"github.com/prometheus/common/model"
	"github.com/prometheus/common/version"
)

// Registration is what an agent says of itself: the body of
// PUT /v1/registration, in JSON. Fields that the reader doesn't know are
// ignored. The agent's name is not in it: the upgrade fixed it.
type Registration struct {
	// Version is the program's version, for people.
	Version string `json:"version,omitempty"`
	// Capabilities names what the agent can do beyond version 1. Unknown ones
	// are ignored.
	Capabilities []string `json:"capabilities,omitempty"`
	// Targets are the named targets, at most MaxTargets. The target "agent" is
	// not among them: every agent has it.
	Targets []Target `json:"targets,omitempty"`
	// Hosts are other hosts that the agent answers for, at most MaxHosts: names
	// or "*." and a name.
	Hosts []string `json:"hosts,omitempty"`
	// Labels describe the agent in discovery, at most MaxLabels.
	Labels map[string]string `json:"labels,omitempty"`
}

// BuildVersion returns the version of the running program: what the linker was
// told, else the version of the main module, "(devel)" in a working tree.
func BuildVersion() string {
	if version.Version != "" {
		return version.Version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(devel)"
}

// Target is a named target as discovery needs it. Where it is and how it is
// reached stays with the agent.
type Target struct {
	// Name is one DNS label; TARGET.AGENT routes to it.
	Name string `json:"name"`
	// Path is the declared path, starting with "/". A path that ends in "/*"
	// opens what is below it.
	Path string `json:"path"`
	// Params are the declared query parameters.
	Params map[string][]string `json:"params,omitempty"`
	// Labels are added to the agent's, and win over them.
	Labels map[string]string `json:"labels,omitempty"`
}

// ScrapePath returns the path that discovery lists: the declared one, without
// the "*" of a prefix.
func (t Target) ScrapePath() string {
	if prefix, ok := strings.CutSuffix(t.Path, "/*"); ok {
		return prefix + "/"
	}
	return t.Path
}

// Allows reports whether a request for path stays within the declared path. It
// takes the path as it stands in the request, escaped. Within a prefix it refuses
// what the target, or something in front of it, may read as a step out: dot
// segments and slashes, whatever their encoding, path parameters included.
func (t Target) Allows(path string) bool {
	if !strings.HasSuffix(t.Path, "/*") {
		// What is asked for is the declared path then, however this one is escaped.
		return path == t.Path || unescaped(path) == unescaped(t.Path)
	}
	rest, ok := strings.CutPrefix(path, t.ScrapePath())
	if !ok {
		return false
	}
	for segment := range strings.SplitSeq(rest, "/") {
		if !harmless(segment) {
			return false
		}
	}
	return true
}

func unescaped(path string) string {
	if plain, err := url.PathUnescape(path); err == nil {
		return plain
	}
	return path
}

// harmless reports whether a segment of a path stays one ordinary segment, however
// often it is unescaped.
func harmless(segment string) bool {
	for range 4 {
		name, _, _ := strings.Cut(segment, ";") // servlet containers drop parameters first
		if name == "." || name == ".." || strings.ContainsAny(segment, `/\`) {
			return false
		}
		plain, err := url.PathUnescape(segment)
		if err != nil || plain == segment {
			return err == nil || !strings.Contains(segment, "%2") && !strings.Contains(segment, "%5")
		}
		segment = plain
	}
	return false
}

// Check reports the first field that is wrong, and why. Names have to be in
// their normal form.
func (r *Registration) Check(agent string) error {
	if len(r.Targets) > MaxTargets {
		return fmt.Errorf("targets: %d are too many; at most %d", len(r.Targets), MaxTargets)
	}
	if len(r.Hosts) > MaxHosts {
		return fmt.Errorf("hosts: %d are too many; at most %d", len(r.Hosts), MaxHosts)
	}
	if err := CheckLabels(r.Labels); err != nil {
		return fmt.Errorf("labels: %w", err)
	}
	taken := map[string]string{agent: "the agent's own name"}
	for i, t := range r.Targets {
		field := fmt.Sprintf("targets[%d]", i)
		if err := CheckTargetName(t.Name); err != nil {
			return fmt.Errorf("%s.name: %w", field, err)
		}
		if !strings.HasPrefix(t.Path, "/") {
			return fmt.Errorf("%s.path: %q has to start with \"/\"", field, t.Path)
		}
		if err := CheckLabels(t.Labels); err != nil {
			return fmt.Errorf("%s.labels: %w", field, err)
		}
		full := t.Name + "." + agent
		if err := CheckName(full); err != nil {
			return fmt.Errorf("%s.name: %w", field, err)
		}
		if other, dup := taken[full]; dup {
			return fmt.Errorf("%s.name: %q is already %s", field, full, other)
		}
		taken[full] = fmt.Sprintf("target %q", t.Name)
	}
	taken[AgentTarget+"."+agent] = "the agent itself"
	for i, h := range r.Hosts {
		if err := CheckHost(h); err != nil {
			return fmt.Errorf("hosts[%d]: %w", i, err)
		}
		if other, dup := taken[h]; dup {
			return fmt.Errorf("hosts[%d]: %q is already %s", i, h, other)
		}
		taken[h] = "one of the hosts"
	}
	return nil
}

// CheckLabels reports the first label that discovery can't carry. Names follow
// the legacy label rules without a leading "__", because they become
// __meta_culvert_label_NAME.
func CheckLabels(labels map[string]string) error {
	if len(labels) > MaxLabels {
		return fmt.Errorf("%d are too many; at most %d", len(labels), MaxLabels)
	}
	for name, value := range labels {
		if !model.LegacyValidation.IsValidLabelName(name) || strings.HasPrefix(name, "__") {
			return fmt.Errorf("label name %q: use letters, digits and \"_\", no digit first, no leading \"__\"", name)
		}
		if len(value) > MaxLabelValueBytes {
			return fmt.Errorf("label %q: the value has %d bytes; at most %d are allowed", name, len(value), MaxLabelValueBytes)
		}
		if !utf8.ValidString(value) {
			return fmt.Errorf("label %q: the value is not UTF-8", name)
		}
	}
	return nil
}

// Drain is the body of POST /v1/drain: the sender takes no new work on this
// session, finishes what runs, and closes it.
type Drain struct {
	// Reason is for people: "shutdown", "replaced".
	Reason string `json:"reason,omitempty"`
	// ReconnectAfterSeconds asks the agent to spread its return evenly over this
	// time. 0 leaves it to the agent's own backoff.
	ReconnectAfterSeconds float64 `json:"reconnect_after_seconds,omitempty"`
}
