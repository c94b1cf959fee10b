package cluster

import (
	"context"
	"errors"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// errNoEtcd: nobody waits for an etcd that is away.
var errNoEtcd = errors.New("etcd does not answer")

// answering reports whether etcd answered a short time ago.
func (c *Cluster) answering() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.lease.Load() != 0 && time.Since(c.heard) < c.config.TTL
}

// Claim gives names of agents their keys where they have none, and returns the keys that
// stand. It is part of access.Registrar.
func (c *Cluster) Claim(keys map[string]string) (map[string]string, error) {
	client := c.client.Load()
	if !c.answering() {
		return nil, errNoEtcd
	}
	standing := map[string]string{}
	var names []string
	var ops []clientv3.Op
	commit := func() error {
		ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
		defer cancel()
		resp, err := client.Txn(ctx).Then(ops...).Commit()
		if err != nil {
			return err
		}
		for i, name := range names {
			standing[name] = keys[name]
			if txn := resp.Responses[i].GetResponseTxn(); !txn.Succeeded {
				standing[name] = string(txn.Responses[0].GetResponseRange().Kvs[0].Value)
			}
		}
		names, ops = nil, nil
		return nil
	}
	for name, key := range keys {
		at := c.prefix + "keys/" + name
		names = append(names, name)
		ops = append(ops, clientv3.OpTxn([]clientv3.Cmp{clientv3.Compare(clientv3.CreateRevision(at), "=", 0)},
			[]clientv3.Op{clientv3.OpPut(at, key)}, []clientv3.Op{clientv3.OpGet(at)}))
		if len(ops) == maxBatch {
			if err := commit(); err != nil {
				return nil, err
			}
		}
	}
	if len(ops) > 0 {
		if err := commit(); err != nil {
			return nil, err
		}
	}
	return standing, nil
}

// Release takes the key from a name, on every proxy. It is part of access.Registrar.
func (c *Cluster) Release(name string) (bool, error) {
	client := c.client.Load()
	if !c.answering() {
		return false, errNoEtcd
	}
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	resp, err := client.Delete(ctx, c.prefix+"keys/"+name)
	if err != nil {
		return false, err
	}
	return resp.Deleted > 0, nil
}
