package main

import (
	"os"
	"runtime"
	"syscall"

	"golang.org/x/sys/unix"
)

// While anything runs, Go's monitor thread sleeps for 20 µs at a time and looks for system
// calls that take longer. With the kernel's default timer slack a flush of the push store is
// one: its processor is handed to another thread, and back a moment later. That, and the
// looks, take a seventh of the processor time of pushes. A larger slack makes the sleeps
// longer than most flushes.
const (
	defaultTimerSlack = 50_000 // nanoseconds
	timerSlack        = 200_000
)

// relaxTimers gives all threads a larger timer slack. The monitor thread runs before main, and
// only takes it over from the program that started this one: so the process starts its
// program once more. It returns where that has been done, or where somebody else has chosen
// the slack (TimerSlackNSec= of systemd), and an error where it can't be done; then the
// program goes on as it is.
func relaxTimers() error {
	runtime.LockOSThread() // each thread has its own
	defer runtime.UnlockOSThread()
	slack, err := unix.PrctlRetInt(unix.PR_GET_TIMERSLACK, 0, 0, 0, 0)
	if err != nil || slack != defaultTimerSlack {
		return err
	}
	path, err := os.Executable()
	if err != nil {
		return err
	}
	if err := unix.Prctl(unix.PR_SET_TIMERSLACK, timerSlack, 0, 0, 0); err != nil {
		return err
	}
	return &os.PathError{Op: "exec", Path: path, Err: syscall.Exec(path, os.Args, os.Environ())}
}
