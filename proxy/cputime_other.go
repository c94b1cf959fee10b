//go:build !unix

package main

import "time"

// cpuTime is not known here: waits alone tell that one processor is not enough.
func cpuTime() time.Duration { return 0 }
