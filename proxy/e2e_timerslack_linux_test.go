package main_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestTimerSlack looks at the timer slack of all threads of a proxy: it chooses one, unless
// who starts it has.
func TestTimerSlack(t *testing.T) {
	t.Run("by default", func(t *testing.T) {
		wantTimerSlack(t, startProxy(t), "200000")
	})
	t.Run("chosen by who starts it", func(t *testing.T) {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		if err := unix.Prctl(unix.PR_SET_TIMERSLACK, 100_000, 0, 0, 0); err != nil {
			t.Fatal(err)
		}
		defer unix.Prctl(unix.PR_SET_TIMERSLACK, 0, 0, 0, 0) // the default again
		wantTimerSlack(t, startProxy(t), "100000")
	})
}

func wantTimerSlack(t *testing.T, p *proxyProcess, want string) {
	t.Helper()
	threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", p.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, thread := range threads {
		slack, err := os.ReadFile("/proc/" + thread.Name() + "/timerslack_ns")
		if errors.Is(err, fs.ErrPermission) {
			t.Skip("only root may read the timer slack of other processes")
		}
		gone := errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH)
		if err != nil && !gone || err == nil && strings.TrimSpace(string(slack)) != want {
			t.Errorf("thread %s has the timer slack %q, %v, want %s", thread.Name(), slack, err, want)
		}
	}
}
