package cluster

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/culvert-io/culvert/protocol"
	"github.com/culvert-io/culvert/proxy/fleet"
)

// record is agents/AGENT.
type record struct {
	Kind         string                `json:"kind,omitempty"`
	Registration protocol.Registration `json:"registration"`
	FirstSeen    time.Time             `json:"first_seen"`
	LostAt       time.Time             `json:"lost_at,omitzero"` // zero: connected
	Reason       string                `json:"lost_reason,omitempty"`
}

// session is sessions/AGENT/ID.
type session struct {
	Instance   string    `json:"instance"` // hashed
	Since      time.Time `json:"since"`
	RemoteAddr string    `json:"remote_address,omitempty"`
	Transport  string    `json:"transport,omitempty"`
}

const (
	// pageSize is how many keys are read from etcd at a time.
	pageSize = 500
	// zipFrom is from which size on values are compressed, maxValue the most that they
	// may have then.
	zipFrom, maxValue = 16 << 10, 16 << 20
)

// follow loads what is in etcd and takes the others' changes, until ctx ends.
func (c *Cluster) follow(ctx context.Context) {
	select {
	case <-c.first:
	case <-ctx.Done():
		return
	}
	for trouble := ""; ctx.Err() == nil; {
		err := c.followOnce(ctx)
		c.mu.Lock()
		c.watching = false
		c.mu.Unlock()
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			if err.Error() != trouble {
				c.logger.Warn("What other proxies write does not arrive; loading it anew", "err", err)
			}
			trouble = err.Error()
			pause(ctx, time.Second)
		}
	}
}

// followOnce returns nil where everything has to be loaded anew.
func (c *Cluster) followOnce(ctx context.Context) error {
	client := c.client.Load()
	revision, err := c.load(ctx, client)
	if err != nil {
		return err
	}
	// A member of etcd that is cut off from its leader tells nothing new.
	watchCtx, cancel := context.WithCancel(clientv3.WithRequireLeader(ctx))
	defer cancel()
	events := client.Watch(watchCtx, c.prefix, clientv3.WithPrefix(), clientv3.WithRev(revision+1), clientv3.WithFragment())
	c.mu.Lock()
	c.watching = true
	select {
	case <-c.loaded:
	default:
		close(c.loaded)
	}
	c.mu.Unlock()
	c.writer.wake()
	for {
		select {
		case <-c.resync:
			return nil
		case batch, ok := <-events:
			if !ok {
				return errors.New("the watch has ended")
			}
			if err := batch.Err(); err != nil {
				return err // compacted, perhaps
			}
			c.hear()
			c.apply(batch.Events)
		}
	}
}

// load reads all that is there, and returns of which revision that is.
func (c *Cluster) load(ctx context.Context, client *clientv3.Client) (int64, error) {
	select { // what asked for it so far is answered by this
	case <-c.resync:
	default:
	}
	callCtx, cancel := context.WithTimeout(ctx, callTimeout)
	secret, err := c.ensureSecret(callCtx, client)
	cancel()
	if err != nil {
		return 0, err
	}
	snapshot := fleet.Snapshot{Cluster: clusterID(secret), Records: map[string]fleet.Record{}, Held: map[string][]fleet.Held{}}
	peers, keys := map[string]Peer{}, map[string]string{}
	revision := int64(0)
	for from, more := c.prefix, true; more; {
		options := []clientv3.OpOption{clientv3.WithRange(clientv3.GetPrefixRangeEnd(c.prefix)), clientv3.WithLimit(pageSize)}
		if revision != 0 {
			options = append(options, clientv3.WithRev(revision))
		}
		callCtx, cancel := context.WithTimeout(ctx, 2*callTimeout)
		page, err := client.Get(callCtx, from, options...)
		cancel()
		if err != nil {
			return 0, err
		}
		if revision == 0 {
			revision = page.Header.Revision
		}
		for _, kv := range page.Kvs {
			kind, name, proxy := c.parse(string(kv.Key))
			from = string(kv.Key) + "\x00"
			switch kind {
			case "settled":
				snapshot.Settled = true
			case "proxies":
				if peer, ok := c.decodePeer(name, kv); ok {
					peers[name] = peer
				}
			case "sessions":
				if held, ok := c.decodeSession(name, proxy, kv); ok {
					snapshot.Held[name] = append(snapshot.Held[name], held)
				}
			case "agents":
				if rec, ok := c.decodeRecord(name, kv); ok {
					snapshot.Records[name] = rec
				}
			case "keys":
				if key, ok := c.decodeKey(name, kv); ok {
					keys[name] = key
				}
			}
		}
		more = page.More
	}
	before := c.Secret()
	if before != "" && before != secret {
		c.logger.Warn("etcd was set up anew: this proxy puts there again what it knows")
	}
	c.secret.Store(&secret)
	c.mu.Lock()
	c.peers = peers
	c.mu.Unlock()
	if c.pins != nil {
		c.pins.Load(keys, c.fleet.Cluster() == snapshot.Cluster)
	}
	c.fleet.Load(snapshot)
	c.logger.Info("Connected to the cluster", "proxies", len(peers), "agents", len(snapshot.Records), "revision", revision)
	return revision, nil
}

// parse splits a key into its kind, the name and, of a session, the proxy.
func (c *Cluster) parse(key string) (kind, name, proxy string) {
	kind, rest, _ := strings.Cut(strings.TrimPrefix(key, c.prefix), "/")
	name, proxy, _ = strings.Cut(rest, "/")
	return kind, name, proxy
}

// apply passes on what has changed in etcd.
func (c *Cluster) apply(events []*clientv3.Event) {
	changes := make([]fleet.Event, 0, len(events))
	var gone []string
	for _, e := range events {
		kind, name, proxy := c.parse(string(e.Kv.Key))
		deleted := e.Type == clientv3.EventTypeDelete
		switch kind {
		case "proxies":
			c.mu.Lock()
			if deleted {
				if peer, ok := c.peers[name]; ok {
					c.logger.Info("A proxy is gone", "proxy", name, "url", peer.URL)
					gone = append(gone, name)
				}
				delete(c.peers, name)
			} else if peer, ok := c.decodePeer(name, e.Kv); ok {
				if _, known := c.peers[name]; !known {
					c.logger.Info("A proxy has come", "proxy", name, "url", peer.URL, "version", peer.Version, "clock_ahead", time.Until(peer.Started).Round(time.Millisecond))
				}
				c.peers[name] = peer
			}
			c.mu.Unlock()
		case "sessions":
			if deleted {
				changes = append(changes, fleet.Event{Agent: name, Proxy: proxy})
			} else if held, ok := c.decodeSession(name, proxy, e.Kv); ok {
				changes = append(changes, fleet.Event{Agent: name, Proxy: proxy, Held: &held})
			}
		case "agents":
			if deleted {
				changes = append(changes, fleet.Event{Agent: name, Deleted: true, Revision: e.Kv.ModRevision})
			} else if rec, ok := c.decodeRecord(name, e.Kv); ok {
				changes = append(changes, fleet.Event{Agent: name, Record: &rec})
			}
		case "keys":
			if c.pins == nil {
				break
			}
			if deleted {
				c.pins.Apply(name, "")
			} else if key, ok := c.decodeKey(name, e.Kv); ok {
				c.pins.Apply(name, key)
			}
		case "secret":
			select { // somebody made another one
			case c.resync <- struct{}{}:
			default:
			}
		}
	}
	if len(changes) > 0 {
		c.fleet.Apply(changes)
	}
	for _, proxy := range gone {
		c.fleet.PeerGone(proxy)
	}
}

// unusable logs a value that is left out: another version wrote it, perhaps.
func (c *Cluster) unusable(kv *mvccpb.KeyValue, err error) {
	c.logger.Error("A value in etcd is left out", "key", string(kv.Key), "err", err)
}

func (c *Cluster) decodePeer(id string, kv *mvccpb.KeyValue) (Peer, bool) {
	if id == c.self.ID {
		return Peer{}, false
	}
	peer := Peer{ID: id}
	if err := decode(kv.Value, &peer); err != nil {
		c.unusable(kv, err)
		return peer, false
	}
	return peer, true
}

func (c *Cluster) decodeSession(name, proxy string, kv *mvccpb.KeyValue) (fleet.Held, bool) {
	var s session
	if err := decode(kv.Value, &s); err != nil || proxy == "" {
		c.unusable(kv, err)
		return fleet.Held{}, false
	}
	return fleet.Held{Proxy: proxy, Instance: s.Instance, Since: s.Since, RemoteAddr: s.RemoteAddr, Transport: s.Transport, Revision: kv.ModRevision}, true
}

func (c *Cluster) decodeRecord(name string, kv *mvccpb.KeyValue) (fleet.Record, bool) {
	var rec record
	err := decode(kv.Value, &rec)
	if err == nil {
		err = protocol.CheckName(name)
	}
	if err == nil {
		err = rec.Registration.Check(name)
	}
	if err != nil {
		c.unusable(kv, err)
		return fleet.Record{}, false
	}
	return fleet.Record{Kind: rec.Kind, Registration: rec.Registration, FirstSeen: rec.FirstSeen, LostAt: rec.LostAt, Reason: rec.Reason, Created: kv.CreateRevision, Modified: kv.ModRevision}, true
}

// decodeKey returns the SHA-256 of an agent's key, in hex.
func (c *Cluster) decodeKey(name string, kv *mvccpb.KeyValue) (string, bool) {
	sum, err := hex.DecodeString(string(kv.Value))
	if err == nil && len(sum) != 32 {
		err = errors.New("this is no SHA-256")
	}
	if err == nil {
		err = protocol.CheckName(name)
	}
	if err != nil {
		c.unusable(kv, err)
	}
	return string(kv.Value), err == nil
}

func encode(v any) (string, error) {
	text, err := json.Marshal(v)
	if err != nil || len(text) < zipFrom {
		return string(text), err
	}
	var out bytes.Buffer
	zw := gzip.NewWriter(&out)
	zw.Write(text)
	zw.Close()
	return out.String(), nil
}

func decode(value []byte, v any) error {
	if len(value) > 0 && value[0] == 0x1f {
		zr, err := gzip.NewReader(bytes.NewReader(value))
		if err != nil {
			return err
		}
		if value, err = io.ReadAll(io.LimitReader(zr, maxValue+1)); err != nil {
			return err
		}
		if len(value) > maxValue {
			return fmt.Errorf("the value has more than %d bytes", maxValue)
		}
	}
	return json.Unmarshal(value, v)
}
