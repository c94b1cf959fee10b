package textfile

import (
	"os"
	"syscall"
)

// changedAt returns when anything of a file changed, in the system's own units: that
// moves on where somebody sets the time of modification back.
func changedAt(info os.FileInfo) [2]int64 {
	if stat, ok := info.Sys().(*syscall.Stat_t); ok {
		return [2]int64{int64(stat.Ctim.Sec), int64(stat.Ctim.Nsec)}
	}
	return [2]int64{}
}
