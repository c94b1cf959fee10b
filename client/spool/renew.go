package spool

import (
	"fmt"
	"os"
	"path/filepath"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/culvert-io/culvert/gateway/boltstore"
)

const (
	newSuffix = ".new"
	// renewAbove is the size from which on an empty file is replaced, renewEvery the time
	// between tries.
	renewAbove = 32 << 20
	renewEvery = 10 * time.Second
)

// renew replaces the file, in which there is no push, where it is large. It is called by
// the goroutine of Run, which is the only one that adds a push.
func (s *Spool) renew() {
	if info, err := os.Stat(s.path); err != nil || info.Size() < renewAbove || time.Since(s.renewed) < renewEvery {
		return
	}
	s.renewed = time.Now()
	path := s.path + newSuffix
	if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
		s.logger.Debug("The spool's file stays as large as it is", "err", err)
		return
	}
	s.mu.Lock()
	last, old := s.last, s.db
	positions := map[string]uint64{}
	for name, c := range s.cursors {
		positions[name] = c.position
	}
	s.mu.Unlock()
	// It stays open while it is renamed: nobody else gets its lock.
	db, err := boltstore.OpenDB(path, func(db *bolt.DB) error {
		return db.Update(func(tx *bolt.Tx) error {
			if err := s.create(tx); err != nil {
				return err
			}
			if err := tx.Bucket(pushesBucket).SetSequence(last); err != nil {
				return err
			}
			return putCursors(tx.Bucket(cursorsBucket), positions)
		})
	})
	if err == nil {
		if err = os.Rename(path, s.path); err != nil {
			db.Close()
			os.Remove(path)
		}
	}
	if err != nil { // there is no room, say
		s.logger.Debug("The spool's file stays as large as it is", "err", err)
		return
	}
	s.mu.Lock()
	s.db = db
	s.mu.Unlock()
	// From here on pushes are in the new file, and are lost if the old one comes back.
	if err := syncDirectory(filepath.Dir(s.path)); err != nil {
		s.mu.Lock()
		s.damaged, s.failure = true, fmt.Errorf("flush the directory of %s: %w; restart the agent", s.path, err)
		s.mu.Unlock()
		s.logger.Error("The spool has a new file that a crash of the machine may lose: pushes for it are refused", "err", err)
	}
	if err := old.Close(); err != nil {
		s.logger.Debug("The spool's old file could not be closed", "err", err)
	}
	s.logger.Debug("The spool's file was replaced by a small one")
}

func syncDirectory(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}
