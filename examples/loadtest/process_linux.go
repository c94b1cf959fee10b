package main

import "syscall"

// childAttributes keeps Ctrl-C in a terminal from reaching the programs, which are
// ended in order instead, and ends them where this process is killed.
func childAttributes() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
}

// fileLimit returns how many files a process may have open, or 0 where that is not
// known. Go programs raise the soft limit to the hard one when they start.
func fileLimit() int {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return 0
	}
	return int(min(limit.Cur, 1<<30))
}
