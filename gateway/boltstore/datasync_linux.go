package boltstore

import (
	"os"
	"syscall"
)

// datasync returns when what was written to the file is on disk, and its size where
// that matters.
func datasync(file *os.File) error {
	for {
		if err := syscall.Fdatasync(int(file.Fd())); err != syscall.EINTR {
			return err
		}
	}
}

// syncDir returns when the names of new files are on disk.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
