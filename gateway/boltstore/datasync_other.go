//go:build !linux

package boltstore

import "os"

// datasync returns when what was written to the file is on disk.
func datasync(file *os.File) error { return file.Sync() }

// syncDir does nothing: not all systems have directories synced.
func syncDir(string) error { return nil }
