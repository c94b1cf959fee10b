package etcdstore_test

import (
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/goleak"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"

	"github.com/culvert-io/culvert/protocol/externaltest"
)

func TestMain(m *testing.M) {
	code := m.Run()
	for _, m := range shared.members {
		m.Stop()
	}
	os.RemoveAll(shared.dir)
	if code == 0 {
		if err := goleak.Find(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

// shared has the member that most tests use, each with a prefix of its own.
var shared struct {
	once    sync.Once
	dir     string
	members []*externaltest.Etcd
	err     error
}

func sharedEtcd(t testing.TB) *externaltest.Etcd {
	t.Helper()
	program := externaltest.Program(t, "etcd", "etcd-server")
	shared.once.Do(func() {
		if shared.dir, shared.err = os.MkdirTemp("", "etcdstore"); shared.err == nil {
			shared.members, shared.err = externaltest.LaunchEtcd(program, shared.dir, 1)
		}
	})
	if shared.err != nil {
		t.Fatal(shared.err)
	}
	return shared.members[0]
}

var prefixes atomic.Int64

// newPrefix returns a prefix in the shared member that no other test has, nor the same one
// when it runs again.
func newPrefix(t testing.TB) string {
	return fmt.Sprintf("culvert/%s/%d/", t.Name(), prefixes.Add(1))
}

func clientConfig(addresses ...string) clientv3.Config {
	endpoints := make([]string, len(addresses))
	for i, a := range addresses {
		endpoints[i] = (&url.URL{Scheme: "http", Host: a}).String()
	}
	return clientv3.Config{
		Endpoints: endpoints, DialTimeout: 2 * time.Second, Logger: zap.NewNop(),
		DialKeepAliveTime: 10 * time.Second, DialKeepAliveTimeout: 2 * time.Second,
		DialOptions: []grpc.DialOption{grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 20 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 500 * time.Millisecond},
			MinConnectTimeout: 2 * time.Second,
		})},
	}
}

func newClient(t testing.TB, addresses ...string) *clientv3.Client {
	t.Helper()
	client, err := clientv3.New(clientConfig(addresses...))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	return client
}

// relay passes connections on, and can be made to fail.
type relay struct {
	address, target string
	listener        net.Listener
	work            sync.WaitGroup

	mu    sync.Mutex // protects what follows
	mode  int
	conns map[net.Conn]struct{}
}

const (
	passing    = iota
	swallowing // what the target answers is lost
	cut        // there are no connections
)

func newRelay(t testing.TB, target string) *relay {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	r := &relay{address: l.Addr().String(), target: target, listener: l, conns: map[net.Conn]struct{}{}}
	r.work.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			r.work.Go(func() { r.pass(conn) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		r.set(cut)
		r.work.Wait()
	})
	return r
}

// set changes what happens to connections, those that are there too.
func (r *relay) set(mode int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.mode = mode
	if mode == cut {
		for c := range r.conns {
			c.Close()
		}
	}
}

func (r *relay) is() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.mode
}

func (r *relay) keep(c net.Conn) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.mode == cut {
		c.Close()
		return false
	}
	r.conns[c] = struct{}{}
	return true
}

func (r *relay) drop(c net.Conn) {
	r.mu.Lock()
	defer r.mu.Unlock()
	c.Close()
	delete(r.conns, c)
}

func (r *relay) pass(conn net.Conn) {
	if !r.keep(conn) {
		return
	}
	defer r.drop(conn)
	target, err := net.Dial("tcp", r.target)
	if err != nil || !r.keep(target) {
		return
	}
	defer r.drop(target)
	var back sync.WaitGroup
	back.Go(func() {
		defer conn.Close()
		buf := make([]byte, 64<<10)
		for {
			n, err := target.Read(buf)
			if n > 0 && r.is() == passing {
				_, err = conn.Write(buf[:n])
			}
			if err != nil {
				return
			}
		}
	})
	_, _ = io.Copy(target, conn)
	target.Close()
	back.Wait()
}
