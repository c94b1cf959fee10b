package access_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/culvert-io/culvert/proxy/access"
)

func TestPins(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "data", "agent-keys")
	open := func() *access.Pins {
		t.Helper()
		p, err := access.OpenPins(path)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	p := open()
	check := func(what string, got, want error) {
		t.Helper()
		if !errors.Is(got, want) {
			t.Errorf("%s: got %v, want %v", what, got, want)
		}
	}
	check("no pin", p.Check("a", ""), nil)
	check("no pin, a key", p.Check("a", "k"), nil)
	check("first", p.Pin("a", "k"), nil)
	check("again", p.Pin("a", "k"), nil)
	check("another", p.Pin("a", "x"), access.ErrPinned)
	p = open()
	check("the right one", p.Check("a", "k"), nil)
	check("a wrong one", p.Check("a", "x"), access.ErrPinned)
	check("none", p.Check("a", ""), access.ErrPinned)
	check("another name", p.Check("b", ""), nil)
	if ok, err := p.Release("b"); ok || err != nil {
		t.Errorf("released b: %v %v", ok, err)
	}
	if ok, err := p.Release("a"); !ok || err != nil {
		t.Errorf("released a: %v %v", ok, err)
	}
	p = open()
	check("released", p.Pin("a", "x"), nil)

	// Of many who come at once one gets the name.
	var wg sync.WaitGroup
	var mu sync.Mutex // protects got
	got := 0
	for i := range 20 {
		wg.Go(func() {
			if p.Pin("c", fmt.Sprint(i)) == nil {
				mu.Lock()
				got++
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if got != 1 {
		t.Errorf("%d got the name", got)
	}
	// A line that was cut off was never acknowledged, and does no harm to the next.
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprint(f, "d 0123456789abc")
	f.Close()
	p = open()
	check("cut off", p.Check("d", ""), nil)
	check("after the cut", p.Pin("e", "k"), nil)
	p = open()
	check("the one after the cut", p.Check("e", "x"), access.ErrPinned)
	check("one before the cut", p.Check("a", "k"), access.ErrPinned)

	if err := os.WriteFile(path, []byte("a b c\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if p, err := access.OpenPins(path); p != nil || err == nil || !strings.Contains(err.Error(), "agent-keys:1: ") {
		t.Errorf("a damaged file: %v", err)
	}
	// A directory that can't be: a file is in the way.
	dir := t.TempDir()
	path = filepath.Join(dir, "x", "agent-keys")
	p = open()
	if err := os.WriteFile(filepath.Join(dir, "x"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	check("a file that can't be made", p.Pin("a", "k"), access.ErrNotKept)
	check("which counts", p.Check("a", "x"), access.ErrPinned)
}
