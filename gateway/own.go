package gateway

import (
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
)

// Own are the server's own metrics, which are served beside the groups. Pushes
// can't clash with them.
type Own struct {
	gatherer prometheus.Gatherer
	prefix   string
	kinds    atomic.Pointer[map[string]dto.MetricType]
}

// NewOwn returns what a gatherer has. All names that start with the prefix are the
// server's, those of families that have no series yet too.
func NewOwn(gatherer prometheus.Gatherer, prefix string) *Own {
	o := &Own{gatherer: gatherer, prefix: prefix}
	o.kinds.Store(new(map[string]dto.MetricType))
	_, _ = o.gather() // it is asked for again, and errors told, by each scrape
	return o
}

// Reserved returns the type of an own family. It is a StoreConfig.Reserved.
func (o *Own) Reserved(name string) (dto.MetricType, bool) {
	kind, ok := (*o.kinds.Load())[name]
	return kind, ok
}

func (o *Own) gather() ([]*dto.MetricFamily, error) {
	families, err := o.gatherer.Gather()
	kinds := make(map[string]dto.MetricType, len(families))
	for _, f := range families {
		kinds[f.GetName()] = f.GetType()
	}
	o.kinds.Store(&kinds)
	return families, err
}
