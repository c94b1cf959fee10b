package etcdstore_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/goleak"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
)

func TestMain(m *testing.M) {
	code := m.Run()
	shared.stop()
	os.RemoveAll(shared.dir)
	if code == 0 {
		if err := goleak.Find(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

// member is an etcd process.
type member struct {
	name           string
	dir            string
	client, peer   string // addresses
	initialCluster string
	flags          []string

	mu      sync.Mutex // protects what follows
	process *exec.Cmd
	log     bytes.Buffer
}

// shared is the member that most tests use, each with a prefix of its own.
var shared member
var startShared sync.Once
var sharedErr error

func sharedEtcd(t testing.TB) *member {
	t.Helper()
	requireEtcd(t)
	startShared.Do(func() {
		if shared.dir, sharedErr = tempDir(); sharedErr == nil {
			sharedErr = startCluster(&shared)
		}
	})
	if sharedErr != nil {
		t.Fatal(sharedErr)
	}
	return &shared
}

// tempDir returns a directory for a member's data, in memory where that is possible: a
// disk that others keep busy would make etcd slow.
func tempDir() (string, error) {
	if dir, err := os.MkdirTemp("/dev/shm", "etcdstore"); err == nil {
		return dir, nil
	}
	return os.MkdirTemp("", "etcdstore")
}

func requireEtcd(t testing.TB) {
	t.Helper()
	if _, err := exec.LookPath("etcd"); err != nil {
		if os.Getenv("CULVERT_REQUIRE_EXTERNAL") == "1" {
			t.Fatal("etcd is missing")
		}
		t.Skip("etcd is missing; install the package etcd-server")
	}
}

// ownEtcd starts members for one test.
func ownEtcd(t testing.TB, n int, flags ...string) []*member {
	t.Helper()
	requireEtcd(t)
	members := make([]*member, n)
	for i := range members {
		dir, err := tempDir()
		if err != nil {
			t.Fatal(err)
		}
		members[i] = &member{dir: dir, flags: flags}
	}
	t.Cleanup(func() {
		for _, m := range members {
			m.stop()
			os.RemoveAll(m.dir)
		}
	})
	if err := startCluster(members...); err != nil {
		t.Fatal(err)
	}
	return members
}

// startCluster starts new members on free ports.
func startCluster(members ...*member) error {
	var cluster []string
	for i, m := range members {
		m.name, m.client, m.peer = fmt.Sprint("m", i), freeAddress(), freeAddress()
		cluster = append(cluster, m.name+"=http://"+m.peer)
	}
	for _, m := range members {
		m.initialCluster = strings.Join(cluster, ",")
		if err := m.start(); err != nil {
			return err
		}
	}
	for _, m := range members {
		if err := m.await(); err != nil {
			return err
		}
	}
	return nil
}

// given are the ports that were given away.
var given sync.Map

// freeAddress returns an address that nobody listens on. It is not among those that
// connections get by themselves: one of these could have it while a member is stopped.
func freeAddress() string {
	for {
		address := fmt.Sprint("127.0.0.1:", 10_000+rand.IntN(20_000))
		l, err := net.Listen("tcp", address)
		if err != nil {
			continue
		}
		l.Close()
		if _, taken := given.LoadOrStore(address, true); !taken {
			return address
		}
	}
}

// start starts the process with the data that it has.
func (m *member) start() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.process = exec.Command("etcd",
		"--name="+m.name, "--data-dir="+filepath.Join(m.dir, "data"), "--log-level=error", "--logger=zap",
		"--listen-client-urls=http://"+m.client, "--advertise-client-urls=http://"+m.client,
		"--listen-peer-urls=http://"+m.peer, "--initial-advertise-peer-urls=http://"+m.peer,
		"--initial-cluster="+m.initialCluster, "--heartbeat-interval=50", "--election-timeout=500")
	m.process.Args = append(m.process.Args, m.flags...)
	m.log.Reset()
	m.process.Stdout, m.process.Stderr = &m.log, &m.log
	return m.process.Start()
}

// restart starts a member that was stopped, and waits until it answers.
func (m *member) restart(t testing.TB) {
	t.Helper()
	err := m.start()
	if err == nil {
		err = m.await()
	}
	if err != nil {
		t.Fatal(err)
	}
}

// await waits until the member answers.
func (m *member) await() error {
	client, err := clientv3.New(clientConfig(m.client))
	if err != nil {
		return err
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	for {
		attempt, cancel := context.WithTimeout(ctx, time.Second)
		_, err := client.Get(attempt, "anything")
		cancel()
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			m.stop()
			return fmt.Errorf("etcd does not answer: %w\n%s", err, m.log.String())
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// stop kills the process, and waits for its end.
func (m *member) stop() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.process == nil {
		return
	}
	_ = m.process.Process.Kill()
	_ = m.process.Wait()
	m.process = nil
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
