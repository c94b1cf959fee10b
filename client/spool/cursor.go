package spool

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"runtime/debug"
	"time"

	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
)

// ErrNoCursor: the proxy is not one of those that Configure was told.
var ErrNoCursor = errors.New("the spool has no such proxy")

// Cursor is how far a proxy has the pushes.
type Cursor struct {
	spool *Spool
	name  string

	// Of spool.mu.
	position uint64 // it has all up to this number
	away     bool
	gone     bool
	trimmed  uint64
	untold   int // of trimmed, in the log
	told     time.Time

	ahead []*Push // read already; of Next alone
}

// Cursor returns the cursor of a proxy, or ErrNoCursor. Its Next may be called by one
// goroutine at a time.
func (s *Spool) Cursor(name string) (*Cursor, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.cursors[name]
	if c == nil {
		return nil, fmt.Errorf("%w: %q", ErrNoCursor, name)
	}
	return c, nil
}

// Next returns the first push that the proxy does not have, and waits for one until ctx
// ends. It returns the same one until Done has moved the cursor. It returns ErrNoCursor,
// wrapped, once Configure dropped the cursor, ErrUnavailable once the spool is closed.
func (c *Cursor) Next(ctx context.Context) (*Push, error) {
	s := c.spool
	for {
		s.mu.Lock()
		position, appended, gone, damaged := c.position, s.appended, c.gone, s.damaged
		waits := s.after(position) < len(s.entries)
		s.mu.Unlock()
		switch {
		case gone:
			return nil, fmt.Errorf("%w: %q", ErrNoCursor, c.name)
		case damaged:
			return nil, s.Err()
		}
		for len(c.ahead) > 0 && c.ahead[0].Seq <= position {
			c.ahead[0] = nil
			c.ahead = c.ahead[1:]
		}
		if len(c.ahead) > 0 {
			return c.ahead[0], nil
		}
		if waits {
			var err error
			c.ahead, err = s.read(position)
			if errors.Is(err, berrors.ErrDatabaseNotOpen) && !s.isDone() {
				continue // the file was replaced meanwhile
			}
			if err != nil {
				return nil, err
			}
			continue
		}
		select {
		case <-appended:
		case <-s.done:
			return nil, fmt.Errorf("%w: it is closed", ErrUnavailable)
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// read returns pushes above a number, one at least.
func (s *Spool) read(above uint64) (pushes []*Push, err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = s.fail(s.hurt(p))
		}
	}()
	s.mu.Lock()
	db := s.db
	s.mu.Unlock()
	err = db.View(func(tx *bolt.Tx) error {
		at := tx.Bucket(pushesBucket).Cursor()
		size := 0
		for key, value := at.Seek(binary.BigEndian.AppendUint64(nil, above+1)); key != nil && len(pushes) < readPushes; key, value = at.Next() {
			if size += len(value); size > readBytes && len(pushes) > 0 {
				break
			}
			p, err := parsePush(key, value)
			if err != nil {
				return err
			}
			pushes = append(pushes, p)
		}
		if len(pushes) == 0 {
			return fmt.Errorf("the pushes above %d are missing", above)
		}
		return nil
	})
	if err != nil && !errors.Is(err, berrors.ErrDatabaseNotOpen) {
		pushes, err = nil, s.fail(s.hurt(err))
	}
	return pushes, err
}

func (s *Spool) isDone() bool {
	select {
	case <-s.done:
		return true
	default:
		return false
	}
}

// fail notes why nothing can be written or read any more.
func (s *Spool) fail(err error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.failure = err
	s.logger.Error("The spool turned out to be damaged: pushes for it are refused, and what it has is not relayed", "err", err)
	return err
}

// Done says that the proxy has all pushes up to a number, or will never take them.
func (c *Cursor) Done(seq uint64) {
	s := c.spool
	s.mu.Lock()
	defer s.mu.Unlock()
	if c.position < seq && !c.gone {
		c.position = seq
		s.advance()
	}
}

// SetAway says whether the proxy can be reached. What one that can't is lacking may be
// dropped where the spool is full and another proxy has it.
func (c *Cursor) SetAway(away bool) {
	c.spool.mu.Lock()
	defer c.spool.mu.Unlock()
	c.away = away
}
