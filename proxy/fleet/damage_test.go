package fleet_test

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/culvert-io/culvert/protocol"
	"github.com/culvert-io/culvert/proxy/fleet"
)

// TestDamage damages the file in ways that disks and file systems do. Whatever
// it is, Open returns an error, or what is left, and never ends the process or
// hangs; and it does not make things worse by writing to a file that it refuses.
func TestDamage(t *testing.T) {
	t.Parallel()
	whole := storedFleet(t)
	page := os.Getpagesize()
	pages := len(whole) / page
	overwrite := func(at, n int, with func() byte) []byte {
		b := bytes.Clone(whole)
		for i := at; i < min(at+n, len(b)); i++ {
			b[i] = with()
		}
		return b
	}
	zero := func() byte { return 0 }
	ones := func() byte { return 0xff }
	random := rand.New(rand.NewPCG(1, 2))
	noise := func() byte { return byte(random.Uint32()) }

	files := map[string][]byte{
		"whole":            whole,
		"empty":            {},
		"one byte":         {0},
		"garbage":          bytes.Repeat([]byte("garbage "), 10_000),
		"text":             []byte("{}"),
		"zeros":            make([]byte, len(whole)),
		"half":             whole[:len(whole)/2],
		"one page":         whole[:page],
		"two pages":        whole[:2*page],
		"three pages":      whole[:3*page],
		"last page cut":    whole[:len(whole)-page],
		"last bytes cut":   whole[:len(whole)-100],
		"both metas zero":  overwrite(0, 2*page, zero),
		"first meta noise": overwrite(0, page, noise),
	}
	for i := range pages {
		files[fmt.Sprintf("page %d zero", i)] = overwrite(i*page, page, zero)
		files[fmt.Sprintf("page %d ones", i)] = overwrite(i*page, page, ones)
		files[fmt.Sprintf("page %d noise", i)] = overwrite(i*page, page, noise)
		files[fmt.Sprintf("page %d header noise", i)] = overwrite(i*page, 16, noise)
		files[fmt.Sprintf("page %d middle noise", i)] = overwrite(i*page+page/2, 64, noise)
	}
	slots := make(chan struct{}, 2)
	for name, content := range files {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			slots <- struct{}{}
			defer func() { <-slots }()
			path := filepath.Join(t.TempDir(), "fleet.db")
			if err := os.WriteFile(path, content, 0o600); err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			cmd := exec.CommandContext(ctx, os.Args[0])
			cmd.Env = append(os.Environ(), openFile+"="+path, "GORACE=atexit_sleep_ms=0")
			out, err := cmd.CombinedOutput()
			switch {
			case ctx.Err() != nil:
				t.Error("Open hangs")
			case err != nil:
				lines := strings.SplitN(string(out), "\n", 8)
				t.Errorf("Open ends the process: %v\n%s", err, strings.Join(lines[:len(lines)-1], "\n"))
			case strings.HasPrefix(string(out), "error: "):
				if !strings.Contains(string(out), path) || !strings.Contains(string(out), "move it away") {
					t.Errorf("the error does not say what to do: %s", out)
				}
				if now, _ := os.ReadFile(path); !bytes.Equal(now, content) {
					t.Error("the file was changed, although it was refused")
				}
			}
			if name == "whole" && string(out) != "agents: 50\n" {
				t.Errorf("got %s", out)
			}
		})
	}
}

// storedFleet returns a file with 50 agents.
func storedFleet(t *testing.T) []byte {
	t.Helper()
	path := filepath.Join(t.TempDir(), "fleet.db")
	f, stop := open(t, fleet.Config{Path: path})
	for i := range 50 {
		reg := protocol.Registration{Labels: map[string]string{"padding": strings.Repeat("x", 500)}}
		conn := register(t, f, fmt.Sprintf("web-%d", i), reg)
		conn.Close()
		f.Lost(conn, "test")
	}
	stop()
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return whole
}
