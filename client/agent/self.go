package agent

import (
	"context"
	"log/slog"
	"net/http"
	"slices"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"github.com/culvert-io/culvert/client/textfile"
	"github.com/culvert-io/culvert/gateway"
)

// self is the target "agent": what the agent says of itself and of its host, put together.
// Where sources clash the earlier one wins; that never fails a scrape.
type self struct {
	sources   []prometheus.Gatherer // the agent's own metrics first, the machine's groups last
	textfiles *textfile.Collector   // after all sources; nil without directories
	metrics   *metrics
	logger    *slog.Logger
}

func newSelf(a *Agent, cfg Config) (*self, error) {
	s := &self{sources: []prometheus.Gatherer{a.metrics.registry}, metrics: a.metrics, logger: cfg.Logger}
	if cfg.Gatherer != nil {
		s.sources = append(s.sources, cfg.Gatherer)
	}
	s.sources = append(s.sources, prometheus.GathererFunc(func() ([]*dto.MetricFamily, error) {
		return a.pushes.Load().Gather()
	}))
	if len(cfg.Textfile.Directories) == 0 {
		return s, nil
	}
	if cfg.Textfile.Logger == nil {
		cfg.Textfile.Logger = cfg.Logger
	}
	var err error
	s.textfiles, err = textfile.New(cfg.Textfile)
	return s, err
}

// gather returns what all sources but the textfiles have. A source that fails is
// logged; what it returned beside its error counts.
func (s *self) gather() []*dto.MetricFamily {
	gathered := make([][]*dto.MetricFamily, len(s.sources))
	for i, source := range s.sources {
		var err error
		if gathered[i], err = source.Gather(); err != nil {
			s.logger.Error("The agent's metrics are not complete", "err", err)
		}
	}
	families, dropped := textfile.Merge(gathered...)
	s.metrics.dropped.Add(float64(dropped))
	return families
}

// own returns the agent's own metrics.
func (s *self) own() ([]*dto.MetricFamily, error) {
	return prometheus.Gatherers(s.sources[:len(s.sources)-1]).Gather()
}

// collect returns a snapshot of all that is served; it must not be called without
// textfiles.
func (s *self) collect(ctx context.Context) (*textfile.Snapshot, error) {
	snapshot, err := s.textfiles.Collect(ctx, s.gather())
	if err == nil {
		s.metrics.dropped.Add(float64(snapshot.Dropped))
	}
	return snapshot, err
}

func (s *self) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if s.textfiles == nil {
		gateway.ServeFamilies(w, r, slices.Values(s.gather()), s.logger)
		return
	}
	snapshot, err := s.collect(r.Context())
	if err != nil { // the scraper has given up
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	gateway.ServeFamilies(w, r, snapshot.Families(), s.logger)
}

// Gather returns all at once.
func (s *self) Gather() ([]*dto.MetricFamily, error) {
	if s.textfiles == nil {
		return s.gather(), nil
	}
	snapshot, err := s.collect(context.Background())
	if err != nil {
		return nil, err
	}
	return snapshot.Gather(), nil
}
