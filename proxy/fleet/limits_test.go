package fleet_test

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/culvert-io/culvert/protocol"
	"github.com/culvert-io/culvert/proxy/fleet"
)

// wantRefusal checks the status, and that the message has all the words.
func wantRefusal(t *testing.T, err error, status int, words ...string) {
	t.Helper()
	r, ok := protocol.AsRefusal(err)
	if !ok || r.Status != status {
		t.Fatalf("got %v, want the refusal %d", err, status)
	}
	for _, word := range words {
		if !strings.Contains(r.Message, word) {
			t.Errorf("the refusal %q does not say %q", r.Message, word)
		}
	}
}

// TestMaxKnown: names that nobody knew find no room at the limit; those that are known
// come back, and one that is forgotten makes room.
func TestMaxKnown(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "fleet.db")
	f, stop := open(t, fleet.Config{Path: path, MaxKnown: 2})
	lost := register(t, f, "a", protocol.Registration{})
	f.Lost(lost, "test")
	kept := register(t, f, "b", protocol.Registration{})
	late, _ := connect(t, "c", "1")
	wantRefusal(t, f.Check(t.Context(), late, protocol.Registration{}), 503, "2 agents are known", `"c"`, "--agent.max-known", "DELETE /api/v1/agents/NAME")
	err := f.Register(t.Context(), late, protocol.Registration{})
	wantRefusal(t, err, 503, "--agent.max-known")
	if r, _ := protocol.AsRefusal(err); r.RetryAfter <= 0 {
		t.Error("no Retry-After")
	}
	if _, known := f.Resolve("c"); known {
		t.Error("the agent that was refused is known")
	}
	register(t, f, "a", protocol.Registration{Hosts: []string{"db.lan"}})
	if err := f.Register(t.Context(), kept, protocol.Registration{Version: "2"}); err != nil {
		t.Error(err)
	}
	f.Forget("a")
	if err := f.Register(t.Context(), late, protocol.Registration{}); err != nil {
		t.Error(err)
	}
	stop()
	// A lower limit forgets nobody.
	f, _ = open(t, fleet.Config{Path: path, MaxKnown: 1})
	if n := len(f.Agents()); n != 2 {
		t.Errorf("%d agents are known after a restart with a lower limit, want 2", n)
	}
	register(t, f, "b", protocol.Registration{})
}

// TestMaxRegistration: labels stand at each target in discovery, so a small registration
// may make a large list.
func TestMaxRegistration(t *testing.T) {
	t.Parallel()
	f, _ := open(t, fleet.Config{MaxKnown: 200})
	reg := protocol.Registration{Labels: map[string]string{}}
	for i := range protocol.MaxLabels {
		reg.Labels[fmt.Sprintf("l%d", i)] = strings.Repeat("x", 1000)
	}
	few := reg
	for i := range protocol.MaxTargets {
		reg.Targets = append(reg.Targets, protocol.Target{Name: fmt.Sprintf("t%d", i), Path: "/"})
	}
	few.Targets = reg.Targets[:40]
	conn, _ := connect(t, "a", "1")
	wantRefusal(t, f.Register(t.Context(), conn, reg), 413, `"a"`, "4194304", "labels")
	// 200 times 16 KiB have room for one of them.
	if err := f.Register(t.Context(), conn, few); err != nil {
		t.Fatal(err)
	}
	second, _ := connect(t, "b", "1")
	wantRefusal(t, f.Register(t.Context(), second, few), 503, `"b"`, "--agent.max-known=200")
	if err := f.Register(t.Context(), conn, few); err != nil {
		t.Errorf("as it was: %v", err)
	}
	if err := f.Register(t.Context(), conn, protocol.Registration{}); err != nil {
		t.Fatal(err)
	}
	if err := f.Register(t.Context(), second, few); err != nil {
		t.Errorf("after the first took less: %v", err)
	}
	f.Forget("b")
	if err := f.Register(t.Context(), conn, few); err != nil {
		t.Errorf("after the second was forgotten: %v", err)
	}
}

// FuzzRegister has three agents whose names stand in each other's way register one after
// the other, as the lines of script say: the agent's number, and its JSON. Names lead to
// who has registered them, and to nobody once all are forgotten.
func FuzzRegister(f *testing.F) {
	f.Add([]byte("0{}\n1{}\n2{}"))
	f.Add([]byte(`0{"targets":[{"name":"b","path":"/"}]}` + "\n" + `1{"hosts":["db.lan","*.lan"]}` + "\n" + `2{"hosts":["db.lan","b.a"]}`))
	f.Add([]byte(`2{"hosts":["a","agent.a","b.a"],"labels":{"x":"y"}}` + "\n0{}\n" + `1{"targets":[{"name":"x","path":"/*","params":{"m":["1"]},"labels":{"l":"v"}}]}` + "\n2{}"))
	f.Add([]byte(`0{"hosts":["*.a","*.b.a"]}` + "\n" + `0{"targets":[{"name":"t","path":"/"},{"name":"t","path":"/"}]}`))
	names := []string{"a", "b.a", "lan"}
	conns := make([]*fleet.Conn, len(names))
	for i, name := range names {
		conns[i], _ = connect(f, name, "1")
	}
	f.Fuzz(func(t *testing.T, script []byte) {
		fl, err := fleet.Open(fleet.Config{SettleTime: -1, MaxKnown: 2})
		if err != nil {
			t.Fatal(err)
		}
		now := map[string]protocol.Registration{}
		claimed := map[string]bool{}
		for line := range strings.Lines(string(script)) {
			i := int(line[0] - '0')
			var reg protocol.Registration
			if i >= len(names) || json.Unmarshal([]byte(line[1:]), &reg) != nil {
				continue
			}
			checked := fl.Check(t.Context(), conns[i], reg)
			err := fl.Register(t.Context(), conns[i], reg)
			if fmt.Sprint(checked) != fmt.Sprint(err) {
				t.Fatalf("Check says %v, Register %v", checked, err)
			}
			if err != nil {
				if _, ok := protocol.AsRefusal(err); !ok {
					t.Errorf("%T %v is no refusal", err, err)
				}
				continue
			}
			now[names[i]] = reg
			if len(now) > 2 {
				t.Errorf("%d agents are known, and 2 may be", len(now))
			}
			for name, reg := range now {
				for _, target := range append([]protocol.Target{{Name: "agent"}}, reg.Targets...) {
					full := target.Name + "." + name
					claimed[full] = true
					if r, ok := fl.Resolve(full); !ok || len(r.Agents) != 1 || r.Agents[0].Name != name || !r.Exact {
						t.Errorf("%q leads to %+v, %v", full, r, ok)
					}
				}
				if r, ok := fl.Resolve(name); !ok || len(r.Agents) != 1 || r.Agents[0].Name != name {
					t.Errorf("%q leads to %+v, %v", name, r, ok)
				}
				for _, host := range reg.Hosts {
					host = strings.Replace(host, "*", "any.thing", 1)
					claimed[host] = true
					if _, ok := fl.Resolve(host); !ok {
						t.Errorf("nobody answers for %q", host)
					}
				}
			}
		}
		for i, name := range names {
			fl.Lost(conns[i], "the next one needs the session")
			if _, known := now[name]; known != fl.Forget(name) {
				t.Errorf("%q was known: %v", name, known)
			}
		}
		for name := range claimed {
			if r, ok := fl.Resolve(name); ok {
				t.Errorf("%q still leads to %+v", name, r)
			}
		}
	})
}
