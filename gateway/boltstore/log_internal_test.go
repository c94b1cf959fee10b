package boltstore

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const testStore = 0x1122334455667788

// writeLog opens a log in which nothing was written, after so many changes.
func writeLog(t *testing.T, path string, applied uint64) *commitLog {
	t.Helper()
	l := newCommitLog(path, testStore)
	if err := l.open(applied); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.close() })
	return l
}

func (l *commitLog) mustWrite(t *testing.T, payload string) {
	t.Helper()
	if err := l.write(append(l.frameStart(), payload...)); err != nil {
		t.Fatal(err)
	}
}

// replayed returns the payloads of a log, joined by blanks.
func replayed(path string, applied uint64) (string, error) {
	var payloads []string
	_, err := newCommitLog(path, testStore).replay(applied, func(payload []byte) error {
		payloads = append(payloads, string(payload))
		return nil
	})
	return strings.Join(payloads, " "), err
}

func expectReplay(t *testing.T, path string, applied uint64, want string) {
	t.Helper()
	if got, err := replayed(path, applied); got != want || err != nil {
		t.Errorf("after %d changes the log has %q, %v; want %q", applied, got, err, want)
	}
}

func TestLog(t *testing.T) {
	path := filepath.Join(t.TempDir(), "push.db")
	expectReplay(t, path, 0, "")
	l := writeLog(t, path, 0)
	expectReplay(t, path, 0, "")
	large := strings.Repeat("x", 3*growth)
	for _, payload := range []string{"1", large, "3"} {
		l.mustWrite(t, payload)
	}
	expectReplay(t, path, 0, "1 "+large+" 3")
	expectReplay(t, path, 2, "3")
	expectReplay(t, path, 3, "")

	l.turn() // the database has 3
	l.mustWrite(t, "4")
	l.mustWrite(t, "5")
	expectReplay(t, path, 3, "4 5")
	expectReplay(t, path, 0, "1 "+large+" 3 4 5") // it was not saved yet
	l.turn()                                      // the database has 5
	l.mustWrite(t, "6")                           // over 1; what is left of 3 is old
	expectReplay(t, path, 5, "6")

	l = writeLog(t, path, 6)
	l.mustWrite(t, "7")
	expectReplay(t, path, 6, "7")
}

// A frame whose write failed is skipped, even where all of it is in the file.
func TestLogFailedWrite(t *testing.T) {
	path := filepath.Join(t.TempDir(), "push.db")
	l := writeLog(t, path, 0)
	l.mustWrite(t, "1")
	fail := func(payload string) {
		t.Helper()
		end, written := l.end, l.written
		l.mustWrite(t, payload)
		l.end, l.written = end, written // as where the flush failed
	}
	fail("2 failed")
	expectReplay(t, path, 0, "1 2 failed") // nobody can know yet
	l.mustWrite(t, "3")
	expectReplay(t, path, 0, "1 3")
	fail("4 failed")
	l.turn() // the database has all that was tried
	l.mustWrite(t, "5")
	expectReplay(t, path, 0, "1 3 5")
	expectReplay(t, path, 3, "5")
	expectReplay(t, path, 4, "5")
}

// Whatever byte is changed: the log has all that was written, but for the last frame
// which may be one that was being written; or it is noticed.
func TestLogDamage(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "push.db")
	l := writeLog(t, path, 0)
	payloads := []string{"1", "2", strings.Repeat("3", 700), "4", "5", "6"}
	for i, payload := range payloads {
		if i == 3 {
			l.turn() // the database has none of it yet
		}
		l.mustWrite(t, payload)
	}
	all, allButLast := strings.Join(payloads, " "), strings.Join(payloads[:5], " ")
	noticed, cut := 0, 0
	check := func(what string, last bool) {
		t.Helper()
		switch got, err := replayed(path, 0); {
		case err != nil:
			noticed++
		case got == all:
		case got == allButLast && last:
			cut++
		default:
			t.Errorf("%s: the log has %q", what, got)
		}
	}
	const used = 4 * frameAlign
	for n := range 2 {
		content, err := os.ReadFile(l.paths[n])
		if err != nil {
			t.Fatal(err)
		}
		for at := 0; at < used; at += 7 {
			damaged := bytes.Clone(content)
			damaged[at] ^= 0x10
			if err := os.WriteFile(l.paths[n], damaged, 0o600); err != nil {
				t.Fatal(err)
			}
			check(fmt.Sprintf("file %d, byte %d", n, at), n == 1)
		}
		for size := 0; size < used; size += 61 {
			if err := os.WriteFile(l.paths[n], content[:size], 0o600); err != nil {
				t.Fatal(err)
			}
			// Cut at its end, a log is like a shorter one.
			if n == 0 {
				check(fmt.Sprintf("file %d, cut to %d bytes", n, size), false)
			}
		}
		if err := os.WriteFile(l.paths[n], content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if noticed == 0 || cut == 0 {
		t.Errorf("damage was noticed %d times, and the last frame was dropped %d times", noticed, cut)
	}
	if err := os.Remove(l.paths[0]); err != nil {
		t.Fatal(err)
	}
	if got, err := replayed(path, 0); err == nil {
		t.Errorf("without its first file the log has %q", got)
	}
}

func TestLogForeign(t *testing.T) {
	path := filepath.Join(t.TempDir(), "push.db")
	l := writeLog(t, path, 0)
	l.mustWrite(t, "1")
	other := newCommitLog(path, testStore+1)
	moved, err := other.moveForeign()
	if want := []string{path + ".log0.of-1122334455667788"}; !slices.Equal(moved, want) || err != nil {
		t.Errorf("moved %q, %v; want %q", moved, err, want)
	}
	if _, err := os.Stat(path + ".log1"); err != nil {
		t.Errorf("an empty file was moved too: %v", err)
	}
	if err := os.Rename(moved[0], path+".log0"); err != nil {
		t.Fatal(err)
	}
	expectReplay(t, path, 0, "1")
}

func TestLogStopsAtErrors(t *testing.T) {
	path := filepath.Join(t.TempDir(), "push.db")
	l := writeLog(t, path, 0)
	l.mustWrite(t, "1")
	l.mustWrite(t, "2")
	broken := errors.New("broken")
	n := 0
	_, err := newCommitLog(path, testStore).replay(0, func([]byte) error { n++; return broken })
	if !errors.Is(err, broken) || n != 1 || !strings.Contains(err.Error(), "push.db.log0: change 1") {
		t.Errorf("got %v after %d calls", err, n)
	}
}
