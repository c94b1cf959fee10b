// Package boltstore keeps the push store's groups and the marks of its spools in a bbolt
// file, with a log in front of it.
package boltstore

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"log/slog"
	"maps"
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

// Store is a gateway.Backend in a bbolt file, push.db say, and its log, push.db.log0 and
// push.db.log1.
//
// A change is acknowledged when it is in the log: one write and one flush for all that
// waited. bbolt's own commit costs two flushes and, at 10,000 groups, dozens of random
// pages for each change. The database gets many changes in one transaction, of a group
// that changed often only the last one; the transaction notes up to which change it
// goes. What the log has beyond that is read again at start.
//
// The database has one record a group in the bucket "groups", under a hash of the key's
// ID, and one mark a spool in the bucket "spools", under the spool's name; a bucket's
// sequence is the number of what is in it.
type Store struct {
	path    string
	logger  *slog.Logger
	db      *bolt.DB // nil: it can't be written
	log     *commitLog
	records []gateway.Record // between Open and Load
	marks   []gateway.Mark   // the same

	// err is why nothing can be written: the file can't, or turned out damaged.
	err     error
	damaged bool

	saveAt int64 // see logFactor
	// pending is what is in the log alone.
	pending *unsaved
	// saving is what a goroutine writes to the database now, nil: none does.
	saving *unsaved
	saved  chan error
	// saveErr is why the last try to write to the database failed.
	saveErr error
}

// unsaved is what a transaction has to bring to the database.
type unsaved struct {
	groups map[groupKey]*gateway.Record // the last one of each, nil where it is gone
	marks  map[string]gateway.Mark      // the last one of each spool
}

func newUnsaved() *unsaved {
	return &unsaved{map[groupKey]*gateway.Record{}, map[string]gateway.Mark{}}
}

var (
	groupsBucket = []byte("groups")
	spoolsBucket = []byte("spools")

	// logBucket has under logKey, little-endian, the 8 bytes that the log's frames start
	// with, 8 of the number of the last change that is in the database, and 4 of the CRC-32C
	// of the two.
	logBucket = []byte("log")
	logKey    = []byte("log")
)

// firstTx is the number of the transaction that bbolt makes a new file with.
const firstTx = 1

// groupKey is where a group's record stands. IDs are long: as keys they would make the
// tree deeper, and each commit writes all pages on its way down.
type groupKey [16]byte

func keyOf(id string) groupKey {
	sum := sha256.Sum256([]byte(id))
	return groupKey(sum[:len(groupKey{})])
}

// What is in the log goes to the database when the active file has saveAt bytes: logFactor
// times those of the database, and at least minSaveAt, at most maxSaveAt. The more groups
// there are the more of them have changed by then, and each costs as much as a push. Where
// the file has twice as many, changes wait for that.
const (
	logFactor = 8
	minSaveAt = 16 << 20
	maxSaveAt = 128 << 20
)

// Open opens or creates the files and reads all of them. Files that can be read but not
// written give a store whose Apply fails until Probe finds that it can. Logger tells
// what was found beside them, slog.Default by default.
func Open(path string, logger *slog.Logger) (*Store, error) {
	if logger == nil {
		logger = slog.Default()
	}
	s := &Store{path: path, logger: logger, pending: newUnsaved()}
	err := s.openForWriting(s.readAll)
	switch {
	case err == nil:
	case s.records != nil && !errors.Is(err, ErrDamaged):
		s.err = err // all was read; there is no room to tidy up, say
	case errors.Is(err, fs.ErrPermission) || errors.Is(err, syscall.EROFS):
		if readErr := s.readOnly(); readErr != nil {
			return nil, errors.Join(err, readErr)
		}
		s.err = err
	default:
		return nil, err
	}
	return s, nil
}

// openForWriting opens the database, has read look at it and at what the log has beyond
// it, and brings the two together.
func (s *Store) openForWriting(read func(*bolt.Tx, *remainder) error) (err error) {
	beyond := new(remainder)
	db, err := OpenDB(s.path, func(db *bolt.DB) error {
		exists := false
		err := db.View(func(tx *bolt.Tx) (err error) {
			if exists = tx.ID() > firstTx; !exists {
				return nil
			}
			if beyond, err = s.readLog(tx); err == nil {
				err = read(tx, beyond)
			}
			return err
		})
		if err != nil || exists {
			return err
		}
		return db.Update(create)
	})
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			s.log.close()
			db.Close()
		}
	}()
	if s.log == nil { // the database is new
		err := db.View(func(tx *bolt.Tx) error { _, err := s.newLog(tx); return err })
		if err != nil {
			return err
		}
	}
	moved, err := s.log.moveForeign()
	for _, path := range moved {
		s.logger.Warn("A log that belongs to another push store was moved away", "to", path)
	}
	if err != nil {
		return err
	}
	// From here on the log is overwritten.
	if len(beyond.groups) > 0 || len(beyond.marks) > 0 {
		err := put(db, s.path, slices.Collect(maps.Keys(beyond.groups)), func(key groupKey, before []byte) ([]byte, error) {
			return beyond.groups[key].packed(before)
		}, beyond.marks, s.log.store, beyond.last)
		if err != nil {
			return err
		}
	}
	if err := s.log.open(beyond.last); err != nil {
		return err
	}
	s.db = db
	s.fitLog()
	return nil
}

// create makes the buckets of a new database.
func create(tx *bolt.Tx) error {
	var id [8]byte
	rand.Read(id[:])
	id[0] |= 1 // never 0
	if _, err := tx.CreateBucket(groupsBucket); err != nil {
		return err
	}
	if _, err := tx.CreateBucket(spoolsBucket); err != nil {
		return err
	}
	if _, err := tx.CreateBucket(logBucket); err != nil {
		return err
	}
	return noteApplied(tx, binary.LittleEndian.Uint64(id[:]), 0)
}

// noteApplied notes which log belongs to the database, and up to which change of it.
func noteApplied(tx *bolt.Tx, store, applied uint64) error {
	value := binary.LittleEndian.AppendUint64(nil, store)
	value = binary.LittleEndian.AppendUint64(value, applied)
	return tx.Bucket(logBucket).Put(logKey, binary.LittleEndian.AppendUint32(value, crc32.Checksum(value, castagnoli)))
}

// newLog sets the log that belongs to the database, and returns up to which change of it
// that goes.
func (s *Store) newLog(tx *bolt.Tx) (applied uint64, err error) {
	var value []byte
	if b := tx.Bucket(logBucket); b != nil {
		value = b.Get(logKey)
	}
	if len(value) != 20 || binary.LittleEndian.Uint32(value[16:]) != crc32.Checksum(value[:16], castagnoli) {
		return 0, errors.New("it doesn't tell which log belongs to it")
	}
	s.log = newCommitLog(s.path, binary.LittleEndian.Uint64(value))
	return binary.LittleEndian.Uint64(value[8:]), nil
}

// logged is what the log has of a group: a record, or that it is gone, or neither; and
// what the last repetition of that changes, if there is one.
type logged struct {
	record []byte // packed
	gone   bool
	repeat []byte
}

// packed returns the group's last record, packed, or nil where it is gone, given what
// the database has.
func (l logged) packed(before []byte) ([]byte, error) {
	if l.gone {
		return nil, nil
	}
	if l.record != nil {
		before = l.record
	}
	if l.repeat == nil {
		return before, nil
	}
	record, err := gateway.Unpack(before)
	if err == nil {
		record, err = gateway.ApplyRepeat(record, l.repeat)
	}
	if err != nil {
		return nil, fmt.Errorf("a record that the log repeats: %w", err)
	}
	return gateway.Pack(record), nil
}

// remainder is what the log has beyond the database.
type remainder struct {
	groups map[groupKey]logged
	marks  map[string]gateway.Mark // the last one of each spool
	last   uint64                  // the number of its last change
}

// readLog returns what the log has beyond the database.
func (s *Store) readLog(tx *bolt.Tx) (*remainder, error) {
	applied, err := s.newLog(tx)
	if err != nil {
		return nil, err
	}
	all, marks := map[groupKey]logged{}, map[string]gateway.Mark{}
	last, err := s.log.replay(applied, func(payload []byte) error {
		for len(payload) > 0 {
			key, kind, content, rest, err := cutChange(payload)
			if err != nil {
				return err
			}
			payload = rest
			switch l := all[key]; kind {
			case changeGone:
				all[key] = logged{gone: true}
			case changeRecord:
				all[key] = logged{record: gateway.Pack(content)}
			case changeRepeat:
				if l.gone {
					return errors.New("it repeats a group that is gone")
				}
				l.repeat = append(l.repeat[:0], content...)
				all[key] = l
			case changeMark:
				var m gateway.Mark
				if err := m.UnmarshalBinary(content); err != nil {
					return err
				}
				marks[m.Spool] = m
			default:
				return fmt.Errorf("it is of kind %d, which this program doesn't know", kind)
			}
		}
		return nil
	})
	return &remainder{all, marks, last}, err
}

// readOnly reads the files without opening them for writing.
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
	return db.View(func(tx *bolt.Tx) error {
		if tx.ID() <= firstTx {
			return nil
		}
		beyond, err := s.readLog(tx)
		if err != nil {
			return err
		}
		return s.readAll(tx, beyond)
	})
}

// readAll reads all marks and records. It returns an error for whatever is not as Apply
// left it: a store that opens in spite of damage would lose more with each write.
func (s *Store) readAll(tx *bolt.Tx, beyond *remainder) error {
	s.records, s.marks = nil, nil
	b := tx.Bucket(groupsBucket)
	if b == nil {
		return errors.New("the groups are missing")
	}
	if info, err := os.Stat(s.path); err != nil || info.Size() < tx.Size() {
		return errors.Join(err, fmt.Errorf("the file was cut short: it should have at least %d bytes", tx.Size()))
	}
	packed := map[groupKey][]byte{}
	err := b.ForEach(func(key, value []byte) error {
		if len(key) != len(groupKey{}) {
			return fmt.Errorf("a record stands under the key %x", key)
		}
		// What faults or panics has to do so here, where it is recovered from.
		packed[groupKey(key)] = bytes.Clone(value)
		return nil
	})
	if err != nil {
		return err
	}
	if n := b.Sequence(); n != uint64(len(packed)) {
		return fmt.Errorf("there are %d groups, and there should be %d", len(packed), n)
	}
	marks := map[string]gateway.Mark{}
	if spools := tx.Bucket(spoolsBucket); spools != nil { // a file of before there were spools lacks it
		err := spools.ForEach(func(key, value []byte) error {
			var m gateway.Mark
			mark, err := gateway.Unpack(value)
			if err == nil {
				err = m.UnmarshalBinary(mark)
			}
			if err == nil && m.Spool != string(key) {
				err = errors.New("it stands under another name")
			}
			if err != nil {
				return fmt.Errorf("spool %q: %w", key, err)
			}
			marks[m.Spool] = m
			return nil
		})
		if err != nil {
			return err
		}
		if n := spools.Sequence(); n != uint64(len(marks)) {
			return fmt.Errorf("there are %d spools, and there should be %d", len(marks), n)
		}
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
	maps.Copy(marks, beyond.marks)
	for _, m := range marks {
		if m.Seq != 0 {
			s.marks = append(s.marks, m)
		}
	}
	for key, l := range beyond.groups {
		if packed[key], err = l.packed(packed[key]); err != nil {
			return err
		}
		if packed[key] == nil {
			delete(packed, key)
		}
	}
	keys := slices.Collect(maps.Keys(packed))
	s.records = make([]gateway.Record, len(keys))
	var all errgroup.Group
	all.SetLimit(runtime.GOMAXPROCS(0))
	for start := 0; start < len(keys); start += 256 {
		all.Go(func() error {
			for i := start; i < min(start+256, len(keys)); i++ {
				record, err := gateway.Unpack(packed[keys[i]])
				if err == nil {
					err = s.records[i].UnmarshalBinary(record)
				}
				if err != nil {
					return err
				}
				if keyOf(s.records[i].Key.ID()) != keys[i] {
					return fmt.Errorf("the record of the group %s stands under another key", s.records[i].Key)
				}
			}
			return nil
		})
	}
	return all.Wait()
}

// Load implements gateway.Backend.
func (s *Store) Load(group func(gateway.Record) error, mark func(gateway.Mark) error) error {
	records, marks := s.records, s.marks
	s.records, s.marks = nil, nil
	for _, rec := range records {
		if err := group(rec); err != nil {
			return err
		}
	}
	for _, m := range marks {
		if err := mark(m); err != nil {
			return err
		}
	}
	if s.err != nil {
		return fmt.Errorf("%w: %w", gateway.ErrReadOnly, s.err)
	}
	return nil
}

// Apply implements gateway.Backend, with one frame of the log.
func (s *Store) Apply(changes []gateway.Change, marks []gateway.Mark) error {
	if s.err != nil {
		return s.err
	}
	if s.finishSave(s.log.end > 2*s.saveAt); s.err != nil {
		return s.err
	}
	brings := slices.ContainsFunc(changes, func(c gateway.Change) bool { return c.Record != nil })
	if s.saveErr != nil && (brings || s.log.end > 2*s.saveAt) {
		return s.saveErr
	}
	frame := s.log.frameStart()
	keys := make([]groupKey, len(changes))
	for i, c := range changes {
		keys[i] = keyOf(c.ID)
		var err error
		if frame, err = appendChange(frame, keys[i], c); err != nil {
			return err
		}
	}
	for _, m := range marks {
		var err error
		if frame, err = appendContent(frame, keyOf(m.Spool), changeMark, m.AppendBinary); err != nil {
			return err
		}
	}
	err := s.log.write(frame)
	if errors.Is(err, syscall.ENOSPC) && s.save() == nil {
		err = s.log.write(frame) // what the log had is in the database, and its place is free
	}
	if err != nil {
		return err
	}
	for i, c := range changes {
		s.pending.groups[keys[i]] = c.Record
	}
	for _, m := range marks {
		s.pending.marks[m.Spool] = m
	}
	if s.log.end >= s.saveAt && s.saving == nil && s.saveErr == nil {
		s.startSave()
	}
	return nil
}

// Probe implements gateway.Backend.
func (s *Store) Probe() error {
	if s.damaged {
		return s.err
	}
	if s.err != nil {
		if err := s.openForWriting(func(*bolt.Tx, *remainder) error { return nil }); err != nil {
			return err
		}
		s.err = nil
	}
	if err := s.save(); err != nil {
		return err
	}
	const size = growth
	if err := s.log.probe(size); err != nil {
		return err
	}
	bucket := []byte("probe")
	err := update(s.db, s.path, func(tx *bolt.Tx) error {
		b, err := tx.CreateBucketIfNotExists(bucket)
		if err != nil {
			return err
		}
		return b.Put(bucket, make([]byte, size))
	})
	if err == nil {
		err = update(s.db, s.path, func(tx *bolt.Tx) error { return tx.DeleteBucket(bucket) })
	}
	s.noteSave(err)
	return err
}

// Close implements gateway.Backend. It leaves all in the database, where that can be
// written.
func (s *Store) Close() error {
	if s.db == nil {
		return nil
	}
	s.finishSave(true)
	if s.damaged {
		return nil // a lock that the panic left held would make it wait for ever
	}
	if len(s.pending.groups) > 0 || len(s.pending.marks) > 0 {
		if err := s.save(); err != nil {
			s.logger.Warn("The push store could not be tidied up; nothing is lost, its log has all changes", "err", err)
		}
	}
	if s.damaged {
		return nil
	}
	return errors.Join(s.log.close(), s.db.Close())
}
