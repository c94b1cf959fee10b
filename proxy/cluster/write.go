package cluster

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/culvert-io/culvert/proxy/fleet"
)

// etcd takes 128 operations and 1.5 MiB in a transaction, by default. An agent has at
// most three operations, in a transaction of its own within that.
const (
	maxBatch      = 60
	maxBatchBytes = 1 << 20
)

// writer keeps which agents have something to be written. What that is, is asked when
// it is written: of changes that follow each other, the last counts.
type writer struct {
	work chan struct{} // has one where there may be something to do

	mu    sync.Mutex // protects what follows
	dirty map[string]struct{}
	since time.Time // when there was nothing in it for the last time
}

func (w *writer) mark(agent string) {
	w.mu.Lock()
	if len(w.dirty) == 0 {
		w.since = time.Now()
	}
	w.dirty[agent] = struct{}{}
	w.mu.Unlock()
	w.wake()
}

func (w *writer) wake() {
	select {
	case w.work <- struct{}{}:
	default:
	}
}

// take returns some agents that are dirty, and reports whether there are more.
func (w *writer) take(n int) (agents []string, more bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for agent := range w.dirty {
		if len(agents) == n {
			return agents, true
		}
		agents = append(agents, agent)
		delete(w.dirty, agent)
	}
	return agents, false
}

// write writes what is dirty until ctx ends. Of a fleet that reconnects, many agents go
// in one transaction: those that come while the one before is on its way.
func (c *Cluster) write(ctx context.Context) {
	select {
	case <-c.loaded: // before, it would overwrite what others know
	case <-ctx.Done():
		return
	}
	for trouble := ""; ctx.Err() == nil; {
		select {
		case <-ctx.Done():
			return
		case <-c.writer.work:
		}
		err := c.flush(ctx)
		if err == nil || ctx.Err() != nil {
			trouble = ""
			continue
		}
		if trouble == "" {
			c.logger.Warn("Agents could not be written to etcd; other proxies don't know of their changes", "err", err)
		}
		trouble = err.Error()
		pause(ctx, time.Second)
		c.writer.wake()
	}
}

// flush writes all that is dirty.
func (c *Cluster) flush(ctx context.Context) error {
	select {
	case <-c.loaded:
	default:
		return nil
	}
	for more := true; more; {
		var agents []string
		if agents, more = c.writer.take(maxBatch); len(agents) == 0 {
			return nil
		}
		for len(agents) > 0 {
			n, err := c.writeBatch(ctx, agents)
			if err != nil {
				for _, agent := range agents {
					c.writer.mark(agent)
				}
				return err
			}
			agents = agents[n:]
		}
	}
	return nil
}

// writeBatch writes the first of the agents, and returns how many.
func (c *Cluster) writeBatch(ctx context.Context, agents []string) (int, error) {
	lease := c.lease.Load()
	if lease == 0 {
		return 0, errors.New("there is no lease")
	}
	var changes []fleet.Change
	var ops []clientv3.Op
	n, size := 0, 0
	for ; n < len(agents) && (size < maxBatchBytes/2 || len(ops) == 0); n++ {
		change, ok := c.fleet.Pending(agents[n])
		if !ok {
			continue
		}
		op, bytes, err := c.operation(change, clientv3.LeaseID(lease))
		if err != nil {
			return 0, err
		}
		if size += bytes; size > maxBatchBytes && len(ops) > 0 {
			break // in the next one
		}
		changes, ops = append(changes, change), append(ops, op)
	}
	if len(ops) == 0 {
		return n, nil
	}
	callCtx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	resp, err := c.client.Load().Txn(callCtx).Then(ops...).Commit()
	switch {
	case errors.Is(err, rpctypes.ErrLeaseNotFound):
		select {
		case c.leased <- struct{}{}: // have another one made
		default:
		}
		return 0, err
	case errors.Is(err, rpctypes.ErrRequestTooLarge), status.Code(err) == codes.ResourceExhausted && !errors.Is(err, rpctypes.ErrNoSpace):
		if len(ops) > 1 {
			return c.writeBatch(ctx, agents[:1])
		}
		c.logger.Error("An agent's registration is too large for etcd; other proxies don't know the agent", "agent", changes[0].Agent, "err", err)
		c.fleet.Written(changes[0], 0, false)
		return n, nil
	case err != nil:
		return 0, fmt.Errorf("write %d agents: %w", len(ops), err)
	}
	c.metrics.transactions.Inc()
	for i, change := range changes {
		c.fleet.Written(change, resp.Header.Revision, resp.Responses[i].GetResponseTxn().Succeeded)
	}
	return n, nil
}

// operation returns the transaction that makes a change, and about how large it is.
func (c *Cluster) operation(change fleet.Change, lease clientv3.LeaseID) (clientv3.Op, int, error) {
	agentKey := c.prefix + "agents/" + change.Agent
	sessions := c.prefix + "sessions/" + change.Agent + "/"
	size := 200 + 4*len(agentKey)
	var conditions []clientv3.Cmp
	var always, then []clientv3.Op
	switch {
	case change.Delete:
		return clientv3.OpTxn(nil, []clientv3.Op{clientv3.OpDelete(agentKey), clientv3.OpDelete(sessions, clientv3.WithPrefix())}, nil), size, nil
	case change.Session != nil:
		s := change.Session
		value, err := encode(session{Instance: s.Instance, Since: s.Since, RemoteAddr: s.RemoteAddr, Transport: s.Transport})
		if err != nil {
			return clientv3.Op{}, 0, err
		}
		size += len(value)
		always = append(always, clientv3.OpPut(sessions+c.self.ID, value, clientv3.WithLease(lease)))
	case !change.Keep:
		always = append(always, clientv3.OpDelete(sessions+c.self.ID))
	}
	if change.Modified >= 0 {
		conditions = append(conditions, clientv3.Compare(clientv3.ModRevision(agentKey), "=", change.Modified))
	}
	if change.Forget {
		conditions = append(conditions, clientv3.Compare(clientv3.CreateRevision(sessions).WithPrefix(), "=", 0))
		then = append(then, clientv3.OpDelete(agentKey))
	}
	if rec := change.Record; rec != nil {
		value, err := encode(record{Kind: rec.Kind, Registration: rec.Registration, FirstSeen: rec.FirstSeen, LostAt: rec.LostAt, Reason: rec.Reason})
		if err != nil {
			return clientv3.Op{}, 0, err
		}
		size += len(value)
		then = append(then, clientv3.OpPut(agentKey, value)) // before its session: see fleet.Event
	}
	return clientv3.OpTxn(conditions, append(then, always...), always), size, nil
}
