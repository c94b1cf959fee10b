package access_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/culvert-io/culvert/proxy/access"
)

func newToken(name, token string) access.Agent {
	a := access.Agent{Agents: []string{"*"}}
	a.Name, a.TokenHash = name, hashOf(token)
	return a
}

// TestEditAgentTokens: an edit is all or nothing, and roles see it.
func TestEditAgentTokens(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "tokens.yml")
	load := func() (*access.Roles, error) { return compile("{agent_tokens: tokens.yml}", dir) }
	empty, err := load()
	if err != nil || empty.Entries() != 0 || empty.Stamp() != empty.Stamped() {
		t.Fatalf("without the file: %v", err)
	}
	add := func(a access.Agent) error {
		return access.EditAgentTokens(path, func(agents []access.Agent) ([]access.Agent, error) { return append(agents, a), nil })
	}
	for _, name := range []string{"a", "b"} {
		if err := add(newToken(name, name)); err != nil {
			t.Fatal(err)
		}
	}
	if empty.Stamp() == empty.Stamped() {
		t.Error("the change does not show")
	}
	roles, err := load()
	if err != nil || roles.Entries() != 2 || roles.Stamp() != roles.Stamped() {
		t.Fatalf("with two: %v", err)
	}
	before, _ := os.ReadFile(path)
	refused := errors.New("no")
	if err := add(newToken("a", "c")); err == nil || !strings.Contains(err.Error(), `"a": the name is there twice`) {
		t.Errorf("a second a: %v", err)
	}
	if err := access.EditAgentTokens(path, func([]access.Agent) ([]access.Agent, error) { return nil, refused }); err != refused {
		t.Errorf("an edit that failed: %v", err)
	}
	if err := os.WriteFile(path+".tmp", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := add(newToken("c", "c")); !errors.Is(err, access.ErrTokensBusy) {
		t.Errorf("beside another: %v", err)
	}
	os.Remove(path + ".tmp")
	if after, _ := os.ReadFile(path); string(after) != string(before) {
		t.Errorf("the file has changed: %s", after)
	}
	if left, _ := os.ReadDir(dir); len(left) != 1 {
		t.Errorf("left behind: %v", left)
	}
	if _, err := compile("{agents: [{name: a, client_cert: [x]}], agent_tokens: tokens.yml}", dir); err == nil || !strings.Contains(err.Error(), "twice") {
		t.Errorf("a name that the configuration has too: %v", err)
	}
	if err := os.WriteFile(path, []byte("- {name: a, nonsense: 1}"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := load(); err == nil || !strings.Contains(err.Error(), "roles.agent_tokens: "+path) || !strings.Contains(err.Error(), "nonsense") {
		t.Errorf("a bad file: %v", err)
	}
	// An entry whose agents: is empty may be nothing, rather than everything.
	if err := os.WriteFile(path, []byte("- {name: a, token_hash: "+hashOf("a")+", agents: }"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := load(); err == nil || !strings.Contains(err.Error(), "agents is missing") {
		t.Errorf("without names: %v", err)
	}
}
