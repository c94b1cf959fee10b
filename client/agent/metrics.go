package agent

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/culvert-io/culvert/protocol"
)

// metrics are the agent's own, prefix culvert_client_.
type metrics struct {
	registry   *prometheus.Registry
	stats      *protocol.Stats
	scrapes    *prometheus.CounterVec
	duration   *prometheus.HistogramVec
	inFlight   prometheus.Gauge
	bytes      prometheus.Counter
	connects   *prometheus.CounterVec
	reconnects *prometheus.CounterVec
	dropped    prometheus.Counter
}

func newMetrics(a *Agent) *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(),
		stats:    new(protocol.Stats),
		scrapes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "culvert_client_scrapes_total",
			Help: "Scrapes that came through a proxy, by outcome: ok, cancelled, or the reason of the refusal. A rise of not-allowed asks for an --allow flag, of target-unreachable for a look at the exporter.",
		}, []string{"outcome"}),
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:                            "culvert_client_scrape_duration_seconds",
			Help:                            "Time from the request to the end of the target's response.",
			Buckets:                         []float64{.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30},
			NativeHistogramBucketFactor:     1.1,
			NativeHistogramMaxBucketNumber:  100,
			NativeHistogramMinResetDuration: time.Hour,
		}, []string{"kind"}),
		inFlight: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "culvert_client_scrapes_in_flight",
			Help: "Scrapes that run now, open CONNECT tunnels included.",
		}),
		bytes: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "culvert_client_response_bytes_total",
			Help: "Bytes of the targets' response bodies.",
		}),
		connects: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "culvert_client_connects_total",
			Help: "Tries to get a session, by result. Anything but ok that goes on rising means that this proxy can't be reached or refuses the agent.",
		}, []string{"proxy", "result"}),
		reconnects: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "culvert_client_reconnects_total",
			Help: "Sessions that ended and made the agent dial again, by reason. A steady rise of silent or lost points to the network between.",
		}, []string{"proxy", "reason"}),
		dropped: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "culvert_client_dropped_series_total",
			Help: "Series that scrapes of the agent itself left out because the agent has the same one, or the same name with another type, from another source. Those of textfiles are in culvert_client_textfile_dropped_series.",
		}),
	}
	m.registry.MustRegister(m.scrapes, m.duration, m.inFlight, m.bytes, m.connects, m.reconnects, m.dropped,
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "culvert_client_streams",
			Help: "Open streams of all sessions, the pooled ones included.",
		}, func() float64 { return float64(m.stats.Streams.Load()) }),
		prometheus.NewCounterFunc(prometheus.CounterOpts{
			Name: "culvert_client_tunnel_read_bytes_total",
			Help: "Bytes read from the tunnels, framing included, TLS not.",
		}, func() float64 { return float64(m.stats.BytesRead.Load()) }),
		prometheus.NewCounterFunc(prometheus.CounterOpts{
			Name: "culvert_client_tunnel_written_bytes_total",
			Help: "Bytes written to the tunnels, framing included, TLS not.",
		}, func() float64 { return float64(m.stats.BytesWritten.Load()) }),
		sessionCollector{a})
	return m
}

var (
	connectedDesc = prometheus.NewDesc("culvert_client_connected",
		"1 while the agent has a session to this proxy that accepted its registration, else 0.", []string{"proxy"}, nil)
	rttDesc = prometheus.NewDesc("culvert_client_session_rtt_seconds",
		"Round trip of the last ping to this proxy, through the tunnel.", []string{"proxy"}, nil)
)

// sessionCollector tells of the sessions as they are now.
type sessionCollector struct{ agent *Agent }

func (c sessionCollector) Describe(ch chan<- *prometheus.Desc) {
	ch <- connectedDesc
	ch <- rttDesc
}

func (c sessionCollector) Collect(ch chan<- prometheus.Metric) {
	c.agent.mu.Lock()
	links := make(map[string]*link, len(c.agent.links)) // by label: credentials don't make a series
	for _, l := range c.agent.links {
		links[l.label] = l
	}
	c.agent.mu.Unlock()
	for label, l := range links {
		session := l.currentSession()
		if session == nil {
			ch <- prometheus.MustNewConstMetric(connectedDesc, prometheus.GaugeValue, 0, label)
			continue
		}
		ch <- prometheus.MustNewConstMetric(connectedDesc, prometheus.GaugeValue, 1, label)
		if rtt := session.RTT(); rtt > 0 {
			ch <- prometheus.MustNewConstMetric(rttDesc, prometheus.GaugeValue, rtt.Seconds(), label)
		}
	}
}
