// Package spool is a queue on disk of the pushes that an agent has taken and its proxies
// have not yet.
//
// Each push gets a number, higher than all before it. Each proxy has a cursor: up to which
// number it has them. A push goes when all cursors have passed it.
//
// # The file
//
// A spool is a bbolt file with three buckets. "spool" has under "id" the spool's random
// ID, "pushes" the pushes under their numbers, as 8 bytes, big-endian, and "cursors" the
// positions of the cursors under their names. Every value ends with the CRC-32C of key and
// value, in 4 bytes, little-endian. The sequence of the bucket "pushes" is the highest
// number that was ever given.
//
// bbolt never gives back space, and notes all that is free with each commit. So a file
// that has grown, in a long time without a proxy, is replaced by a new one once it is
// empty: spool.db.new is renamed to spool.db.
package spool

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"log/slog"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/culvert-io/culvert/gateway/boltstore"
)

// Errors of Append.
var (
	// ErrFull: there is no room. It comes again when a proxy has taken something.
	ErrFull = errors.New("the spool is full")
	// ErrTooLarge: the push alone is more than Config.MaxBytes.
	ErrTooLarge = errors.New("the push is larger than the whole spool")
	// ErrUnavailable wraps why nothing can be written.
	ErrUnavailable = errors.New("the spool can't be written")
	// ErrBusy: the push waited too long for its turn.
	ErrBusy = errors.New("the spool is busy")
)

const (
	// DefaultMaxBytes is Config.MaxBytes where that is 0.
	DefaultMaxBytes = 256 << 20
	// overhead is what a push counts for beside its content: the rest of its place in
	// the file, and in memory.
	overhead = 128

	queueSize = 1000
	// maxBatch bounds the pushes that are stored together.
	maxBatch = 256
	// queueWait is how long a push waits for a place in the queue.
	queueWait = 5 * time.Second
	// flushAfter is how long a cursor may have moved without being stored. A crash then
	// sends again what was sent since.
	flushAfter = 100 * time.Millisecond
	// retryAfter is the time between tries to store the cursors after a failure.
	retryAfter = 5 * time.Second
	// readPushes and readBytes bound what a cursor reads ahead.
	readPushes, readBytes = 256, 1 << 20
	// tellTrims is the time between log lines that tell of trims.
	tellTrims = time.Minute
)

var (
	spoolBucket   = []byte("spool")
	idKey         = []byte("id")
	pushesBucket  = []byte("pushes")
	cursorsBucket = []byte("cursors")

	castagnoli = crc32.MakeTable(crc32.Castagnoli)
)

// Config tunes a spool. Zero values mean the defaults.
type Config struct {
	// MaxBytes bounds the spool: 256 MiB by default. The file takes some more.
	MaxBytes int64
	// Logger is slog.Default by default.
	Logger *slog.Logger
}

// Spool is an open spool. One goroutine, that of Run, writes.
type Spool struct {
	path   string
	logger *slog.Logger
	id     string
	queue  chan *appending
	moved  chan struct{} // a cursor has
	done   chan struct{} // Run has ended

	renewed time.Time // when Run last tried to replace a large file

	mu       sync.Mutex // protects what follows
	db       *bolt.DB   // changed by Run alone
	maxBytes int64
	entries  []entry // that some cursor has yet to pass, by number
	begin    int64   // entry.end of the last one that went
	last     uint64  // the highest number that was given
	cursors  map[string]*Cursor
	dropped  []string // names of cursors that are still in the file
	dirty    bool     // what is in memory of cursors is not in the file
	appended chan struct{}
	failure  error // of the last write
	damaged  bool  // nothing may be written or read any more
	stats    Stats
}

// entry is what stays in memory of a push.
type entry struct {
	seq      uint64
	end      int64 // sum of the sizes of all pushes since Open up to this one
	received int64 // Unix nanoseconds
}

// appending is a push on its way to the file.
type appending struct {
	push  *Push
	value []byte
	reply chan error // buffered
}

// Stats are for metrics.
type Stats struct {
	Bytes    int64 // of what some proxy has yet to get
	MaxBytes int64
	Refused  uint64 // pushes that were refused because there was no room
	Cursors  map[string]CursorStats
}

// CursorStats tell of what a proxy has yet to get.
type CursorStats struct {
	Pushes int
	Bytes  int64
	Oldest time.Time // zero: there is none
	// Trimmed counts the pushes that were dropped to make room.
	Trimmed uint64
}

// Open opens or creates a spool. It reads all of it, and returns boltstore.ErrInUse,
// boltstore.ErrDamaged or an error of the file system, each with the path. A damaged file
// is left as it is.
//
// Until Configure has named the proxies, nothing goes.
func Open(path string, config Config) (*Spool, error) {
	s := &Spool{
		path: path, logger: config.Logger, maxBytes: cmp.Or(config.MaxBytes, DefaultMaxBytes),
		queue: make(chan *appending, queueSize), moved: make(chan struct{}, 1), done: make(chan struct{}),
		cursors: map[string]*Cursor{}, appended: make(chan struct{}),
	}
	if s.logger == nil {
		s.logger = slog.Default()
	}
	id := make([]byte, 16)
	rand.Read(id)
	var err error
	s.db, err = boltstore.OpenDB(path, func(db *bolt.DB) error {
		exists := false
		err := db.View(func(tx *bolt.Tx) error {
			if exists = tx.ID() > firstTx; !exists {
				return nil
			}
			return s.load(tx)
		})
		if err != nil || exists {
			return err
		}
		s.id = hex.EncodeToString(id)
		return db.Update(s.create)
	})
	if err != nil {
		return nil, err
	}
	_ = os.Remove(path + newSuffix) // a crash may have left it
	// A file that came back from a backup must not give a number twice: the stores take
	// what has an old one for a repetition. So the numbers go on at the time of the day,
	// which is ahead of them as long as there is less than one push a microsecond.
	s.last = max(s.last, uint64(time.Now().UnixMicro()))
	return s, nil
}

// firstTx is the number of the transaction that bbolt makes a new file with.
const firstTx = 1

func (s *Spool) create(tx *bolt.Tx) error {
	for _, name := range [][]byte{spoolBucket, pushesBucket, cursorsBucket} {
		if _, err := tx.CreateBucket(name); err != nil {
			return err
		}
	}
	return tx.Bucket(spoolBucket).Put(idKey, seal(idKey, []byte(s.id)))
}

// load reads the file. It returns an error for whatever is not as commit left it.
func (s *Spool) load(tx *bolt.Tx) error {
	if info, err := os.Stat(s.path); err != nil || info.Size() < tx.Size() {
		return errors.Join(err, fmt.Errorf("the file was cut short: it should have at least %d bytes", tx.Size()))
	}
	about, pushes, cursors := tx.Bucket(spoolBucket), tx.Bucket(pushesBucket), tx.Bucket(cursorsBucket)
	if about == nil || pushes == nil || cursors == nil {
		return errors.New("it is no spool")
	}
	id, err := unseal(idKey, about.Get(idKey))
	if err != nil {
		return fmt.Errorf("its ID: %w", err)
	}
	s.id, s.last = string(id), pushes.Sequence()
	err = pushes.ForEach(func(key, value []byte) error {
		p, err := parsePush(key, value)
		if err != nil {
			return err
		}
		if p.Seq > s.last {
			return fmt.Errorf("there is a push %d, and %d should be the last", p.Seq, s.last)
		}
		s.addEntry(p, int64(len(value)))
		return nil
	})
	if err != nil {
		return err
	}
	err = cursors.ForEach(func(key, value []byte) error {
		position, err := unseal(key, value)
		if err == nil && (len(position) != 8 || binary.BigEndian.Uint64(position) > s.last) {
			err = errors.New("it stands nowhere")
		}
		if err != nil {
			return fmt.Errorf("the cursor of %q: %w", key, err)
		}
		s.cursors[string(key)] = &Cursor{spool: s, name: string(key), position: binary.BigEndian.Uint64(position), away: true}
		return nil
	})
	if err != nil {
		return err
	}
	var problem error
	for p := range tx.Check() { // to its end: who checks waits for its reader
		if problem == nil {
			problem = p
		}
	}
	return problem
}

// seal returns the value with the checksum that it is stored with.
func seal(key, value []byte) []byte {
	sum := crc32.Update(crc32.Checksum(key, castagnoli), castagnoli, value)
	return binary.LittleEndian.AppendUint32(value, sum)
}

// unseal returns the value that was sealed. It refers to sealed.
func unseal(key, sealed []byte) ([]byte, error) {
	n := len(sealed) - crc32.Size
	if n < 0 || binary.LittleEndian.Uint32(sealed[n:]) != crc32.Update(crc32.Checksum(key, castagnoli), castagnoli, sealed[:n]) {
		return nil, errors.New("the checksum is wrong")
	}
	return sealed[:n:n], nil
}

// ID returns the random ID that the spool got when it was made.
func (s *Spool) ID() string { return s.id }

// Configure says how large the spool may be, 0 for the default, and which proxies there
// are, by name. A proxy that is new gets what the spool has; cursors of others go, and
// their Next returns an error.
func (s *Spool) Configure(maxBytes int64, names ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.maxBytes = cmp.Or(maxBytes, DefaultMaxBytes)
	for name, c := range s.cursors {
		if !slices.Contains(names, name) {
			delete(s.cursors, name)
			s.dropped = append(s.dropped, name)
			c.gone = true
		}
	}
	for _, name := range names {
		if s.cursors[name] == nil {
			s.cursors[name] = &Cursor{spool: s, name: name, position: s.floor(), away: true}
		}
	}
	close(s.appended)
	s.appended = make(chan struct{})
	s.advance()
}

// floor returns the number below the first push that is there. It is called with mu held.
func (s *Spool) floor() uint64 {
	if len(s.entries) == 0 {
		return s.last
	}
	return s.entries[0].seq - 1
}

// advance forgets the pushes that all cursors have passed, and has the cursors stored. It
// is called with mu held.
func (s *Spool) advance() {
	s.dirty = true
	select {
	case s.moved <- struct{}{}:
	default:
	}
	if len(s.cursors) == 0 {
		return
	}
	lowest := uint64(1<<64 - 1)
	for _, c := range s.cursors {
		lowest = min(lowest, c.position)
	}
	n := s.after(lowest)
	if n == 0 {
		return
	}
	s.begin = s.entries[n-1].end
	s.entries = s.entries[n:]
	if cap(s.entries) > 4096 && len(s.entries) < cap(s.entries)/4 {
		s.entries = slices.Clone(s.entries)
	}
}

// after returns the index of the first entry above a number. It is called with mu held.
func (s *Spool) after(seq uint64) int {
	n, _ := slices.BinarySearchFunc(s.entries, seq, func(e entry, seq uint64) int {
		if e.seq <= seq {
			return -1
		}
		return 1
	})
	return n
}

// held returns the bytes of the pushes that are there. It is called with mu held.
func (s *Spool) held() int64 { return s.end() - s.begin }

func (s *Spool) end() int64 {
	if len(s.entries) == 0 {
		return s.begin
	}
	return s.entries[len(s.entries)-1].end
}

// addEntry adds a push that is in the file to the index.
func (s *Spool) addEntry(p *Push, size int64) {
	s.entries = append(s.entries, entry{p.Seq, s.end() + size + overhead, p.Received.UnixNano()})
}

// Append stores a push behind all others, and sets its Seq. When it returns nil the push
// is on disk. It returns ErrFull, ErrTooLarge, ErrUnavailable or ErrBusy, wrapped. Where
// ctx ends early the push may be stored all the same.
func (s *Spool) Append(ctx context.Context, p *Push) error {
	a := &appending{push: p, value: p.appendBinary(nil), reply: make(chan error, 1)}
	wait, cancel := context.WithTimeout(ctx, queueWait)
	defer cancel()
	select {
	case s.queue <- a:
	case <-s.done:
		return fmt.Errorf("%w: it is closed", ErrUnavailable)
	case <-wait.Done():
		return fmt.Errorf("%w: %d pushes wait; try again later", ErrBusy, queueSize)
	}
	select {
	case err := <-a.reply:
		return err
	case <-s.done:
		// The writer may have answered before it ended.
		select {
		case err := <-a.reply:
			return err
		default:
			return fmt.Errorf("%w: it is closed", ErrUnavailable)
		}
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Run writes until ctx ends and the queue is empty. Then it closes the file.
func (s *Spool) Run(ctx context.Context) error {
	defer close(s.done)
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	flushing := false
	for {
		select {
		case a := <-s.queue:
			s.commit(s.collect(a))
		case <-s.moved:
			if !flushing {
				flushing = true
				timer.Reset(flushAfter)
			}
		case <-timer.C:
			flushing = false
			if s.commit(nil) != nil {
				flushing = true
				timer.Reset(retryAfter)
			}
		case <-ctx.Done():
			for {
				select {
				case a := <-s.queue:
					s.commit(s.collect(a))
					continue
				default:
				}
				err := s.commit(nil)
				s.mu.Lock()
				damaged := s.damaged
				s.mu.Unlock()
				if damaged {
					return nil // a lock that the panic left held would make Close wait for ever
				}
				return errors.Join(err, s.db.Close()) // only Run changes db
			}
		}
	}
}

// collect takes what else waits. Requests that can go on without waiting for anything go
// first: what they bring shares the flush.
func (s *Spool) collect(first *appending) []*appending {
	batch := []*appending{first}
	runtime.Gosched()
	for len(batch) < maxBatch {
		select {
		case a := <-s.queue:
			batch = append(batch, a)
		default:
			return batch
		}
	}
	return batch
}

// commit stores a batch of pushes, as far as there is room, and the cursors, in one
// transaction. It returns an error where that failed.
func (s *Spool) commit(batch []*appending) error {
	s.mu.Lock()
	if s.damaged {
		err := fmt.Errorf("%w: %w", ErrUnavailable, s.failure)
		s.mu.Unlock()
		for _, a := range batch {
			a.reply <- err
		}
		return err
	}
	var stored []*appending
	last, size, floor := s.last, int64(0), s.floor()
	for _, a := range batch {
		n := int64(len(a.value)) + crc32.Size + overhead
		room, err := s.makeRoom(size, n, floor)
		if err != nil {
			s.stats.Refused++
			a.reply <- fmt.Errorf("%w: %d bytes of at most %d wait for a proxy, and the push has %d (--push.spool-max-bytes)", err, s.held(), s.maxBytes, n)
			continue
		}
		floor = room
		size += n
		last++
		a.push.Seq = last
		stored = append(stored, a)
	}
	if len(stored) == 0 && !s.dirty {
		s.mu.Unlock()
		return nil
	}
	// Cursors that were trimmed are stored so, and moved once that has succeeded.
	positions := map[string]uint64{}
	for name, c := range s.cursors {
		positions[name] = max(c.position, floor)
	}
	dropped := s.dropped
	s.dropped, s.dirty = nil, false
	s.mu.Unlock()

	err := s.update(func(tx *bolt.Tx) error {
		pushes, cursors := tx.Bucket(pushesBucket), tx.Bucket(cursorsBucket)
		pushes.FillPercent = 1 // each goes behind the last one
		for c := pushes.Cursor(); ; {
			key, _ := c.First()
			if key == nil || binary.BigEndian.Uint64(key) > floor {
				break
			}
			if err := c.Delete(); err != nil {
				return err
			}
		}
		for _, a := range stored {
			key := binary.BigEndian.AppendUint64(nil, a.push.Seq)
			if err := pushes.Put(key, seal(key, a.value)); err != nil {
				return err
			}
		}
		if err := pushes.SetSequence(last); err != nil {
			return err
		}
		for _, name := range dropped {
			if err := cursors.Delete([]byte(name)); err != nil {
				return err
			}
		}
		return putCursors(cursors, positions)
	})

	s.mu.Lock()
	if err != nil {
		s.dropped, s.dirty = append(dropped, s.dropped...), true
		if s.failure == nil {
			s.logger.Error("The spool can't be written: pushes for it are refused until it can", "err", err)
		}
		s.failure = err
		err = fmt.Errorf("%w: %w", ErrUnavailable, err)
	} else {
		if s.failure != nil {
			s.logger.Info("The spool can be written again")
		}
		s.failure = nil
		s.last = last
		for _, c := range s.cursors {
			s.trim(c, floor)
		}
		for _, a := range stored {
			s.addEntry(a.push, int64(len(a.value))+crc32.Size)
		}
		if len(stored) > 0 {
			close(s.appended)
			s.appended = make(chan struct{})
		}
	}
	empty := err == nil && len(s.entries) == 0
	s.mu.Unlock()
	for _, a := range stored {
		a.reply <- err
	}
	if empty {
		s.renew()
	}
	return err
}

func putCursors(b *bolt.Bucket, positions map[string]uint64) error {
	for name, position := range positions {
		key := []byte(name)
		if err := b.Put(key, seal(key, binary.BigEndian.AppendUint64(nil, position))); err != nil {
			return err
		}
	}
	return nil
}

// makeRoom returns up to which number pushes have to go so that n bytes more than taken
// have room, floor at least; or ErrFull or ErrTooLarge. What goes is what a proxy that is
// away lacks and another one has. It is called with mu held.
func (s *Spool) makeRoom(taken, n int64, floor uint64) (uint64, error) {
	if n > s.maxBytes {
		return 0, ErrTooLarge
	}
	furthest, limit := uint64(0), uint64(1<<64-1)
	for _, c := range s.cursors {
		furthest = max(furthest, c.position)
		if !c.away {
			limit = min(limit, c.position)
		}
	}
	limit = min(limit, furthest)
	i := s.after(floor)
	gone := s.begin
	if i > 0 {
		gone = s.entries[i-1].end
	}
	for s.end()-gone+taken+n > s.maxBytes {
		if i == len(s.entries) || s.entries[i].seq > limit {
			return 0, ErrFull
		}
		gone, floor = s.entries[i].end, s.entries[i].seq
		i++
	}
	return floor, nil
}

// trim moves a cursor up to a number where it stands below. It is called with mu held.
func (s *Spool) trim(c *Cursor, to uint64) {
	n := s.after(to) - s.after(c.position)
	if n <= 0 {
		return
	}
	c.position = to
	c.trimmed += uint64(n)
	c.untold += n
	if now := time.Now(); now.Sub(c.told) >= tellTrims {
		s.logger.Warn("The spool is full: the oldest pushes that a proxy lacks were dropped, since it is away and another proxy has them",
			"proxy", c.name, "pushes", c.untold, "max_bytes", s.maxBytes)
		c.told, c.untold = now, 0
	}
	s.advance()
}

// update changes the file in one transaction. Where bbolt panics, nothing may be written
// from then on.
func (s *Spool) update(change func(*bolt.Tx) error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = s.hurt(p)
		}
	}()
	return s.db.Update(change)
}

// hurt notes that the file turned out to be damaged.
func (s *Spool) hurt(what any) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.damaged = true
	return fmt.Errorf("%s: %w (%v)", s.path, boltstore.ErrDamaged, what)
}

// Err returns why the last write failed, nil where it succeeded.
func (s *Spool) Err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.failure == nil {
		return nil
	}
	return fmt.Errorf("%w: %w", ErrUnavailable, s.failure)
}

// Stats tells of the spool as it is now.
func (s *Spool) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	stats := s.stats
	stats.Bytes, stats.MaxBytes, stats.Cursors = s.held(), s.maxBytes, map[string]CursorStats{}
	for name, c := range s.cursors {
		of := CursorStats{Trimmed: c.trimmed}
		if i := s.after(c.position); i < len(s.entries) {
			begin := s.begin
			if i > 0 {
				begin = s.entries[i-1].end
			}
			of.Pushes, of.Bytes, of.Oldest = len(s.entries)-i, s.end()-begin, time.Unix(0, s.entries[i].received)
		}
		stats.Cursors[name] = of
	}
	return stats
}
