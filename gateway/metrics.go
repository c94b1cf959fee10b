package gateway

import (
	"net/http"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics are the gateway's own. Their names start with push_; the server puts its
// own prefix in front.
type metrics struct {
	requests *prometheus.CounterVec
	duration *prometheus.HistogramVec
	size     prometheus.Histogram

	// What nearly every request adds to: finding it by its labels costs more than that.
	pushed   prometheus.Counter
	pushTook prometheus.Observer
}

func newMetrics(registerer prometheus.Registerer, s *Store) *metrics {
	native := func(o prometheus.HistogramOpts) prometheus.HistogramOpts {
		o.NativeHistogramBucketFactor, o.NativeHistogramMaxBucketNumber, o.NativeHistogramMinResetDuration = 1.1, 100, time.Hour
		return o
	}
	m := &metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "push_requests_total",
			Help: "Requests that change the push store, by handler (push, batch, delete, delete_matching, wipe) and status code. A rise of 400 means that jobs push what can't be taken, of 503 that the store can't write.",
		}, []string{"handler", "code"}),
		duration: prometheus.NewHistogramVec(native(prometheus.HistogramOpts{
			Name:    "push_request_duration_seconds",
			Help:    "Time from the head of a request that changes the push store to its answer, by handler.",
			Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5},
		}), []string{"handler"}),
		size: prometheus.NewHistogram(native(prometheus.HistogramOpts{
			Name:    "push_body_bytes",
			Help:    "Sizes of the bodies of pushes, decompressed.",
			Buckets: prometheus.ExponentialBuckets(1<<10, 8, 6),
		})),
	}
	m.pushed, m.pushTook = m.requests.WithLabelValues("push", "200"), m.duration.WithLabelValues("push")
	if registerer == nil {
		return m
	}
	gauge := func(name, help string, value func() float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, value)
	}
	counter := func(name, help string, value func() float64) prometheus.Collector {
		return prometheus.NewCounterFunc(prometheus.CounterOpts{Name: name, Help: help}, value)
	}
	registerer.MustRegister(m.requests, m.duration, m.size,
		gauge("push_groups", "Groups in the push store.", func() float64 { return float64(s.Len()) }),
		gauge("push_spools", "Spools that are known, so that none of their pushes is made twice. Near 100,000 the one that was silent for longest is forgotten.", func() float64 { return float64(s.Spools()) }),
		gauge("push_queue_length", "Changes that wait to be written. Near 1000 pushes are refused.", func() float64 { return float64(s.waiting()) }),
		counter("push_groups_expired_total", "Groups whose TTL passed.", func() float64 { return float64(s.stats.expired.Load()) }),
		counter("push_store_writes_total", "Writes of the push store; one write stores all pushes that wait.", func() float64 { return float64(s.stats.writes.Load()) }),
		counter("push_store_failed_writes_total", "Writes of the push store that failed.", func() float64 { return float64(s.stats.failedWrites.Load()) }),
		counter("push_store_write_seconds_total", "Time spent in writes of the push store.", func() float64 { return time.Duration(s.stats.writeNanos.Load()).Seconds() }),
	)
	if s.shared != nil {
		registerer.MustRegister(
			gauge("push_store_behind_seconds", "Age of the last time at which the groups were known to be all that the shared push store had. It stays below 10 while that answers; beyond that /metrics may lack what was pushed to other proxies. NaN: they have not been read yet.", s.behind),
			gauge("push_store_clock_ahead_seconds", "How far the clock is ahead of that of the proxy that changed the groups last. Of several proxies whose clocks differ some let groups expire late.", func() float64 { return time.Duration(s.clockOffset.Load()).Seconds() }),
			counter("push_store_conflicts_total", "Writes that were made again because another proxy was faster.", func() float64 { return float64(s.conflicts.Load()) }),
			counter("push_store_snapshots_total", "Times that all groups were read from the shared push store: at the start, and whenever it could not tell any more what had changed.", func() float64 { return float64(s.snapshots.Load()) }),
			counter("push_store_damaged_records_total", "Records of the shared push store that could not be used. The log has them.", func() float64 { return float64(s.damaged.Load()) }),
		)
	}
	return m
}

func (m *metrics) observe(handler string, status int, took time.Duration) {
	if handler == "push" && status == http.StatusOK {
		m.pushed.Inc()
		m.pushTook.Observe(took.Seconds())
		return
	}
	m.requests.WithLabelValues(handler, strconv.Itoa(status)).Inc()
	m.duration.WithLabelValues(handler).Observe(took.Seconds())
}
