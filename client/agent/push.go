package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"github.com/culvert-io/culvert/client/spool"
	"github.com/culvert-io/culvert/gateway"
	"github.com/culvert-io/culvert/gateway/boltstore"
)

// Push says where the agent takes pushes from its host, and what becomes of them.
//
// A group whose key has an instance is the machine's: the agent keeps it, and the target
// "agent" serves it. Any other group is a service's: it waits in a spool on disk until the
// proxies have it. The query parameter scope=machine or scope=service overrides that.
type Push struct {
	// ListenAddresses are HOST:PORT, or unix:PATH of a socket, which whoever may enter
	// its directory may use. None by default.
	ListenAddresses []string
	// StoragePath is the directory for the machine's groups and the spool. ListenAddresses
	// need one. Without them, what is there is still served and relayed.
	StoragePath string
	// SpoolMaxBytes bounds the spool: spool.DefaultMaxBytes by default.
	SpoolMaxBytes int64
	// MaxBodySize bounds the body of a push in bytes, decompressed too: 64 MiB by default.
	MaxBodySize int64
	// Relay says which proxies get the service's pushes: RelayAll by default.
	Relay Relay
}

// Relay says which proxies get the service's pushes.
type Relay string

const (
	// RelayAll is for proxies that each have a push store of their own: each gets all.
	RelayAll Relay = "all"
	// RelayFirst is for proxies that share a push store: the first in the order of
	// Config.ProxyURLs that is connected gets them.
	RelayFirst Relay = "first"
)

// check returns an error that says what to do.
func (p Push) check() error {
	for _, address := range p.ListenAddresses {
		if path, ok := strings.CutPrefix(address, "unix:"); ok {
			if path == "" {
				return fmt.Errorf("push address %q: the path is missing; it looks like unix:/run/culvert/push.sock", address)
			}
			if len(path) > maxSocketPath {
				return fmt.Errorf("push address %q: the path has %d bytes, that of a socket may have %d", address, len(path), maxSocketPath)
			}
		} else if _, _, err := net.SplitHostPort(address); err != nil {
			return fmt.Errorf("push address %q: %w; it looks like 127.0.0.1:9091 or unix:/run/culvert/push.sock", address, err)
		}
	}
	if len(p.ListenAddresses) > 0 && p.StoragePath == "" {
		return errors.New("pushes are acknowledged when they are on disk: with --push.listen-address, name a directory for them with --storage.path, as in --storage.path=/var/lib/culvert-client")
	}
	if p.SpoolMaxBytes < 0 || p.MaxBodySize < 0 {
		return errors.New("--push.spool-max-bytes and --push.max-body-size can't be less than 0")
	}
	switch p.Relay {
	case "", RelayAll, RelayFirst:
		return nil
	}
	return fmt.Errorf("--push.relay=%s: write all, for proxies with push stores of their own, or first, for proxies that share one", p.Relay)
}

// The files in StoragePath.
const groupsFile, spoolFile = "push.db", "spool.db"

const (
	// maxSocketPath is what all systems take.
	maxSocketPath = 103
	// reopenEvery is the time between tries to open a file that can't be opened.
	reopenEvery = 10 * time.Second
	// proxyPrefix starts metric names that a proxy's push store refuses.
	proxyPrefix = "culvert_proxy_"
)

// pushes are the machine's groups, and the spool of what goes to the proxies. Each is a
// file of its own: trouble with one is no trouble for the other, nor for scrapes.
type pushes struct {
	agent         *Agent
	path          string           // Push.StoragePath at the start
	reader        *gateway.Gateway // reads and checks what goes to the spool
	own           *gateway.Own
	groups, queue pushFile

	gateway atomic.Pointer[gateway.Gateway] // to store, nil: it is not open
	store   atomic.Pointer[gateway.Store]
	spool   atomic.Pointer[spool.Spool]

	relaying context.Context
	mu       sync.Mutex        // protects what follows
	relays   map[string]*relay // by the name of their cursor; nil: it is too late for more
}

// pushFile is one of the two files.
type pushFile struct {
	open   func() error
	run    func(ctx context.Context) error // what was opened
	opened bool                            // of the goroutine that runs it, once there is one
	err    atomic.Pointer[error]           // why it could not be opened
}

// startPushes opens the files and the listeners. What it returns ends all of it, and
// waits. It returns an error where an address can't be had, or another process has the
// files.
func (a *Agent) startPushes(config Push) (stop func(), err error) {
	if config.StoragePath == "" {
		return func() {}, nil
	}
	none, err := gateway.OpenStore(gateway.StoreConfig{}, gateway.Memory())
	if err != nil {
		return nil, err
	}
	relaying, stopRelays := context.WithCancel(context.Background())
	p := &pushes{
		agent: a, path: config.StoragePath, relaying: relaying, relays: map[string]*relay{},
		reader: gateway.New(gateway.Config{MaxBodySize: config.MaxBodySize}, none),
		own: gateway.NewOwn(prometheus.GathererFunc(func() ([]*dto.MetricFamily, error) {
			return a.current.Load().self.own()
		}), "culvert_client_"),
	}
	p.groups.open, p.groups.run = p.openGroups, func(ctx context.Context) error { return p.store.Load().Run(ctx) }
	p.queue.open, p.queue.run = p.openSpool, func(ctx context.Context) error { return p.spool.Load().Run(ctx) }
	writing, stopFiles := context.WithCancel(context.Background())
	var running sync.WaitGroup
	var servers []*http.Server
	stop = func() {
		ctx, cancel := context.WithTimeout(context.Background(), a.current.Load().ShutdownTimeout)
		defer cancel()
		for _, server := range servers {
			if server.Shutdown(ctx) != nil {
				server.Close()
			}
		}
		stopRelays()
		p.mu.Lock()
		relays := p.relays
		p.relays = nil
		p.mu.Unlock()
		for _, r := range relays {
			<-r.done
		}
		stopFiles()
		running.Wait()
	}
	for _, file := range []*pushFile{&p.groups, &p.queue} {
		if err := p.open(file); errors.Is(err, boltstore.ErrInUse) {
			stop()
			return nil, err
		}
		running.Go(func() { p.keep(writing, file) })
	}
	logger := a.current.Load().Logger
	for _, address := range config.ListenAddresses {
		l, err := listenPush(address)
		if err != nil {
			stop()
			return nil, fmt.Errorf("push address %s: %w", address, err)
		}
		logger.Info("Taking pushes", "address", l.Addr())
		if at, ok := l.Addr().(*net.TCPAddr); ok && !at.IP.IsLoopback() {
			logger.Warn("Whoever reaches this address may push and delete; 127.0.0.1 or a socket is for this host alone", "address", at)
		}
		server := &http.Server{
			Handler:           p.routes(),
			ReadHeaderTimeout: 10 * time.Second,
			IdleTimeout:       5 * time.Minute,
			ErrorLog:          slog.NewLogLogger(logger.Handler(), slog.LevelDebug),
		}
		servers = append(servers, server)
		running.Go(func() { server.Serve(l) })
	}
	a.metrics.registry.MustRegister(newPushCollector(p))
	a.pushes.Store(p)
	return stop, nil
}

// listenPush listens on HOST:PORT or unix:PATH.
func listenPush(address string) (net.Listener, error) {
	path, ok := strings.CutPrefix(address, "unix:")
	if !ok {
		return net.Listen("tcp", address)
	}
	l, err := net.Listen("unix", path)
	if errors.Is(err, syscall.EADDRINUSE) {
		conn, dialErr := net.DialTimeout("unix", path, time.Second)
		switch {
		case dialErr == nil:
			conn.Close()
		case errors.Is(dialErr, syscall.ECONNREFUSED): // left by a process that was killed
			if err := os.Remove(path); err != nil {
				return nil, err
			}
			l, err = net.Listen("unix", path)
		}
	}
	if err != nil {
		return nil, err
	}
	// As for a port, who may push is for the network, here the directory, to say.
	if err := os.Chmod(path, 0o666); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// open opens a file, and logs why it can't be when that changes.
func (p *pushes) open(file *pushFile) error {
	err := file.open()
	logger := p.agent.current.Load().Logger
	before := file.err.Load()
	switch {
	case err == nil:
		file.opened = true
		file.err.Store(nil)
		if before != nil {
			logger.Info("Pushes that were refused are taken again")
		}
		return nil
	case before == nil || (*before).Error() != err.Error():
		logger.Error("Pushes are refused, scrapes go on", "err", err)
	}
	file.err.Store(&err)
	return err
}

// keep runs what a file holds, until ctx ends. One that can't be opened it tries to open
// again.
func (p *pushes) keep(ctx context.Context, file *pushFile) {
	timer := time.NewTicker(reopenEvery)
	defer timer.Stop()
	for !file.opened {
		select {
		case <-timer.C:
			_ = p.open(file) // the reason is kept
		case <-ctx.Done():
			return
		}
	}
	if err := file.run(ctx); err != nil {
		p.agent.current.Load().Logger.Error("A file of pushes could not be closed in good order", "err", err)
	}
}

func (p *pushes) openGroups() error {
	snap := p.agent.current.Load()
	backend, err := boltstore.Open(filepath.Join(p.path, groupsFile), snap.Logger)
	if err != nil {
		return err
	}
	store, err := gateway.OpenStore(gateway.StoreConfig{Reserved: p.own.Reserved, Logger: snap.Logger}, backend)
	if err != nil {
		backend.Close()
		return err
	}
	p.store.Store(store)
	p.gateway.Store(gateway.New(gateway.Config{
		MaxBodySize: snap.Push.MaxBodySize, Own: p.own,
		Registerer: prometheus.WrapRegistererWithPrefix("culvert_client_", p.agent.metrics.registry),
	}, store))
	return nil
}

func (p *pushes) openSpool() error {
	snap := p.agent.current.Load()
	s, err := spool.Open(filepath.Join(p.path, spoolFile), spool.Config{MaxBytes: snap.Push.SpoolMaxBytes, Logger: snap.Logger})
	if err != nil {
		return err
	}
	p.spool.Store(s)
	p.configure()
	return nil
}

// configure has a relay for each cursor of the configuration, and none else.
func (p *pushes) configure() {
	snap, s := p.agent.current.Load(), p.spool.Load()
	p.mu.Lock()
	defer p.mu.Unlock()
	if s == nil || p.relays == nil {
		return
	}
	names := []string{firstCursor}
	if snap.Push.Relay != RelayFirst {
		names = nil
		for _, u := range snap.proxies {
			names = append(names, u.Redacted())
		}
	}
	s.Configure(snap.Push.SpoolMaxBytes, names...)
	for name, r := range p.relays {
		if !slices.Contains(names, name) {
			r.stop()
			<-r.done
			delete(p.relays, name)
		}
	}
	for _, name := range names {
		if p.relays[name] == nil {
			cursor, err := s.Cursor(name)
			if err != nil {
				panic(err) // it was made above
			}
			p.relays[name] = startRelay(p, s, cursor, name)
		}
	}
}

// changed tells the relays that sessions came or went.
func (p *pushes) changed() {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, r := range p.relays {
		r.nudge()
	}
}

// Gather returns the machine's groups. It implements prometheus.Gatherer.
func (p *pushes) Gather() ([]*dto.MetricFamily, error) {
	if p == nil || p.store.Load() == nil {
		return nil, nil
	}
	return p.store.Load().Gather()
}

// Err returns why pushes can't be taken now.
func (p *pushes) Err() error {
	var errs []error
	for _, file := range []*pushFile{&p.groups, &p.queue} {
		if err := file.err.Load(); err != nil {
			errs = append(errs, *err)
		}
	}
	if s := p.store.Load(); s != nil {
		errs = append(errs, s.Err())
	}
	if s := p.spool.Load(); s != nil {
		errs = append(errs, s.Err())
	}
	return errors.Join(errs...)
}
