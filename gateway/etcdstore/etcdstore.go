// Package etcdstore keeps the push store's groups and the marks of its spools in etcd, 3.4
// or later, where several proxies share them.
package etcdstore

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/culvert-io/culvert/gateway"
)

// Config tunes a Store. Zero values mean the defaults.
type Config struct {
	// MaxTxnOps and MaxRequestBytes are etcd's --max-txn-ops and --max-request-bytes, 128
	// and 1.5 MiB by default, as etcd's. A group must fit in one request. The client's
	// MaxCallSendMsgSize, 2 MiB by default, must be larger.
	MaxTxnOps, MaxRequestBytes int
	// CommitTimeout bounds the time for which a write is tried, 5 s by default. It should be
	// longer than etcd takes to elect a leader.
	CommitTimeout time.Duration
	// CheckInterval is the time between two questions whether all was heard of, 3 s by
	// default.
	CheckInterval time.Duration
	// Now is time.Now by default. It should be the store's.
	Now func() time.Time
	// Logger is slog.Default by default.
	Logger *slog.Logger
}

// Store is a gateway.Shared in etcd. Below a prefix of their own there are
//
//	head            what the last transaction was: see head
//	groups/KEY      a group's record, as gateway.Pack packs it. KEY is the grouping key as
//	                /NAME/VALUE/NAME/VALUE, without the first slash, sorted by name, each
//	                escaped as in a URL's path
//	spools/SPOOL    a spool's mark, packed too
//
// Each transaction compares head with what its proxy has in memory, and replaces it along
// with what it changes. So transactions are made one after the other, and all that a proxy
// checked still holds when its transaction is made. There is no lease and no lock: a
// proxy that stops leaves nothing behind that others would wait for.
//
// A transaction of whose outcome nothing was heard is sent again as it is: it can be made
// only once, since it needs the head before, and the head tells whether it was made.
type Store struct {
	config Config
	client *clientv3.Client
	prefix string

	writer  [8]byte // random: what this store's heads begin with
	number  uint64  // of the last transaction, of Commit only
	watches int     // begun, of follow only
	updates chan gateway.Update
	recheck chan struct{} // has a place

	ctx  context.Context // ends with Close
	stop context.CancelFunc
	work sync.WaitGroup

	current atomic.Pointer[time.Time] // gateway.Shared.CurrentAt

	mu sync.Mutex // protects what follows
	// What was handed over: all up to a revision, 0 while a snapshot is to come; the last
	// version is that of the head then.
	delivered int64
	last      gateway.Version
	// latest is the last version that is known of, from the watch or as Commit made it.
	latest gateway.Version
	// asked is the first question to whose answer not all was handed over, zero: there is
	// none.
	asked struct {
		at   time.Time
		head int64 // revision
	}
	rewatched time.Time               // when the watch was begun anew for being stuck
	endWatch  context.CancelCauseFunc // nil: there is none
}

// Some limits.
const (
	// attemptTimeout bounds one try of a request; a leader that hangs is replaced sooner.
	attemptTimeout = 2 * time.Second
	// loadTimeout bounds a request for a page of a snapshot.
	loadTimeout = 20 * time.Second
	// pageBytes is the size that pages of a snapshot should have.
	pageBytes = 4 << 20
	// stuckAfter is the age of a question at which the watch is begun anew.
	stuckAfter = 10 * time.Second
	// requestOverhead is what a request has beside keys and values at most, but for a few
	// bytes with each, which gateway counts with the keys.
	requestOverhead = 4 << 10
)

// Open returns a store below a prefix, which should end with a slash, in the etcd of a
// client. It asks for the groups until they are there: without etcd it opens too.
//
// The client stays the caller's, and is to be closed after Close. It should have a
// DialKeepAliveTime of some seconds: else a connection that was cut without a word is
// noticed late. And it should have a grpc.WithConnectParams of which the MaxDelay is some
// seconds: gRPC's own is 2 minutes, and for so long an etcd that is back would go unnoticed.
// Nothing but proxies should change what is below the prefix.
func Open(client *clientv3.Client, prefix string, config Config) *Store {
	config.MaxTxnOps = cmp.Or(config.MaxTxnOps, 128)
	config.MaxRequestBytes = cmp.Or(config.MaxRequestBytes, 1536<<10)
	config.CommitTimeout = cmp.Or(config.CommitTimeout, 5*time.Second)
	config.CheckInterval = cmp.Or(config.CheckInterval, 3*time.Second)
	config.Logger = cmp.Or(config.Logger, slog.Default())
	if config.Now == nil {
		config.Now = time.Now
	}
	s := &Store{
		config: config, client: client, prefix: strings.TrimSuffix(prefix, "/") + "/",
		updates: make(chan gateway.Update), recheck: make(chan struct{}, 1),
	}
	rand.Read(s.writer[:])
	s.ctx, s.stop = context.WithCancel(context.Background())
	s.work.Go(s.follow)
	s.work.Go(s.check)
	return s
}

// Close implements gateway.Shared.
func (s *Store) Close() error {
	s.stop()
	s.work.Wait()
	return nil
}

// Updates implements gateway.Shared.
func (s *Store) Updates() <-chan gateway.Update { return s.updates }

// Limits implements gateway.Shared.
func (s *Store) Limits() gateway.Limits {
	return gateway.Limits{
		Changes:      s.config.MaxTxnOps - 1, // and the head
		Bytes:        s.config.MaxRequestBytes - requestOverhead,
		RaiseChanges: fmt.Sprintf("raise etcd's --max-txn-ops above %d, and say so to the proxies", s.config.MaxTxnOps),
		RaiseBytes:   fmt.Sprintf("raise etcd's --max-request-bytes above %d, and say so to the proxies", s.config.MaxRequestBytes),
	}
}

// CurrentAt implements gateway.Shared.
func (s *Store) CurrentAt() time.Time {
	if at := s.current.Load(); at != nil {
		return *at
	}
	return time.Time{}
}

// head is what a transaction leaves under the key "head": a protobuf message. What a
// newer version adds is skipped, unless that raises the format.
type head struct {
	id     []byte // 8 bytes of the store that made the transaction, 8 of its number
	at     int64  // when it was sent, Unix nanoseconds by the clock of that store
	format uint64 // how all else is written; a store that knows only lower ones must not go on
	after  []byte // the id of the head before: whoever follows can tell that nothing was left out
}

const (
	headID     = 1
	headAt     = 2
	headFormat = 3
	headAfter  = 4

	currentFormat = 1
)

func (h head) append(out []byte) []byte {
	out = protowire.AppendBytes(protowire.AppendTag(out, headID, protowire.BytesType), h.id)
	out = protowire.AppendVarint(protowire.AppendTag(out, headAt, protowire.VarintType), uint64(h.at))
	out = protowire.AppendVarint(protowire.AppendTag(out, headFormat, protowire.VarintType), h.format)
	return protowire.AppendBytes(protowire.AppendTag(out, headAfter, protowire.BytesType), h.after)
}

// parseHead reads a head. It returns an error where a newer version wrote it in a format
// that this one doesn't know.
func parseHead(data []byte) (h head, err error) {
	for len(data) > 0 {
		field, kind, size := protowire.ConsumeTag(data)
		if size < 0 {
			return h, fmt.Errorf("the key head can't be read: %w", protowire.ParseError(size))
		}
		n := protowire.ConsumeFieldValue(field, kind, data[size:])
		if n < 0 {
			return h, fmt.Errorf("the key head can't be read: %w", protowire.ParseError(n))
		}
		value := data[size : size+n]
		data = data[size+n:]
		switch {
		case field == headID && kind == protowire.BytesType:
			h.id, _ = protowire.ConsumeBytes(value)
		case field == headAt && kind == protowire.VarintType:
			at, _ := protowire.ConsumeVarint(value)
			h.at = int64(at)
		case field == headFormat && kind == protowire.VarintType:
			h.format, _ = protowire.ConsumeVarint(value)
		case field == headAfter && kind == protowire.BytesType:
			h.after, _ = protowire.ConsumeBytes(value)
		}
	}
	if h.format > currentFormat {
		return h, fmt.Errorf("a newer version of Culvert has written the groups, in a format (%d) that this one doesn't know; update this proxy", h.format)
	}
	return h, nil
}

// Commit implements gateway.Shared, with one transaction.
func (s *Store) Commit(base gateway.Version, changes []gateway.Change, marks []gateway.Mark) (gateway.Version, error) {
	ops := make([]clientv3.Op, 0, len(changes)+len(marks)+1)
	for _, c := range changes {
		key := s.prefix + groupsFolder + keyOf(c.ID)
		if c.Record == nil {
			ops = append(ops, clientv3.OpDelete(key))
			continue
		}
		record, err := c.Record.AppendBinary(nil)
		if err != nil {
			return gateway.Version{}, err
		}
		ops = append(ops, clientv3.OpPut(key, string(gateway.Pack(record))))
	}
	for _, m := range marks {
		key := s.prefix + spoolsFolder + m.Spool
		if m.Seq == 0 {
			ops = append(ops, clientv3.OpDelete(key))
			continue
		}
		mark, err := m.AppendBinary(nil)
		if err != nil {
			return gateway.Version{}, err
		}
		ops = append(ops, clientv3.OpPut(key, string(gateway.Pack(mark))))
	}
	before, err := parseHead([]byte(base.ID))
	if err != nil {
		return gateway.Version{}, err
	}
	s.number++
	id := binary.BigEndian.AppendUint64(s.writer[:], s.number)
	next := string(head{id, s.config.Now().UnixNano(), currentFormat, before.id}.append(nil))
	headKey := s.prefix + headName
	// Of a transaction's events the head's is the last one: see watch.
	ops = append(ops, clientv3.OpPut(headKey, next))
	is := clientv3.Compare(clientv3.Value(headKey), "=", base.ID)
	if base.ID == "" {
		is = clientv3.Compare(clientv3.CreateRevision(headKey), "=", 0)
	}

	ctx, cancel := context.WithTimeout(s.ctx, s.config.CommitTimeout)
	defer cancel()
	for wait := 20 * time.Millisecond; ; wait = min(2*wait, 500*time.Millisecond) {
		attempt, cancel := context.WithTimeout(ctx, attemptTimeout)
		resp, err := s.client.Txn(attempt).If(is).Then(ops...).Else(clientv3.OpGet(headKey)).Commit()
		cancel()
		switch {
		case err == nil && resp.Succeeded:
			return s.made(gateway.Version{Revision: resp.Header.Revision, ID: next}), nil
		case err == nil:
			var last gateway.Version
			if kvs := resp.Responses[0].GetResponseRange().Kvs; len(kvs) > 0 {
				last = gateway.Version{Revision: kvs[0].ModRevision, ID: string(kvs[0].Value)}
			}
			if last.ID == next {
				return s.made(last), nil
			}
			if last.Revision <= base.Revision {
				s.askAgain() // etcd was set back
			}
			return gateway.Version{}, &gateway.Conflict{Last: last, TriedID: next}
		case errors.Is(err, rpctypes.ErrNoSpace):
			return gateway.Version{}, fmt.Errorf("%w; have it compact and defragment its database, and disarm the alarm (etcdctl alarm disarm)", err)
		case refused(err):
			return gateway.Version{}, err
		}
		select {
		case <-ctx.Done():
			return gateway.Version{}, fmt.Errorf("etcd has not said within %s whether it was stored: %w", s.config.CommitTimeout, err)
		case <-time.After(wait/2 + mathrand.N(wait)):
		}
	}
}

// made notes that a transaction made a version.
func (s *Store) made(v gateway.Version) gateway.Version {
	s.mu.Lock()
	defer s.mu.Unlock()
	if v.Revision > s.latest.Revision {
		s.latest = v
	}
	return v
}

// refused reports whether etcd, or its client, said that the transaction won't be made, so
// that it makes no sense to send it again.
func refused(err error) bool {
	code := status.Code(err)
	if e, ok := errors.AsType[rpctypes.EtcdError](err); ok {
		code = e.Code()
	}
	switch code {
	case codes.InvalidArgument, codes.ResourceExhausted, codes.PermissionDenied, codes.Unauthenticated, codes.FailedPrecondition, codes.OutOfRange, codes.Unimplemented:
		return true
	}
	return false
}
