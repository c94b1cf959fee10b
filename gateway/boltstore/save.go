package boltstore

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"sort"

	bolt "go.etcd.io/bbolt"

	"github.com/culvert-io/culvert/gateway"
)

// startSave has a goroutine write what is pending to the database, while changes go to
// the other file of the log: all that is in there is in the database.
func (s *Store) startSave() {
	saving, last := s.pending, s.log.tried
	s.saving, s.pending, s.saved = saving, newUnsaved(), make(chan error, 1)
	s.log.turn()
	go func() { s.saved <- s.saveTo(saving, last) }()
}

// finishSave notes how startSave's goroutine ended, if it has, or waits for it.
func (s *Store) finishSave(wait bool) {
	if s.saving == nil {
		return
	}
	var err error
	if wait {
		err = <-s.saved
	} else {
		select {
		case err = <-s.saved:
		default:
			return
		}
	}
	if err != nil {
		// What is pending is newer.
		maps.Copy(s.saving.groups, s.pending.groups)
		maps.Copy(s.saving.marks, s.pending.marks)
		s.pending = s.saving
	}
	s.saving = nil
	s.noteSave(err)
}

func (s *Store) noteSave(err error) {
	s.saveErr = err
	if errors.Is(err, ErrDamaged) {
		s.damaged, s.err = true, err
	} else if err == nil {
		s.fitLog()
	}
}

// fitLog fits saveAt to the database.
func (s *Store) fitLog() {
	var size int64
	if info, err := os.Stat(s.path); err == nil {
		size = info.Size()
	}
	s.saveAt = min(max(logFactor*size, minSaveAt), maxSaveAt)
}

// save writes what is pending to the database now, and begins the log anew.
func (s *Store) save() error {
	if s.finishSave(true); s.err != nil {
		return s.err
	}
	err := s.saveTo(s.pending, s.log.tried)
	if s.noteSave(err); err != nil {
		return err
	}
	s.pending = newUnsaved()
	s.log.turn()
	return nil
}

// saveTo writes what is unsaved to the database, which then has all changes up to the
// given one. It uses nothing of s that changes.
func (s *Store) saveTo(what *unsaved, last uint64) error {
	var plain []byte
	return put(s.db, s.path, slices.Collect(maps.Keys(what.groups)), func(key groupKey, _ []byte) ([]byte, error) {
		record := what.groups[key]
		if record == nil {
			return nil, nil
		}
		var err error
		if plain, err = record.AppendBinary(plain[:0]); err != nil {
			return nil, err
		}
		return gateway.Pack(plain), nil
	}, what.marks, s.log.store, last)
}

// putTogether is how many groups are written in one transaction: bbolt keeps all pages
// in memory that a transaction changes.
const putTogether = 512

// put writes the records of groups, which the function returns, packed, given what is
// there; nil: the group is gone. It notes behind the last transaction up to which change
// of the log the database goes. After a crash before that the log is read again, and has
// all that the records were made from: they come out the same.
func put(db *bolt.DB, path string, keys []groupKey, record func(key groupKey, before []byte) ([]byte, error), marks map[string]gateway.Mark, store, last uint64) error {
	sort.Slice(keys, func(i, j int) bool { return bytes.Compare(keys[i][:], keys[j][:]) < 0 })
	for some := range slices.Chunk(keys, putTogether) {
		if err := update(db, path, func(tx *bolt.Tx) error { return putGroups(tx, some, record) }); err != nil {
			return err
		}
	}
	return update(db, path, func(tx *bolt.Tx) error {
		if err := putMarks(tx, marks); err != nil {
			return err
		}
		return noteApplied(tx, store, last)
	})
}

func putGroups(tx *bolt.Tx, keys []groupKey, record func(key groupKey, before []byte) ([]byte, error)) error {
	b := tx.Bucket(groupsBucket)
	b.FillPercent = 0.9 // records of a group are of one size: there is no need for room in each page
	n := b.Sequence()
	for _, key := range keys {
		runtime.Gosched() // who pushes meanwhile must not wait for the processor
		before := b.Get(key[:])
		packed, err := record(key, before)
		if err != nil {
			return err
		}
		switch {
		case packed == nil && before != nil:
			n--
		case packed != nil && before == nil:
			n++
		}
		if packed == nil {
			err = b.Delete(key[:])
		} else {
			err = b.Put(key[:], packed)
		}
		if err != nil {
			return err
		}
	}
	return b.SetSequence(n)
}

func putMarks(tx *bolt.Tx, marks map[string]gateway.Mark) error {
	if len(marks) == 0 {
		return nil
	}
	b, err := tx.CreateBucketIfNotExists(spoolsBucket)
	if err != nil {
		return err
	}
	n := b.Sequence()
	for _, name := range slices.Sorted(maps.Keys(marks)) {
		m, exists := marks[name], b.Get([]byte(name)) != nil
		if m.Seq == 0 {
			if exists {
				n--
			}
			if err := b.Delete([]byte(name)); err != nil {
				return err
			}
			continue
		}
		if !exists {
			n++
		}
		mark, err := m.AppendBinary(nil)
		if err != nil {
			return err
		}
		if err := b.Put([]byte(name), gateway.Pack(mark)); err != nil {
			return err
		}
	}
	return b.SetSequence(n)
}

// update changes the database in one transaction. It returns ErrDamaged, wrapped, where
// bbolt panicked: nothing may be written from then on.
func update(db *bolt.DB, path string, change func(*bolt.Tx) error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%s: %w (%v)", path, ErrDamaged, p)
		}
	}()
	return db.Update(change)
}
