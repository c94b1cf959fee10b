package fleet

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/culvert-io/culvert/gateway/boltstore"
	"github.com/culvert-io/culvert/protocol"
)

// record is an agent as it is stored: JSON under its name, in the bucket "agents".
type record struct {
	Name         string                `json:"name"`
	Registration protocol.Registration `json:"registration"`
	FirstSeen    time.Time             `json:"first_seen"`
	LostAt       time.Time             `json:"lost_at,omitzero"` // zero: connected
	Kind         string                `json:"kind,omitempty"`   // "": KindCulvert

	deleted bool
}

func (a *Agent) record() record {
	rec := record{Name: a.Name, Registration: a.registration, FirstSeen: a.firstSeen}
	if !a.isConnected() {
		rec.LostAt = a.since
	}
	if a.kind != KindCulvert {
		rec.Kind = a.kind
	}
	return rec
}

var agentsBucket = []byte("agents")

// store writes records to a bbolt file. One goroutine commits all that waits in
// one transaction, so that a reconnecting fleet costs few of them.
type store struct {
	db     *bolt.DB
	logger *slog.Logger
	work   chan struct{} // 1: there are pending records
	done   chan struct{} // closed when the goroutine has ended

	cluster string // what setCluster kept, when the file was opened

	mu       sync.Mutex // protects what follows
	pending  map[string]record
	waiting  []chan error
	retrying bool
	closed   bool
}

// ErrInUse is returned by Open where another process has the store's file.
var ErrInUse = boltstore.ErrInUse

// settledKey is in the bucket "fleet" once the list of agents could be trusted.
var (
	fleetBucket = []byte("fleet")
	settledKey  = []byte("settled")
	clusterKey  = []byte("cluster")
)

// openStore opens the file, or creates it. It reports whether a list that can be
// trusted was there. Errors are those of boltstore.OpenDB.
func openStore(path string, logger *slog.Logger) (s *store, records []record, settled bool, err error) {
	var cluster string
	db, err := boltstore.OpenDB(path, func(db *bolt.DB) error {
		return db.Update(func(tx *bolt.Tx) error {
			about, err := tx.CreateBucketIfNotExists(fleetBucket)
			if err != nil {
				return err
			}
			settled = about.Get(settledKey) != nil
			cluster = string(about.Get(clusterKey))
			agents, err := tx.CreateBucketIfNotExists(agentsBucket)
			if err != nil {
				return err
			}
			return agents.ForEach(func(k, v []byte) error {
				var rec record
				if err := json.Unmarshal(v, &rec); err != nil {
					return fmt.Errorf("record of agent %q: %w", k, err)
				}
				if rec.Name != string(k) {
					return fmt.Errorf("record of agent %q: it is one of %q", k, rec.Name)
				}
				err := cmp.Or(protocol.CheckName(rec.Name), rec.Registration.Check(rec.Name))
				if err != nil { // written by another version, perhaps
					logger.Error("A stored agent is left out: this version does not take its registration", "agent", rec.Name, "err", err)
					return nil
				}
				records = append(records, rec)
				return nil
			})
		})
	})
	if err != nil {
		return nil, nil, false, err
	}
	s = &store{cluster: cluster, db: db, logger: logger, work: make(chan struct{}, 1), done: make(chan struct{}), pending: map[string]record{}}
	go s.run()
	return s, records, settled, nil
}

// setSettled notes that the stored list can be trusted.
func (s *store) setSettled() error {
	return s.db.Update(func(tx *bolt.Tx) error {
		return tx.Bucket(fleetBucket).Put(settledKey, []byte("1"))
	})
}

// setCluster notes of which cluster the stored list is: see Snapshot.Cluster.
func (s *store) setCluster(id string) error {
	return s.db.Update(func(tx *bolt.Tx) error {
		return tx.Bucket(fleetBucket).Put(clusterKey, []byte(id))
	})
}

// save writes a record and waits until it is on disk, or ctx ends.
func (s *store) save(ctx context.Context, rec record) error {
	done := make(chan error, 1)
	if !s.enqueue(rec, done) {
		return errors.New("the store is closed")
	}
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// saveLater writes a record soon; a failure is logged.
func (s *store) saveLater(rec record) { s.enqueue(rec, nil) }

func (s *store) enqueue(rec record, done chan error) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false
	}
	s.pending[rec.Name] = rec
	if done != nil {
		s.waiting = append(s.waiting, done)
	}
	s.wake()
	return true
}

func (s *store) run() {
	defer close(s.done)
	for range s.work {
		s.commit()
	}
	s.commit()
}

func (s *store) commit() {
	s.mu.Lock()
	pending, waiting := s.pending, s.waiting
	s.pending, s.waiting = map[string]record{}, nil
	s.mu.Unlock()
	if len(pending) == 0 {
		return
	}
	values := map[string][]byte{} // nil: delete
	err := s.db.View(func(tx *bolt.Tx) error {
		b := tx.Bucket(agentsBucket)
		for name, rec := range pending {
			stored := b.Get([]byte(name))
			if rec.deleted {
				if stored != nil {
					values[name] = nil
				}
				continue
			}
			value, err := json.Marshal(rec)
			if err != nil {
				return err
			}
			// After a crash of the proxy all agents come back as they were, in no time.
			if !bytes.Equal(value, stored) {
				values[name] = value
			}
		}
		return nil
	})
	if err == nil && len(values) > 0 {
		err = s.db.Update(func(tx *bolt.Tx) error {
			b := tx.Bucket(agentsBucket)
			for name, value := range values {
				var err error
				if value == nil {
					err = b.Delete([]byte(name))
				} else {
					err = b.Put([]byte(name), value)
				}
				if err != nil {
					return err
				}
			}
			return nil
		})
	}
	if err != nil {
		s.logger.Error("The list of known agents could not be written", "err", err, "retry_in", retryWrite)
		s.retry(pending)
	}
	for _, done := range waiting {
		done <- err
	}
}

// retryWrite is when a write that failed is tried again.
const retryWrite = 30 * time.Second

// retry puts back what could not be written, unless something newer waits.
func (s *store) retry(failed map[string]record) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for name, rec := range failed {
		if _, newer := s.pending[name]; !newer {
			s.pending[name] = rec
		}
	}
	if s.retrying {
		return
	}
	s.retrying = true
	time.AfterFunc(retryWrite, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.retrying = false; !s.closed {
			s.wake()
		}
	})
}

// wake makes run commit. It is called with mu held.
func (s *store) wake() {
	select {
	case s.work <- struct{}{}:
	default:
	}
}

// close writes what is pending and closes the file.
func (s *store) close() {
	s.mu.Lock()
	s.closed = true
	close(s.work)
	s.mu.Unlock()
	<-s.done
	s.db.Close()
}
