// Package boltstore keeps the push store's groups in a bbolt file.
package boltstore

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"syscall"
	"time"

	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
	"golang.org/x/sync/errgroup"

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
	// What is left of a file that could not be created would look damaged.
	info, statErr := os.Stat(path)
	created := statErr != nil || info.Size() == 0
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
		case created:
			os.Remove(path)
			err = fmt.Errorf("create %s: %w", path, err)
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
// "groups", under a hash of the key's ID. The bucket's sequence is the number of
// records.
type Store struct {
	path    string
	db      *bolt.DB         // nil where err isn't
	records []gateway.Record // between Open and Load

	// err is why nothing can be written: the file can't, or turned out damaged.
	err     error
	damaged bool
}

// keyOf returns where a group's record stands. IDs are long: as keys they would make
// the tree deeper, and each commit writes all pages on its way down.
func keyOf(id string) []byte {
	sum := sha256.Sum256([]byte(id))
	return sum[:16]
}

// Open opens or creates the file and reads all of it. A file that can be read but
// not written gives a store whose Apply fails until Probe finds that it can.
func Open(path string) (*Store, error) {
	s := &Store{path: path}
	db, err := OpenDB(path, s.read)
	if errors.Is(err, fs.ErrPermission) || errors.Is(err, syscall.EROFS) {
		if readErr := s.readOnly(); readErr != nil {
			return nil, errors.Join(err, readErr)
		}
		s.err = err
		return s, nil
	}
	s.db = db
	return s, err
}

// readOnly reads the file without opening it for writing.
func (s *Store) readOnly() (err error) {
	if _, err := os.Stat(s.path); err != nil {
		return nil // there is nothing to read yet
	}
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%s: %w (%v)", s.path, ErrDamaged, p)
		}
	}()
	db, err := bolt.Open(s.path, 0o600, &bolt.Options{Timeout: 2 * time.Second, ReadOnly: true})
	if err != nil {
		return err
	}
	defer db.Close()
	return db.View(s.readGroups)
}

// read reads the groups, and creates their bucket in a new file.
func (s *Store) read(db *bolt.DB) error {
	exists := false
	err := db.View(func(tx *bolt.Tx) error {
		if exists = tx.Bucket(groupsBucket) != nil; !exists {
			return nil
		}
		return s.readGroups(tx)
	})
	if err != nil || exists {
		return err
	}
	return db.Update(func(tx *bolt.Tx) error {
		_, err := tx.CreateBucket(groupsBucket)
		return err
	})
}

// readGroups reads all records. It returns an error for whatever is not as Apply
// left it: a store that opens in spite of damage would lose more with each write.
func (s *Store) readGroups(tx *bolt.Tx) error {
	s.records = nil
	b := tx.Bucket(groupsBucket)
	if b == nil {
		return nil
	}
	if info, err := os.Stat(s.path); err != nil || info.Size() < tx.Size() {
		return errors.Join(err, fmt.Errorf("the file was cut short: it should have at least %d bytes", tx.Size()))
	}
	var keys, values [][]byte
	err := b.ForEach(func(key, value []byte) error {
		// What faults or panics has to do so here, where it is recovered from.
		keys, values = append(keys, bytes.Clone(key)), append(values, bytes.Clone(value))
		return nil
	})
	if err != nil {
		return err
	}
	if n := b.Sequence(); n != uint64(len(keys)) {
		return fmt.Errorf("there are %d groups, and there should be %d", len(keys), n)
	}
	var problem error
	for p := range tx.Check() { // to its end: who checks waits for its reader
		if problem == nil {
			problem = p
		}
	}
	if problem != nil {
		return problem
	}
	s.records = make([]gateway.Record, len(keys))
	var all errgroup.Group
	all.SetLimit(runtime.GOMAXPROCS(0))
	for part := range slices.Chunk(s.records, 256) {
		partKeys, partValues := keys[:len(part)], values[:len(part)]
		keys, values = keys[len(part):], values[len(part):]
		all.Go(func() error {
			for i := range part {
				if err := part[i].UnmarshalBinary(partValues[i]); err != nil {
					return err
				}
				if !bytes.Equal(keyOf(part[i].Key.ID()), partKeys[i]) {
					return fmt.Errorf("the record of the group %s stands under another key", part[i].Key)
				}
			}
			return nil
		})
	}
	return all.Wait()
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
	if s.err != nil {
		return fmt.Errorf("%w: %w", gateway.ErrReadOnly, s.err)
	}
	return nil
}

// Apply implements gateway.Backend, in one transaction.
func (s *Store) Apply(changes []gateway.Change) error {
	return s.update(func(tx *bolt.Tx) error {
		b := tx.Bucket(groupsBucket)
		n := b.Sequence()
		for _, c := range changes {
			key := keyOf(c.ID)
			exists := b.Get(key) != nil
			if c.Record == nil {
				if err := b.Delete(key); err != nil {
					return err
				}
				if exists {
					n--
				}
				continue
			}
			value, err := c.Record.MarshalBinary()
			if err != nil {
				return err
			}
			if err := b.Put(key, value); err != nil {
				return err
			}
			if !exists {
				n++
			}
		}
		return b.SetSequence(n)
	})
}

// update changes the file in one transaction. bbolt panics where it meets damage:
// nothing is written from then on.
func (s *Store) update(change func(*bolt.Tx) error) (err error) {
	if s.err != nil {
		return s.err
	}
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			s.damaged, s.err = true, fmt.Errorf("%s: %w (%v)", s.path, ErrDamaged, p)
			err = s.err
		}
	}()
	return s.db.Update(change)
}

// Probe implements gateway.Backend.
func (s *Store) Probe() error {
	if s.err != nil && !s.damaged {
		db, err := OpenDB(s.path, func(db *bolt.DB) error {
			return db.Update(func(tx *bolt.Tx) error {
				_, err := tx.CreateBucketIfNotExists(groupsBucket)
				return err
			})
		})
		if err != nil {
			return err
		}
		s.db, s.err = db, nil
	}
	bucket := []byte("probe")
	err := s.update(func(tx *bolt.Tx) error {
		b, err := tx.CreateBucketIfNotExists(bucket)
		if err != nil {
			return err
		}
		return b.Put(bucket, make([]byte, 1<<20))
	})
	if err != nil {
		return err
	}
	return s.update(func(tx *bolt.Tx) error { return tx.DeleteBucket(bucket) })
}

// Close implements gateway.Backend.
func (s *Store) Close() error {
	if s.db == nil || s.damaged {
		return nil // a lock that the panic left held would make it wait for ever
	}
	return s.db.Close()
}
