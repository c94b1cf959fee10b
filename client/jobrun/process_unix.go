//go:build unix

package jobrun

import (
	"os"
	"os/signal"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

var (
	passedOn   = []os.Signal{syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTERM, syscall.SIGUSR1, syscall.SIGUSR2}
	brokenPipe = []os.Signal{syscall.SIGPIPE}
)

// sentToBoth reports whether a signal that came here is taken to have come from the
// terminal, which sends it to every process of its foreground group. There is no
// way to ask who sent it; kill -INT of this process alone goes nowhere then.
func sentToBoth(s os.Signal, pid int) bool {
	if s != syscall.SIGINT && s != syscall.SIGQUIT {
		return false
	}
	terminal, err := unix.Open("/dev/tty", unix.O_RDONLY|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return false // there is none
	}
	defer unix.Close(terminal)
	foreground, err := unix.IoctlGetInt(terminal, unix.TIOCGPGRP)
	if err != nil {
		return false
	}
	own, err := unix.Getpgid(0)
	if err != nil || own != foreground {
		return false
	}
	group, err := unix.Getpgid(pid)
	return err == nil && group == foreground
}

// peakMemory returns ru_maxrss in bytes: Linux and the BSDs count KiB, Darwin bytes,
// and Solaris nothing.
func peakMemory(state *os.ProcessState) int64 {
	usage, ok := state.SysUsage().(*syscall.Rusage)
	if !ok {
		return 0
	}
	if runtime.GOOS == "darwin" || runtime.GOOS == "ios" {
		return int64(usage.Maxrss)
	}
	return int64(usage.Maxrss) << 10
}

// Exit ends this process as the job ended: by the same signal where that is SIGHUP,
// SIGINT, SIGTERM or SIGKILL, so that a shell or systemd sees it as it would without
// culvert-client, else with Result.ExitCode. Other signals would leave a core dump of
// the wrong program, or none of that name to be seen.
func (r Result) Exit() {
	switch r.Signal {
	case syscall.SIGHUP, syscall.SIGINT, syscall.SIGTERM, syscall.SIGKILL:
		if signal.Ignored(r.Signal) {
			break
		}
		signal.Reset(r.Signal)
		if syscall.Kill(os.Getpid(), r.Signal) == nil {
			time.Sleep(time.Second) // it takes a moment, and no longer
		}
	}
	os.Exit(r.ExitCode)
}
