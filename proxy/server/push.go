package server

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"

	"github.com/culvert-io/culvert/gateway"
	"github.com/culvert-io/culvert/gateway/boltstore"
	"github.com/culvert-io/culvert/gateway/etcdstore"
	"github.com/culvert-io/culvert/gateway/fastgzip"
	"github.com/culvert-io/culvert/proxy/ui"
)

// Push tunes the push store. Zero values mean the defaults.
type Push struct {
	// DefaultTTL is the TTL of groups for which neither a push nor a rule of the
	// configuration names one, 0: never.
	DefaultTTL time.Duration
	// ForgetAfter is how long a group that declared an interval leaves push_up 0
	// behind after its TTL: 7 days by default.
	ForgetAfter time.Duration
	// MaxBodySize bounds the body of a push in bytes, decompressed too: 64 MiB by
	// default.
	MaxBodySize int64
	// MaxSeriesPerGroup and MaxGroups bound the store, 0: no bound.
	MaxSeriesPerGroup, MaxGroups int
}

// pushStore is the push store, or the reason why there is none now. It is a file
// of its own, so that trouble with it is no trouble for scrapes.
type pushStore struct {
	server *Server
	own    *gateway.Own

	gateway atomic.Pointer[gateway.Gateway] // nil: not open

	mu    sync.Mutex // protects what follows
	store *gateway.Store
	err   error // why the last try to open it failed
}

// reopenEvery is the time between tries to open a push store that can't be opened.
const reopenEvery = 10 * time.Second

var errNoPushStore = errors.New("the push store is not open")

// openPushStore opens the store. It returns an error only where another process
// has it: all else is told to those who push.
func (s *Server) openPushStore() error {
	s.push = &pushStore{server: s, own: gateway.NewOwn(s.config.Registry, "culvert_proxy_")}
	s.config.Registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "culvert_proxy_push_store_up",
		Help: "1 while the push store takes pushes, 0 while it can't be opened or written: pushes get 503 then.",
	}, func() float64 {
		if s.push.Err() != nil {
			return 0
		}
		return 1
	}))
	err := s.push.open()
	if errors.Is(err, boltstore.ErrInUse) {
		return err
	}
	return nil
}

func (p *pushStore) open() error {
	s := p.server
	config := gateway.StoreConfig{
		MaxGroups: s.config.Push.MaxGroups, MaxSeriesPerGroup: s.config.Push.MaxSeriesPerGroup,
		ForgetAfter: s.config.Push.ForgetAfter, Lifetimes: s.settings.Load().lifetimes(s.config.Push.DefaultTTL),
		Reserved: p.own.Reserved, Logger: s.logger,
	}
	store, err := p.openStore(config)
	if err != nil {
		return p.failed(err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.err != nil {
		s.logger.Info("The push store is open again")
	}
	p.store, p.err = store, nil
	p.gateway.Store(gateway.New(gateway.Config{
		MaxBodySize: s.config.Push.MaxBodySize, Own: p.own, Gzip: fastgzip.Gzip, UseAllProcessors: s.config.UseAllProcessors,
		Registerer: prometheus.WrapRegistererWithPrefix("culvert_proxy_", s.config.Registry),
	}, store))
	return nil
}

// openStore opens the store of the cluster, or the proxy's own one.
func (p *pushStore) openStore(config gateway.StoreConfig) (*gateway.Store, error) {
	s := p.server
	if s.cluster != nil {
		client, err := s.cluster.Client(context.Background())
		if err != nil {
			return nil, err
		}
		return gateway.OpenShared(config, etcdstore.Open(client, s.cluster.Prefix()+"push/", etcdstore.Config{Logger: s.logger})), nil
	}
	backend := gateway.Memory()
	if s.config.StoragePath != "" {
		bolt, err := boltstore.Open(filepath.Join(s.config.StoragePath, "push.db"), s.logger)
		if err != nil {
			return nil, err
		}
		backend = bolt
	}
	store, err := gateway.OpenStore(config, backend)
	if err != nil {
		backend.Close()
	}
	return store, err
}

func (p *pushStore) failed(err error) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.err == nil || p.err.Error() != err.Error() {
		p.server.logger.Error("The push store can't be used: pushes are refused, scrapes go on", "err", err)
	}
	p.err = err
	return err
}

// Err returns why pushes can't be taken now.
func (p *pushStore) Err() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.store == nil {
		return fmt.Errorf("%w: %w", errNoPushStore, p.err)
	}
	return p.store.Err()
}

func (p *pushStore) current() *gateway.Store {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.store
}

// run works for the store until ctx ends; while it can't be opened, it tries again.
func (p *pushStore) run(ctx context.Context) error {
	timer := time.NewTicker(reopenEvery)
	defer timer.Stop()
	for p.current() == nil {
		select {
		case <-timer.C:
			_ = p.open() // the reason is kept, and logged when it changes
		case <-ctx.Done():
			return nil
		}
	}
	return p.current().Run(ctx)
}

// reload gives the groups the lifetimes of new settings.
func (p *pushStore) reload(settings *Settings) error {
	store := p.current()
	if store == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	return store.SetLifetimes(ctx, settings.lifetimes(p.server.config.Push.DefaultTTL))
}

// with serves a request by the gateway, or tells why there is none.
func (p *pushStore) with(serve func(*gateway.Gateway, http.ResponseWriter, *http.Request)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		g := p.gateway.Load()
		if g == nil {
			w.Header().Set("Retry-After", fmt.Sprint(int(reopenEvery.Seconds())))
			http.Error(w, p.Err().Error(), http.StatusServiceUnavailable)
			return
		}
		serve(g, w, r)
	}
}

// pathOf makes a handler of one that wants what follows /metrics/job in the path.
func (s *Server) pathOf(serve func(*gateway.Gateway, http.ResponseWriter, *http.Request, string)) http.HandlerFunc {
	return s.push.with(func(g *gateway.Gateway, w http.ResponseWriter, r *http.Request) {
		serve(g, w, r, strings.TrimPrefix(r.URL.Path, s.config.RoutePrefix+"/metrics/job"))
	})
}

// servePlainPush answers pushes whose path needs no redirect, which is nearly all, and
// returns false for others. To find their way through two routers and to set deadlines
// for an answer of one line is a tenth of what a push costs.
func (s *Server) servePlainPush(w http.ResponseWriter, r *http.Request) bool {
	if r.Method != http.MethodPut && r.Method != http.MethodPost {
		return false
	}
	rest, ok := strings.CutPrefix(r.URL.Path, s.config.RoutePrefix+"/metrics/job")
	if !ok || strings.Contains(rest, "//") || strings.Contains(rest, "/.") {
		return false
	}
	if job := strings.TrimPrefix(rest, "@base64"); len(job) < 2 || job[0] != '/' {
		return false
	}
	if r, ok = s.permit(w, r, pushers); ok {
		s.push.with(func(g *gateway.Gateway, w http.ResponseWriter, r *http.Request) { g.ServePush(w, r, rest) })(w, r)
		finish(w)
	}
	return true
}

// serveMetrics answers a scrape of the proxy itself. Without a push store its own
// metrics still tell so.
func (s *Server) serveMetrics(w http.ResponseWriter, r *http.Request) {
	only := r.URL.Query().Get("only")
	if s.push.gateway.Load() == nil && only != "groups" {
		gateway.ServeOwn(w, r, s.push.own, s.logger)
		return
	}
	s.push.with(gateway.ServeMetrics)(w, r)
}

// serveGroups answers GET /api/v1/groups?match[]=SELECTOR: the groups whose grouping labels
// one of the selectors matches; all where there is none.
func (s *Server) serveGroups(w http.ResponseWriter, r *http.Request) {
	wanted, err := parseSelectors(r.URL.Query()["match[]"])
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	s.push.with(func(_ *gateway.Gateway, w http.ResponseWriter, r *http.Request) {
		store := s.push.current()
		if err := store.NotLoaded(); err != nil { // without them all would seem to be gone
			w.Header().Set("Retry-After", fmt.Sprint(int(reopenEvery.Seconds())))
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		rows := []ui.Group{}
		for _, info := range store.Groups() {
			if len(wanted) == 0 || wanted.match(func(name string) string { value, _ := info.Key.Get(name); return value }) {
				rows = append(rows, newGroupRow(info))
			}
		}
		s.writeLongJSON(w, r, rows)
	})(w, r)
}

// serveGroup answers GET /api/v1/groups/PATH, where PATH is what follows /metrics/ in the
// path of the group's pushes: the series of that group.
func (s *Server) serveGroup(w http.ResponseWriter, r *http.Request) {
	path := strings.TrimPrefix(r.URL.Path, s.config.RoutePrefix+"/api/v1/groups/")
	rest, ok := strings.CutPrefix(path, "job")
	if job := strings.TrimPrefix(rest, "@base64"); !ok || len(job) < 2 || job[0] != '/' {
		http.Error(w, fmt.Sprintf("%q is no group; write /api/v1/groups/job/NAME, with /LABEL/VALUE for each other label of its key", path), http.StatusNotFound)
		return
	}
	s.push.with(func(g *gateway.Gateway, w http.ResponseWriter, r *http.Request) { gateway.ServeGroup(g, w, r, rest) })(w, r)
}

// deleteGroups serves DELETE /api/v1/groups?match[]=SELECTOR: it deletes the groups
// whose grouping labels one of the selectors matches; with dry_run=true it tells
// which they are.
func (s *Server) deleteGroups(w http.ResponseWriter, r *http.Request) {
	query := r.URL.Query()
	wanted, err := parseSelectors(query["match[]"])
	if err == nil && len(wanted) == 0 {
		err = errors.New("match[] is missing: say which groups, as in match[]={job=\"backup\"}")
	}
	dry := query.Get("dry_run")
	switch dry {
	case "", "false", "true":
	default:
		err = fmt.Errorf("dry_run=%q: write true or false", dry)
	}
	for i, matchers := range wanted {
		if !slices.ContainsFunc(matchers, func(m *labels.Matcher) bool { return !m.Matches("") }) {
			err = fmt.Errorf("match[]=%q would select every group; if that is meant, write {job=~\".+\"}", query["match[]"][i])
		}
		for _, m := range matchers {
			if m.Name == model.MetricNameLabel {
				err = fmt.Errorf("match[]: groups are selected by their grouping labels, not by the metric %s", m)
			}
		}
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	s.push.with(func(g *gateway.Gateway, w http.ResponseWriter, r *http.Request) {
		g.ServeDeleteMatching(w, r, func(key gateway.Key) bool {
			return wanted.match(func(name string) string { value, _ := key.Get(name); return value })
		}, dry == "true")
	})(w, r)
}
