package protocol_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/culvert-io/culvert/protocol"
)

var (
	longLabel = strings.Repeat("a", 63)
	longName  = strings.Repeat("a.", 126) + "a" // 253 bytes
)

func TestNames(t *testing.T) {
	// name, and whether it can be an agent, a host and a target
	for _, c := range []struct {
		name                string
		agent, host, target bool
	}{
		{"web-1", true, true, true},
		{"web-1.example.net", true, true, false},
		{"web_1", true, true, true},
		{"_tcp", true, true, true},
		{"9100", true, true, false},
		{"9100a", true, true, true},
		{"10.0.0.1", true, true, false},
		{"agent", true, true, false},
		{"agent.web-1", true, true, false},
		{"xn--mnchen-3ya.de", true, true, false},
		{longLabel, true, true, true},
		{longName, true, true, false},
		{"*.example.net", false, true, false},
		{"*.lan", false, true, false},
		{"*.*.lan", false, false, false},
		{"a.*.lan", false, false, false},
		{"*a.lan", false, false, false},
		{"*", false, false, false},
		{"*.", false, false, false},
		{"", false, false, false},
		{".", false, false, false},
		{"web-1.", false, false, false},
		{".web-1", false, false, false},
		{"web..1", false, false, false},
		{"-web", false, false, false},
		{"web-", false, false, false},
		{"a.-b", false, false, false},
		{"Web-1", false, false, false},
		{"münchen", false, false, false},
		{"web 1", false, false, false},
		{"web:1", false, false, false},
		{"::1", false, false, false},
		{"web/1", false, false, false},
		{"web\n1", false, false, false},
		{"web\x00", false, false, false},
		{longLabel + "a", false, false, false},
		{longName + ".a", false, false, false},
	} {
		for what, check := range map[string]struct {
			err  error
			want bool
		}{
			"CheckName":       {protocol.CheckName(c.name), c.agent},
			"CheckHost":       {protocol.CheckHost(c.name), c.host},
			"CheckTargetName": {protocol.CheckTargetName(c.name), c.target},
		} {
			if (check.err == nil) != check.want {
				t.Errorf("%s(%q): %v", what, c.name, check.err)
			}
		}
	}
}

func TestNormalizeName(t *testing.T) {
	for in, want := range map[string]string{
		"Web-1.Example.NET": "web-1.example.net", "web-1.": "web-1", "web-1..": "web-1.", "": "", ".": "",
	} {
		if got := protocol.NormalizeName(in); got != want {
			t.Errorf("NormalizeName(%q) is %q, want %q", in, got, want)
		}
	}
}

func TestSplitAuthority(t *testing.T) {
	for in, want := range map[string][2]string{
		"web-1:9100":              {"web-1", "9100"},
		"Web-1.Example.net.:9100": {"web-1.example.net", "9100"},
		"web-1":                   {"web-1", ""},
		"web-1.":                  {"web-1", ""},
		"web-1:":                  {"web-1", ""},
		":9100":                   {"", "9100"},
		"":                        {"", ""},
		"10.0.0.1:9100":           {"10.0.0.1", "9100"},
		"[::1]:9100":              {"::1", "9100"},
		"[::1]":                   {"::1", ""},
		"::1":                     {"::1", ""},
		"[FE80::1%25eth0]:9100":   {"fe80::1%25eth0", "9100"},
		"[2001:DB8::1]":           {"2001:db8::1", ""},
		"web-1:http":              {"web-1", "http"},
	} {
		name, port := protocol.SplitAuthority(in)
		if got := [2]string{name, port}; got != want {
			t.Errorf("SplitAuthority(%q) is %q, want %q", in, got, want)
		}
	}
}

func TestSplitTarget(t *testing.T) {
	for in, want := range map[string]string{
		"router.web-1.example.net": "router web-1.example.net true", "web-1": "web-1  false", "": "  false", ".web-1": " web-1 true",
	} {
		target, agent, ok := protocol.SplitTarget(in)
		if got := fmt.Sprint(target, " ", agent, " ", ok); got != want {
			t.Errorf("SplitTarget(%q) is %q, want %q", in, got, want)
		}
	}
}

func TestWildcardSuffix(t *testing.T) {
	for in, want := range map[string]string{"*.example.net": ".example.net", "example.net": "", "*": "", "a.*.b": ""} {
		if got, ok := protocol.WildcardSuffix(in); got != want || ok != (want != "") {
			t.Errorf("WildcardSuffix(%q) is %q, %v", in, got, ok)
		}
	}
}

func TestTargetAllows(t *testing.T) {
	for _, c := range []struct {
		declared string
		yes, no  []string
	}{
		{"/metrics", []string{"/metrics"}, []string{"", "/", "/metrics/", "/metrics/x", "/Metrics", "/metrics/../metrics", "/metrics%2f"}},
		{"/probe*", []string{"/probe*"}, []string{"/probe", "/prober"}},
		{"/*", []string{"/", "/a", "/a/b/", "/a//b", "/..a", "/a.b", "/...", "/%20"}, []string{"", "a", "/..", "/.", "/a/..", "/a/../b"}},
		{
			"/x/*",
			[]string{"/x/", "/x/a", "/x/a/b", "/x/a%20b", "/x/a.b", "/x/..a", "/x/a..", "/x/...", "/x/.hidden", "/x/%C3%A9"},
			[]string{
				"/x", "/", "/y", "/xx/a", "/X/a", "/../x/a", "//x/a",
				"/x/..", "/x/.", "/x/../y", "/x/./y", "/x/a/..", "/x/a/../../y",
				"/x/%2e%2e/y", "/x/%2E%2E/y", "/x/.%2e/y", "/x/%2e./y", "/x/%2e/y",
				"/x/..%2fy", "/x/..%2Fy", "/x/%2e%2e%2fy", "/x/a%2f..%2f..%2fy",
				`/x/..\y`, "/x/..%5cy", "/x/..%5Cy", "/x/a%5c..%5c..%5cy",
				// Decoded twice, as a target behind another proxy may see it.
				"/x/%252e%252e/y", "/x/.%252e/y", "/x/%252E%252E/y", "/x/..%252fy", "/x/..%252Fy", "/x/..%255cy",
				// Servlet containers drop path parameters before they resolve dot segments.
				"/x/..;/y", "/x/..;a=b/y", "/x/%2e%2e;/y", "/x/..%3b/y",
			},
		},
	} {
		target := protocol.Target{Name: "t", Path: c.declared}
		for _, path := range c.yes {
			if !target.Allows(path) {
				t.Errorf("%q does not allow %q", c.declared, path)
			}
		}
		for _, path := range c.no {
			if target.Allows(path) {
				t.Errorf("%q allows %q", c.declared, path)
			}
		}
	}
	for in, want := range map[string]string{"/metrics": "/metrics", "/x/*": "/x/", "/*": "/"} {
		if got := (protocol.Target{Path: in}).ScrapePath(); got != want {
			t.Errorf("ScrapePath of %q is %q, want %q", in, got, want)
		}
	}
}

func TestRegistrationCheck(t *testing.T) {
	targets := func(names ...string) (all []protocol.Target) {
		for _, n := range names {
			all = append(all, protocol.Target{Name: n, Path: "/metrics"})
		}
		return all
	}
	many := func(n int) (names []string) {
		for i := range n {
			names = append(names, fmt.Sprintf("n%d", i))
		}
		return names
	}
	labels := func(n int) map[string]string {
		m := map[string]string{}
		for _, name := range many(n) {
			m[name] = "v"
		}
		return m
	}
	for _, c := range []struct {
		name string
		r    protocol.Registration
		want string // in the error, "" for none
	}{
		{"empty", protocol.Registration{}, ""},
		{"full", protocol.Registration{
			Version: "1.2.3", Capabilities: []string{"x", "y"},
			Targets: []protocol.Target{{Name: "router", Path: "/snmp", Params: map[string][]string{"module": {"a", "b"}}, Labels: map[string]string{"a_b": "ü"}}},
			Hosts:   []string{"db-2.lan", "*.lan"}, Labels: map[string]string{"site": ""},
		}, ""},
		{"most targets", protocol.Registration{Targets: targets(many(1000)...)}, ""},
		{"too many targets", protocol.Registration{Targets: targets(many(1001)...)}, "targets: "},
		{"most hosts", protocol.Registration{Hosts: many(1000)}, ""},
		{"too many hosts", protocol.Registration{Hosts: many(1001)}, "hosts: "},
		{"most labels", protocol.Registration{Labels: labels(64)}, ""},
		{"too many labels", protocol.Registration{Labels: labels(65)}, "labels: "},
		{"longest value", protocol.Registration{Labels: map[string]string{"a": strings.Repeat("v", 1024)}}, ""},
		{"value too long", protocol.Registration{Labels: map[string]string{"a": strings.Repeat("v", 1025)}}, `labels: label "a"`},
		{"value not UTF-8", protocol.Registration{Labels: map[string]string{"a": "\xff"}}, `labels: label "a"`},
		{"label empty", protocol.Registration{Labels: map[string]string{"": "v"}}, `labels: label name ""`},
		{"label with a dash", protocol.Registration{Labels: map[string]string{"a-b": "v"}}, `labels: label name "a-b"`},
		{"label with a digit", protocol.Registration{Labels: map[string]string{"1a": "v"}}, `labels: label name "1a"`},
		{"label in UTF-8", protocol.Registration{Labels: map[string]string{"ü": "v"}}, `labels: label name "ü"`},
		{"label reserved", protocol.Registration{Labels: map[string]string{"__address__": "v"}}, `labels: label name "__address__"`},
		{"target's label", protocol.Registration{Targets: []protocol.Target{{Name: "a", Path: "/", Labels: map[string]string{"__x": "v"}}}}, "targets[0].labels: "},
		{"target's name", protocol.Registration{Targets: targets("a", "b.c")}, "targets[1].name: "},
		{"target's name in capitals", protocol.Registration{Targets: targets("Router")}, "targets[0].name: "},
		{"target named as a port", protocol.Registration{Targets: targets("9100")}, "targets[0].name: "},
		{"target named agent", protocol.Registration{Targets: targets("agent")}, "targets[0].name: "},
		{"target without a path", protocol.Registration{Targets: []protocol.Target{{Name: "a"}}}, "targets[0].path: "},
		{"target with a relative path", protocol.Registration{Targets: []protocol.Target{{Name: "a", Path: "metrics"}}}, "targets[0].path: "},
		{"target twice", protocol.Registration{Targets: targets("a", "b", "a")}, "targets[2].name: "},
		{"host", protocol.Registration{Hosts: []string{"a", "-b"}}, "hosts[1]: "},
		{"host in capitals", protocol.Registration{Hosts: []string{"DB.lan"}}, "hosts[0]: "},
		{"host is everything", protocol.Registration{Hosts: []string{"*"}}, "hosts[0]: "},
		{"host twice", protocol.Registration{Hosts: []string{"a", "*.a", "a"}}, "hosts[2]: "},
		{"host is the agent", protocol.Registration{Hosts: []string{"web-1"}}, "hosts[0]: "},
		{"host is a target", protocol.Registration{Targets: targets("a"), Hosts: []string{"a.web-1"}}, "hosts[0]: "},
		{"host is the agent's target", protocol.Registration{Hosts: []string{"agent.web-1"}}, "hosts[0]: "},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := c.r.Check("web-1")
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.HasPrefix(err.Error(), c.want)) {
				t.Errorf("%v, want %q", err, c.want)
			}
		})
	}
}

func TestRefusalReason(t *testing.T) {
	for message, want := range map[string]string{
		"plain text":           "agent-offline: plain text",
		"two\r\nX-Evil: lines": "agent-offline: two??X-Evil: lines",
		"tab\tand nul\x00":     "agent-offline: tab?and nul?",
		"größer, \x80\xff":     "agent-offline: gr??er, ??",
		"":                     "agent-offline: ",
	} {
		if got := protocol.Refusef(503, protocol.CodeAgentOffline, "%s", message).Reason(); got != want {
			t.Errorf("%q became %q, want %q", message, got, want)
		}
	}
	for _, filler := range []string{"x", "ü", "日", "\xff"} {
		got := protocol.Refusef(503, protocol.CodeAgentOffline, "%s", strings.Repeat(filler, 1000)).Reason()
		if len(got) > 400 || !strings.HasSuffix(got, "...") {
			t.Errorf("%d bytes that end in %q", len(got), got[max(0, len(got)-5):])
		}
	}
	exact := strings.Repeat("x", 400-len("agent-offline: "))
	if got := protocol.Refusef(503, protocol.CodeAgentOffline, "%s", exact).Reason(); !strings.HasSuffix(got, "xxx") || len(got) != 400 {
		t.Errorf("%d bytes were cut", len(got))
	}
}
