// Package boltstore keeps the push store's groups in a bbolt file.
package boltstore

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"time"

	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"

	"github.com/culvert-io/culvert/gateway"
)

// Errors of Open and OpenDB.
var (
	// ErrInUse: another process has the file open.
	ErrInUse = errors.New("another process uses this file; give each process a --storage.path of its own")
	// ErrDamaged: the file is there and can't be read. It was not changed.
	ErrDamaged = errors.New("the file is damaged and was left as it is; move it away to start with an empty one")
)

// OpenDB opens or creates a bbolt file, and has read look at it. It returns
// ErrInUse, ErrDamaged or an error of the file system, each with the path. What
// read returns counts as damage; so does a crash in it: a damaged page makes
// bbolt panic, a file that was cut short makes the memory map fault.
func OpenDB(path string, read func(*bolt.DB) error) (db *bolt.DB, err error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o750); err != nil {
		return nil, err
	}
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%v", p)
		}
		if err == nil {
			return
		}
		if db != nil {
			db.Close()
			db = nil
		}
		var fileError *os.PathError
		switch {
		case errors.Is(err, berrors.ErrTimeout):
			err = fmt.Errorf("%s: %w", path, ErrInUse)
		case errors.As(err, &fileError):
		default:
			err = fmt.Errorf("%s: %w (%w)", path, ErrDamaged, err)
		}
	}()
	// With NoFreelistSync bbolt would walk all pages here, in a goroutine of its
	// own, whose panics nobody could recover from.
	db, err = bolt.Open(path, 0o600, &bolt.Options{Timeout: 2 * time.Second, FreelistType: bolt.FreelistMapType})
	if err != nil {
		return nil, err
	}
	return db, read(db)
}

var groupsBucket = []byte("groups")

// Store is a gateway.Backend in a bbolt file: one record a group, in the bucket
// "groups", under the key's ID.
type Store struct {
	db      *bolt.DB
	records []gateway.Record // between Open and Load
}

// Open opens or creates the file and reads all of it.
func Open(path string) (*Store, error) {
	s := new(Store)
	var err error
	s.db, err = OpenDB(path, func(db *bolt.DB) error {
		exists := false
		err := db.View(func(tx *bolt.Tx) error {
			b := tx.Bucket(groupsBucket)
			if exists = b != nil; !exists {
				return nil
			}
			return b.ForEach(func(_, value []byte) error {
				var rec gateway.Record
				if err := rec.UnmarshalBinary(value); err != nil {
					return err
				}
				s.records = append(s.records, rec)
				return nil
			})
		})
		if err != nil || exists {
			return err
		}
		return db.Update(func(tx *bolt.Tx) error {
			_, err := tx.CreateBucket(groupsBucket)
			return err
		})
	})
	if err != nil {
		return nil, err
	}
	return s, nil
}

// Load implements gateway.Backend.
func (s *Store) Load(f func(gateway.Record) error) error {
	records := s.records
	s.records = nil
	for _, rec := range records {
		if err := f(rec); err != nil {
			return err
		}
	}
	return nil
}

// Apply implements gateway.Backend, in one transaction.
func (s *Store) Apply(changes []gateway.Change) error {
	return s.db.Update(func(tx *bolt.Tx) error {
		b := tx.Bucket(groupsBucket)
		for _, c := range changes {
			if c.Record == nil {
				if err := b.Delete([]byte(c.ID)); err != nil {
					return err
				}
				continue
			}
			value, err := c.Record.MarshalBinary()
			if err != nil {
				return err
			}
			if err := b.Put([]byte(c.ID), value); err != nil {
				return err
			}
		}
		return nil
	})
}

// Probe implements gateway.Backend.
func (s *Store) Probe() error {
	bucket := []byte("probe")
	err := s.db.Update(func(tx *bolt.Tx) error {
		b, err := tx.CreateBucketIfNotExists(bucket)
		if err != nil {
			return err
		}
		return b.Put(bucket, make([]byte, 1<<20))
	})
	if err != nil {
		return err
	}
	return s.db.Update(func(tx *bolt.Tx) error { return tx.DeleteBucket(bucket) })
}

// Close implements gateway.Backend.
func (s *Store) Close() error { return s.db.Close() }
