package etcdstore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"net/url"
	"runtime"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/metadata"

	"github.com/culvert-io/culvert/gateway"
)

// What is below the prefix.
const (
	headName     = "head"
	groupsFolder = "groups/"
	spoolsFolder = "spools/"
)

// Reasons for a snapshot.
var (
	errCompacted = errors.New("etcd has compacted changes that were not read yet")
	errForeign   = errors.New("something other than a proxy has changed the keys of the push store in etcd")
	errSetBack   = errors.New("etcd was set back to an earlier state")
	errLeftOut   = errors.New("etcd has left out changes")

	// errStuck is none: the watch goes on where it was.
	errStuck = errors.New("the watch lags behind")
)

// needsSnapshot reports whether a watch can't go on where it ended.
func needsSnapshot(err error) bool {
	return errors.Is(err, errCompacted) || errors.Is(err, errForeign) || errors.Is(err, errSetBack) || errors.Is(err, errLeftOut) || errors.Is(err, errFormat)
}

// follow hands over snapshots, and what was changed since, until the store is closed.
func (s *Store) follow() {
	const shortest, longest = 50 * time.Millisecond, 5 * time.Second
	pause := shortest
	for s.ctx.Err() == nil {
		next, err := s.load()
		if err == nil {
			before := next
			if err = s.watchFrom(&next); next > before {
				pause = shortest
			}
		}
		s.mu.Lock()
		s.delivered, s.asked.head = 0, 0
		s.mu.Unlock()
		if !s.send(gateway.Update{Lost: err}) {
			return
		}
		s.sleep(pause)
		pause = min(2*pause, longest)
	}
}

func (s *Store) sleep(wait time.Duration) {
	select {
	case <-s.ctx.Done():
	case <-time.After(wait/2 + mathrand.N(wait)):
	}
}

// send hands an update over. It returns false where the store was closed before that.
func (s *Store) send(u gateway.Update) bool {
	select {
	case s.updates <- u:
		return true
	case <-s.ctx.Done():
		return false
	}
}

// handedOver notes that all up to a revision was, and which version that is.
func (s *Store) handedOver(revision int64, last gateway.Version, snapshot bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.delivered, s.last = revision, last
	if snapshot || last.Revision > s.latest.Revision {
		s.latest = last
	}
	if s.asked.head != 0 && s.delivered >= s.asked.head {
		at := s.asked.at
		s.current.Store(&at)
		s.asked.head = 0
	}
}

// load hands over a snapshot. It returns the revision from which on changes are to be
// read. It reads page by page, all of one revision.
func (s *Store) load() (next int64, err error) {
	start := time.Now()
	end := clientv3.GetPrefixRangeEnd(s.prefix)
	from, limit, revision := s.prefix, int64(100), int64(0)
	var version gateway.Version
	var kvs []*mvccpb.KeyValue
	for {
		ctx, cancel := context.WithTimeout(s.ctx, loadTimeout)
		page, err := s.client.Get(ctx, from, clientv3.WithRange(end), clientv3.WithLimit(limit), clientv3.WithRev(revision))
		cancel()
		if err != nil {
			return 0, fmt.Errorf("the groups can't be read from etcd: %w", err)
		}
		if revision == 0 {
			revision = page.Header.Revision
		}
		size := 1
		for _, kv := range page.Kvs {
			size += len(kv.Key) + len(kv.Value)
			if string(kv.Key) == s.prefix+headName {
				version = gateway.Version{ID: string(kv.Value)}
			}
		}
		kvs = append(kvs, page.Kvs...)
		if !page.More || len(page.Kvs) == 0 {
			break
		}
		from = string(page.Kvs[len(page.Kvs)-1].Key) + "\x00"
		limit = min(max(int64(len(page.Kvs))*pageBytes/int64(size), 1), 10_000)
	}
	if _, err := parseHead([]byte(version.ID)); err != nil {
		return 0, err
	}
	// Later changes have higher revisions than the snapshot, whatever the last one here was.
	version.Revision = revision
	events := make([]*clientv3.Event, len(kvs))
	for i, kv := range kvs {
		events[i] = &clientv3.Event{Type: clientv3.EventTypePut, Kv: kv}
	}
	read := s.decode(events)
	sent := s.send(gateway.Update{Snapshot: true, Version: version, Read: func() ([]gateway.Change, []gateway.Mark, []error) {
		return read.changes, read.marks, read.damaged
	}})
	if !sent {
		return 0, s.ctx.Err()
	}
	s.handedOver(revision, version, true)
	s.current.Store(&start)
	return revision + 1, nil
}

// watchFrom hands over what is changed from the revision next on, which it moves on, until
// it returns why it can't any more.
func (s *Store) watchFrom(next *int64) error {
	pause := 50 * time.Millisecond
	for {
		// The client puts all watches with the same metadata into one stream. Where that is
		// connected anew, a watch that ends then can take another one with it. So each gets
		// a stream of its own.
		s.watches++
		ctx := metadata.AppendToOutgoingContext(s.ctx, "culvert-watch", fmt.Sprintf("%x-%d", s.writer, s.watches))
		ctx, cancel := context.WithCancelCause(clientv3.WithRequireLeader(ctx))
		s.mu.Lock()
		s.endWatch = cancel
		s.mu.Unlock()
		before := *next
		err := s.watch(ctx, next)
		s.mu.Lock()
		s.endWatch = nil
		s.mu.Unlock()
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		cancel(nil)
		if needsSnapshot(err) || s.ctx.Err() != nil {
			return err
		}
		if *next > before {
			pause = 50 * time.Millisecond
		}
		s.config.Logger.Debug("The watch of the push store in etcd is begun anew", "revision", *next, "err", err)
		s.sleep(pause)
		pause = min(2*pause, 2*time.Second)
	}
}

// watch hands over changes from the revision next on, which it moves on.
func (s *Store) watch(ctx context.Context, next *int64) error {
	responses := s.client.Watch(ctx, s.prefix, clientv3.WithPrefix(), clientv3.WithRev(*next), clientv3.WithFragment())
	for {
		var resp clientv3.WatchResponse
		ok := false
		select {
		case resp, ok = <-responses:
		case <-ctx.Done():
		}
		if !ok {
			return errors.New("etcd has ended the watch")
		}
		if resp.CompactRevision > 0 {
			return errCompacted
		}
		if err := resp.Err(); err != nil {
			return err
		}
		// A response has all events of each of its revisions, in the order in which the
		// transaction made them: the head's is the last one.
		for events := resp.Events; len(events) > 0; {
			revision, n := events[0].Kv.ModRevision, 1
			for n < len(events) && events[n].Kv.ModRevision == revision {
				n++
			}
			transaction := events[:n]
			events = events[n:]
			last := transaction[n-1]
			if string(last.Kv.Key) != s.prefix+headName || last.Type != clientv3.EventTypePut {
				return errForeign
			}
			h, err := parseHead(last.Kv.Value)
			if err != nil {
				return fmt.Errorf("%w: %w", errFormat, err)
			}
			s.mu.Lock()
			before, _ := parseHead([]byte(s.last.ID))
			s.mu.Unlock()
			if !bytes.Equal(h.after, before.id) {
				return errLeftOut
			}
			version := gateway.Version{Revision: revision, ID: string(last.Kv.Value)}
			u := gateway.Update{Version: version, At: time.Unix(0, h.at)}
			if strings.HasPrefix(string(h.id), string(s.writer[:])) {
				u.Read = func() ([]gateway.Change, []gateway.Mark, []error) { // nobody does, as a rule
					read := s.decode(transaction)
					return read.changes, read.marks, read.damaged
				}
			} else {
				read := s.decode(transaction)
				u.Read = func() ([]gateway.Change, []gateway.Mark, []error) { return read.changes, read.marks, read.damaged }
			}
			if !s.send(u) {
				return s.ctx.Err()
			}
			*next = revision + 1
			s.handedOver(revision, version, false)
		}
	}
}

// errFormat is told by parseHead, in words.
var errFormat = errors.New("the push store in etcd can't be followed")

// decoded is what events say.
type decoded struct {
	changes []gateway.Change
	marks   []gateway.Mark
	damaged []error
}

// decode reads events. What it can't read it leaves out, and gives a group as gone.
func (s *Store) decode(events []*clientv3.Event) decoded {
	const together = 8
	parts := make([]decoded, (len(events)+together-1)/together)
	var all errgroup.Group
	all.SetLimit(runtime.GOMAXPROCS(0))
	for i := range parts {
		work := func() error {
			for _, e := range events[i*together : min((i+1)*together, len(events))] {
				s.decodeEvent(e, &parts[i])
			}
			return nil
		}
		if len(parts) == 1 {
			_ = work()
		} else {
			all.Go(work)
		}
	}
	_ = all.Wait()
	var out decoded
	for _, p := range parts {
		out.changes, out.marks, out.damaged = append(out.changes, p.changes...), append(out.marks, p.marks...), append(out.damaged, p.damaged...)
	}
	return out
}

func (s *Store) decodeEvent(e *clientv3.Event, out *decoded) {
	name := strings.TrimPrefix(string(e.Kv.Key), s.prefix)
	gone := e.Type == clientv3.EventTypeDelete
	if escaped, ok := strings.CutPrefix(name, groupsFolder); ok {
		id, err := idOf(escaped)
		if err != nil {
			out.damaged = append(out.damaged, fmt.Errorf("the key %q in etcd: %w", e.Kv.Key, err))
			return
		}
		c := gateway.Change{ID: id}
		if !gone {
			r := new(gateway.Record)
			record, err := gateway.Unpack(e.Kv.Value)
			if err == nil {
				err = r.UnmarshalBinary(record)
			}
			if err == nil && r.Key.ID() != id {
				err = fmt.Errorf("it has the record of the group %s", r.Key)
			}
			if err == nil {
				c.Record = r
			} else {
				out.damaged = append(out.damaged, fmt.Errorf("the key %q in etcd: %w", e.Kv.Key, err))
			}
		}
		out.changes = append(out.changes, c)
		return
	}
	if spool, ok := strings.CutPrefix(name, spoolsFolder); ok {
		m := gateway.Mark{Spool: spool}
		if !gone {
			mark, err := gateway.Unpack(e.Kv.Value)
			if err == nil {
				err = m.UnmarshalBinary(mark)
			}
			if err == nil && m.Spool != spool {
				err = fmt.Errorf("it has the mark of the spool %q", m.Spool)
			}
			if err != nil {
				out.damaged = append(out.damaged, fmt.Errorf("the key %q in etcd: %w", e.Kv.Key, err))
				return
			}
		}
		out.marks = append(out.marks, m)
	}
	// All else is the head, or a newer version's.
}

// keyOf returns how a group's ID is written in its key.
func keyOf(id string) string {
	parts := strings.Split(id, "\xff")
	for i, part := range parts {
		parts[i] = url.PathEscape(part)
	}
	return strings.Join(parts, "/")
}

// idOf returns the ID of the group with that key, as keyOf writes it.
func idOf(escaped string) (string, error) {
	parts := strings.Split(escaped, "/")
	if len(parts)%2 != 0 {
		return "", errors.New("it has a label without a value")
	}
	labels := make(map[string]string, len(parts)/2)
	for i := 0; i < len(parts); i += 2 {
		name, err := url.PathUnescape(parts[i])
		if err != nil {
			return "", err
		}
		if labels[name], err = url.PathUnescape(parts[i+1]); err != nil {
			return "", err
		}
	}
	key, err := gateway.NewKey(labels)
	if err != nil {
		return "", err
	}
	if keyOf(key.ID()) != escaped {
		return "", fmt.Errorf("it should be %q", keyOf(key.ID()))
	}
	return key.ID(), nil
}

// askAgain has check ask now.
func (s *Store) askAgain() {
	select {
	case s.recheck <- struct{}{}:
	default:
	}
}

// check asks etcd again and again what the last transaction was: whether all is here, and
// the watch goes on, can't be told from a watch that says nothing.
func (s *Store) check() {
	ticker := time.NewTicker(s.config.CheckInterval)
	defer ticker.Stop()
	away := false
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-ticker.C:
		case <-s.recheck:
		}
		s.mu.Lock()
		delivered, latest := s.delivered, s.latest
		s.mu.Unlock()
		if delivered == 0 {
			continue
		}
		start := time.Now()
		ctx, cancel := context.WithTimeout(s.ctx, attemptTimeout)
		resp, err := s.client.Get(ctx, s.prefix+headName)
		cancel()
		if failed := err != nil && s.ctx.Err() == nil; failed != away {
			if away = failed; away {
				s.config.Logger.Warn("etcd does not answer: the groups may be behind", "err", err)
			} else {
				s.config.Logger.Info("etcd answers again")
			}
		}
		var now gateway.Version
		if err == nil && len(resp.Kvs) > 0 {
			now = gateway.Version{Revision: resp.Kvs[0].ModRevision, ID: string(resp.Kvs[0].Value)}
		}
		s.mu.Lock()
		switch {
		case s.delivered == 0 || s.endWatch == nil:
		case err == nil && (resp.Header.Revision < latest.Revision || now.ID != latest.ID && now.Revision <= latest.Revision):
			s.endWatch(errSetBack)
		case err == nil && s.delivered >= now.Revision:
			s.current.Store(&start)
			s.asked.head = 0
		case err == nil && s.asked.head == 0:
			s.asked.at, s.asked.head = start, now.Revision
		case s.asked.head != 0 && time.Since(s.asked.at) > stuckAfter && time.Since(s.rewatched) > stuckAfter:
			s.rewatched = time.Now()
			s.endWatch(errStuck)
		}
		s.mu.Unlock()
	}
}
