// Package cluster makes one of several proxies, through an etcd that they share: it
// carries what each knows of its agents to the others, and scrapes to the proxy that
// holds the agent.
//
// Below the prefix fleet/ there is in etcd:
//
//	secret                  made by the first proxy: with it proxies know each other
//	settled                 the list of agents is complete
//	proxies/ID              a proxy (Peer), under its lease
//	sessions/AGENT/ID       a session that the proxy ID holds, under the proxy's lease
//	agents/AGENT            what is known of an agent until it is forgotten
//	keys/AGENT              SHA-256 of the key that the agent's name is pinned to
//
// Values are JSON, those of more than 16 KiB by gzip. Unknown fields are ignored. A lease
// ends TTL after its proxy was heard for the last time, and what is under it is deleted.
package cluster

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"

	"github.com/culvert-io/culvert/proxy/fleet"
)

// Config says where the others are. Zero values mean the defaults.
type Config struct {
	// Endpoints are the URLs of etcd's members. None: the proxy is alone.
	Endpoints []string
	// Prefix is what all keys start with, "/culvert/" by default.
	Prefix string
	// Username and PasswordFile are for an etcd with authentication. The file is read
	// when the proxy connects.
	Username, PasswordFile string
	// EtcdTLS and PeerTLS are for https: to etcd, and to the other proxies.
	EtcdTLS, PeerTLS TLS
	// TTL is after which time the others take a proxy for gone that etcd does not hear
	// any more: 10 s by default, at least 2 s.
	TTL time.Duration
}

// TLS names PEM files: of the authorities that certificates of the other side are from,
// where the system's are not meant, and of the own certificate, where one is asked for.
type TLS struct{ CAFile, CertFile, KeyFile string }

// Peer is a proxy as the others see it.
type Peer struct {
	ID string `json:"-"`
	// URL is where it takes scrapes that others pass on: http or https, without a path.
	URL     string    `json:"url"`
	Version string    `json:"version,omitempty"`
	Started time.Time `json:"started"`
}

// Pins is what shares the keys of agents: access.Pins.
type Pins interface {
	// Load takes all keys, by the agents' names; another cluster than last time where
	// same is false.
	Load(keys map[string]string, same bool)
	// Apply takes one key, "" for none any more.
	Apply(name, key string)
}

// Cluster is this proxy's part in the cluster. All methods may be called at the same time.
type Cluster struct {
	config   Config
	self     Peer
	prefix   string // of the fleet's keys
	logger   *slog.Logger
	etcdTLS  *tls.Config
	metrics  *metrics
	peerHTTP *http.Transport

	fleet *fleet.Fleet // set by Run
	pins  Pins         // the same

	connecting sync.Mutex // held while the client is made

	first  chan struct{} // closed once there was a lease
	client atomic.Pointer[clientv3.Client]
	secret atomic.Pointer[string]
	lease  atomic.Int64  // 0: none
	leases int           // that were made; of keepLease alone
	resync chan struct{} // has one: load everything anew
	leased chan struct{} // has one: the lease may be gone

	writer  writer
	hearing hearing

	mu       sync.Mutex // protects what follows
	peers    map[string]Peer
	loaded   chan struct{} // closed once everything was loaded
	watching bool          // what others write arrives
	heard    time.Time     // when etcd answered for the last time
}

// New checks the configuration. It does not connect: etcd may come later.
func New(config Config, logger *slog.Logger, registry prometheus.Registerer) (*Cluster, error) {
	for _, e := range config.Endpoints {
		if u, err := url.Parse(e); err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
			return nil, fmt.Errorf("etcd endpoint %q: use a whole URL, as in http://etcd-1:2379", e)
		}
	}
	if config.Prefix == "" {
		config.Prefix = "/culvert/"
	}
	if !strings.HasSuffix(config.Prefix, "/") {
		config.Prefix += "/"
	}
	if config.TTL == 0 {
		config.TTL = 10 * time.Second
	}
	config.TTL = max(config.TTL, 2*time.Second)
	if (config.Username == "") != (config.PasswordFile == "") {
		return nil, errors.New("etcd: give user name and password file, or none of them")
	}
	etcdTLS, err := config.EtcdTLS.config()
	if err != nil {
		return nil, fmt.Errorf("etcd: %w", err)
	}
	peerTLS, err := config.PeerTLS.config()
	if err != nil {
		return nil, fmt.Errorf("other proxies: %w", err)
	}
	c := &Cluster{
		config: config, prefix: config.Prefix + "fleet/", logger: logger, etcdTLS: etcdTLS,
		first: make(chan struct{}), loaded: make(chan struct{}), resync: make(chan struct{}, 1), leased: make(chan struct{}, 1),
		peers: map[string]Peer{}, heard: time.Now(), peerHTTP: newPeerTransport(peerTLS),
		writer: writer{dirty: map[string]struct{}{}, work: make(chan struct{}, 1)}, hearing: hearing{peers: map[string]*peerHearing{}},
	}
	c.metrics = newMetrics(registry, c)
	return c, nil
}

// config returns nil where nothing is configured and the defaults do.
func (t TLS) config() (*tls.Config, error) {
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	if t.CAFile != "" {
		pool, err := readPool(t.CAFile)
		if err != nil {
			return nil, err
		}
		config.RootCAs = pool
	}
	if (t.CertFile == "") != (t.KeyFile == "") {
		return nil, errors.New("give certificate and key file, or none of them")
	}
	if t.CertFile != "" {
		load := func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			cert, err := tls.LoadX509KeyPair(t.CertFile, t.KeyFile)
			return &cert, err
		}
		if _, err := load(nil); err != nil {
			return nil, err
		}
		config.GetClientCertificate = load // a renewed one needs no restart
	}
	return config, nil
}

// Shared returns what connects a fleet to the cluster. Self is this proxy; it is set
// before Run.
func (c *Cluster) Shared(self string) *fleet.Shared {
	c.self.ID = self
	return &fleet.Shared{
		Self: self, Changed: c.writer.mark, Alive: c.alive, Leads: c.leads, Settled: c.settled,
		URL: func(proxy string) string { peer, _ := c.Peer(proxy); return peer.URL }, Silent: c.silent,
	}
}

// Run takes part in the cluster until ctx ends; then it takes back what this proxy holds.
// It never fails: what goes wrong is logged and tried again, and the fleet goes on with
// what it knows.
func (c *Cluster) Run(ctx context.Context, self Peer, f *fleet.Fleet, pins Pins) {
	c.mu.Lock()
	self.ID = c.self.ID
	c.self, c.fleet, c.pins = self, f, pins
	c.mu.Unlock()
	defer c.peerHTTP.CloseIdleConnections()
	for trouble := ""; ctx.Err() == nil; {
		_, err := c.Client(ctx)
		if err == nil {
			break
		}
		if err.Error() != trouble && ctx.Err() == nil {
			trouble = err.Error()
			c.logger.Error("etcd can't be reached; the proxy goes on by itself", "endpoints", c.config.Endpoints, "err", err)
		}
		pause(ctx, time.Second)
	}
	client := c.client.Load()
	if client == nil {
		return
	}
	defer client.Close()
	var parts sync.WaitGroup
	workCtx, stop := context.WithCancel(context.WithoutCancel(ctx)) // ends after the last writes
	parts.Go(func() { c.keepLease(workCtx) })
	parts.Go(func() { c.follow(workCtx) })
	parts.Go(func() { c.listen(workCtx) })
	c.write(ctx)
	flushCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), flushTimeout)
	defer cancel()
	c.flush(flushCtx)
	stop()
	parts.Wait()
	if lease := c.lease.Load(); lease != 0 {
		if _, err := client.Revoke(flushCtx, clientv3.LeaseID(lease)); err != nil {
			c.logger.Warn("etcd could not be told that this proxy goes; the others notice it by themselves", "within", c.config.TTL, "err", err)
		}
	}
}

const (
	// flushTimeout bounds the last writes of a proxy that ends.
	flushTimeout = 3 * time.Second
	// callTimeout bounds one request to etcd.
	callTimeout = 5 * time.Second
)

// Client returns the client for etcd, for others to use too. It may be called before Run,
// which closes the client when it returns. It returns an error where etcd wants a user
// name and can't be asked within 5 s, or refuses it; without one, a client for an etcd
// that is away is a client all the same.
func (c *Cluster) Client(ctx context.Context) (*clientv3.Client, error) {
	c.connecting.Lock()
	defer c.connecting.Unlock()
	if client := c.client.Load(); client != nil {
		return client, nil
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	client, err := c.connect()
	if err != nil {
		return nil, fmt.Errorf("etcd: %w", err)
	}
	c.client.Store(client)
	return client, nil
}

// Prefix returns what all keys in etcd start with. The fleet's are below fleet/ there.
func (c *Cluster) Prefix() string { return c.config.Prefix }

func (c *Cluster) connect() (*clientv3.Client, error) {
	config := clientv3.Config{
		Endpoints: c.config.Endpoints, Username: c.config.Username, Logger: zap.NewNop(),
		// etcd hangs up on who pings more often than every 5 s, or without a request.
		DialTimeout: callTimeout, DialKeepAliveTime: 10 * time.Second, DialKeepAliveTimeout: 3 * time.Second,
		// gRPC's own waits grow to 2 minutes, for which an etcd that is back would go unnoticed.
		DialOptions: []grpc.DialOption{grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 3 * time.Second},
			MinConnectTimeout: callTimeout,
		})},
	}
	for _, e := range c.config.Endpoints {
		if strings.HasPrefix(e, "https:") {
			config.TLS = c.etcdTLS
		}
	}
	if c.config.PasswordFile != "" {
		text, err := os.ReadFile(c.config.PasswordFile)
		if err != nil {
			return nil, err
		}
		if config.Password = strings.TrimRight(string(text), "\r\n"); config.Password == "" {
			return nil, fmt.Errorf("%s is empty", c.config.PasswordFile)
		}
	}
	return clientv3.New(config)
}

// keepLease holds a lease with the proxy's own key, until ctx ends.
func (c *Cluster) keepLease(ctx context.Context) {
	for trouble := ""; ctx.Err() == nil; {
		err := c.renew(ctx)
		switch {
		case err == nil:
			if trouble != "" {
				c.logger.Info("etcd answers again")
				select {
				case c.resync <- struct{}{}: // what could not be written meanwhile
				default:
				}
			}
			trouble = ""
			select {
			case <-ctx.Done():
			case <-c.leased:
			case <-time.After(c.config.TTL / 4):
			}
		case errors.Is(err, rpctypes.ErrLeaseNotFound):
			c.lease.Store(0) // the next renewal makes another one
		default:
			if trouble == "" && ctx.Err() == nil {
				c.logger.Error("etcd does not answer; this proxy goes on with what it knows", "err", err)
			}
			trouble = err.Error()
			pause(ctx, min(time.Second, c.config.TTL/8))
		}
	}
}

func (c *Cluster) renew(ctx context.Context) error {
	client := c.client.Load()
	ctx, cancel := context.WithTimeout(ctx, min(callTimeout, c.config.TTL/2))
	defer cancel()
	if lease := c.lease.Load(); lease != 0 {
		// The client's own KeepAlive tells neither when etcd answered last nor why not.
		if _, err := client.KeepAliveOnce(ctx, clientv3.LeaseID(lease)); err != nil {
			return err
		}
		c.hear()
		return nil
	}
	another := c.leases > 0
	granted, err := client.Grant(ctx, int64((c.config.TTL+time.Second-1)/time.Second))
	if err != nil {
		return err
	}
	value, err := json.Marshal(c.self)
	if err != nil {
		return err
	}
	if _, err := client.Put(ctx, c.prefix+"proxies/"+c.self.ID, string(value), clientv3.WithLease(granted.ID)); err != nil {
		return err
	}
	c.lease.Store(int64(granted.ID))
	if c.leases++; c.leases == 1 {
		close(c.first)
	}
	c.hear()
	c.fleet.Unsaved(another)
	c.writer.wake()
	if another {
		// What etcd lost with the lease before may be more than that.
		select {
		case c.resync <- struct{}{}:
		default:
		}
	}
	return nil
}

func (c *Cluster) hear() {
	c.mu.Lock()
	c.heard = time.Now()
	c.mu.Unlock()
}

// Up reports whether etcd answers and the others' writes arrive; where not, since when.
func (c *Cluster) Up() (bool, time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.watching && c.lease.Load() != 0 && time.Since(c.heard) < c.config.TTL, c.heard
}

// Secret returns what a proxy of the cluster shows to another one, "" while it is not
// known.
func (c *Cluster) Secret() string {
	if secret := c.secret.Load(); secret != nil {
		return *secret
	}
	return ""
}

// Peer returns a proxy of the cluster.
func (c *Cluster) Peer(id string) (Peer, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if id == c.self.ID {
		return c.self, true
	}
	peer, ok := c.peers[id]
	return peer, ok
}

// Unwritten returns how many agents have changes that etcd does not have yet, and since
// when there are such.
func (c *Cluster) Unwritten() (int, time.Time) {
	c.writer.mu.Lock()
	defer c.writer.mu.Unlock()
	return len(c.writer.dirty), c.writer.since
}

// Peers returns the other proxies, as etcd told last, sorted by ID.
func (c *Cluster) Peers() []Peer {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.SortedFunc(maps.Values(c.peers), func(a, b Peer) int { return strings.Compare(a.ID, b.ID) })
}

// Alone reports whether no other proxy is known.
func (c *Cluster) Alone() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.peers) == 0
}

// leads reports whether this proxy has the lowest ID of the living.
func (c *Cluster) leads() bool {
	if up, _ := c.Up(); !up {
		return false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for id := range c.peers {
		if id < c.self.ID {
			return false
		}
	}
	return true
}

// settled notes for all proxies that the list of agents is complete.
func (c *Cluster) settled() {
	client := c.client.Load()
	if client == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	if _, err := client.Put(ctx, c.prefix+"settled", "{}"); err != nil {
		c.logger.Warn("etcd could not be told that the list of agents is complete; new proxies wait for --agent.settle-time", "err", err)
	}
}

// ensureSecret returns the secret of the cluster, which the first proxy makes.
func (c *Cluster) ensureSecret(ctx context.Context, client *clientv3.Client) (string, error) {
	random := make([]byte, 32)
	rand.Read(random)
	key := c.prefix + "secret"
	resp, err := client.Txn(ctx).If(clientv3.Compare(clientv3.CreateRevision(key), "=", 0)).
		Then(clientv3.OpPut(key, hex.EncodeToString(random))).Else(clientv3.OpGet(key)).Commit()
	if err != nil {
		return "", err
	}
	secret := hex.EncodeToString(random)
	if !resp.Succeeded {
		secret = string(resp.Responses[0].GetResponseRange().Kvs[0].Value)
	}
	if len(secret) < 32 {
		return "", fmt.Errorf("the value of %s has %d bytes, and at least 32 are needed; delete the key to have a new one made, and restart the proxies", key, len(secret))
	}
	return secret, nil
}

// clusterID tells one cluster's keys from another's, and does not betray the secret.
func clusterID(secret string) string {
	sum := sha256.Sum256([]byte("culvert cluster " + secret))
	return hex.EncodeToString(sum[:8])
}

// pause waits; it returns early when ctx ends.
func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
