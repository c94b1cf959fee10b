//go:build !unix

package jobrun

import "os"

var (
	// Caught, so that Ctrl-C ends the job alone, which the console tells itself.
	passedOn   = []os.Signal{os.Interrupt}
	brokenPipe []os.Signal
)

func sentToBoth(os.Signal, int) bool { return true }

// peakMemory: when a process has been waited for, Windows no longer tells.
func peakMemory(*os.ProcessState) int64 { return 0 }

// Exit ends this process with the job's exit code.
func (r Result) Exit() { os.Exit(r.ExitCode) }
