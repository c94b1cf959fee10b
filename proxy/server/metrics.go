package server

import (
	"errors"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/culvert-io/culvert/protocol"
	"github.com/culvert-io/culvert/proxy/fleet"
)

// metrics are the proxy's own, prefix culvert_proxy_.
type metrics struct {
	stats         *protocol.Stats
	scrapes       *prometheus.CounterVec
	duration      *prometheus.HistogramVec
	bytes         prometheus.Counter
	handshakes    *prometheus.CounterVec
	registrations *prometheus.CounterVec
	ended         *prometheus.CounterVec
	rtt           prometheus.Histogram
	relayed       *prometheus.CounterVec
	pushProx      *prometheus.CounterVec
	reloadOK      prometheus.Gauge
	reloadTime    prometheus.Gauge
}

func newMetrics(registry *prometheus.Registry, s *Server) *metrics {
	m := &metrics{
		stats: new(protocol.Stats),
		scrapes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "culvert_proxy_scrapes_total",
			Help: "Scrapes by the way they came (proxy: proxy_url, path: /scrape/, connect: https, peer: passed on by another proxy, misdirected: rewritten by a balancer) and by outcome: ok, target-error, cancelled, broken, or the reason of the refusal, as in the Culvert-Error header.",
		}, []string{"mode", "outcome"}),
		duration: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:                            "culvert_proxy_scrape_duration_seconds",
			Help:                            "Time from a scrape's request to the end of its response; for connect, to the open tunnel.",
			Buckets:                         []float64{.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30},
			NativeHistogramBucketFactor:     1.1,
			NativeHistogramMaxBucketNumber:  100,
			NativeHistogramMinResetDuration: time.Hour,
		}, []string{"mode"}),
		bytes: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "culvert_proxy_response_bytes_total",
			Help: "Bytes of response bodies passed to scrapers, those of CONNECT tunnels included.",
		}),
		handshakes: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "culvert_proxy_handshakes_total",
			Help: "Requests for a tunnel, by result: ok, or the reason of the refusal. A rise of busy or no-upgrade asks for a look at what is in front of the proxy.",
		}, []string{"result"}),
		registrations: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "culvert_proxy_registrations_total",
			Help: "Registrations, by result: ok, or the reason of the refusal. A rise of taken means that two agents claim one name.",
		}, []string{"result"}),
		ended: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "culvert_proxy_sessions_ended_total",
			Help: "Sessions of registered agents that ended, by reason: lost, silent (no frame for a minute), stuck (took no data for a minute), closed by this proxy.",
		}, []string{"reason"}),
		rtt: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name:                            "culvert_proxy_session_rtt_seconds",
			Help:                            "Round trip to an agent through its tunnel, measured when it registers.",
			Buckets:                         []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1},
			NativeHistogramBucketFactor:     1.1,
			NativeHistogramMaxBucketNumber:  100,
			NativeHistogramMinResetDuration: time.Hour,
		}),
		relayed: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "culvert_proxy_push_relayed_total",
			Help: "Pushes that agents relayed, by outcome: applied, repeated (it was there already), refused (the agent drops it), unavailable (the agent sends it again). A rise of refused means that jobs push what can't be taken.",
		}, []string{"outcome"}),
		pushProx: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "culvert_proxy_pushprox_requests_total",
			Help: "Polls and pushes of PushProx clients, by result: scrape (the poll brought one), replaced (by another poll of the client), closed (the client closed the poll), ok (the push had somebody waiting for it), or the reason of the refusal. A rise of replaced means that two clients have one name; one of not-found that clients answer too late.",
		}, []string{"request", "result"}),
		reloadOK: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "culvert_proxy_config_last_reload_successful",
			Help: "Whether the last reload of the configuration succeeded.",
		}),
		reloadTime: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "culvert_proxy_config_last_reload_success_timestamp_seconds",
			Help: "When the configuration was last loaded with success.",
		}),
	}
	registry.MustRegister(m.scrapes, m.duration, m.bytes, m.handshakes, m.registrations, m.ended, m.rtt, m.relayed, m.pushProx, m.reloadOK, m.reloadTime,
		agentsCollector{s}, newCertificateCollector(s.config),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "culvert_proxy_streams",
			Help: "Open streams of all sessions, the pooled ones included.",
		}, func() float64 { return float64(m.stats.Streams.Load()) }),
		prometheus.NewCounterFunc(prometheus.CounterOpts{
			Name: "culvert_proxy_tunnel_read_bytes_total",
			Help: "Bytes read from the agents' tunnels, framing included, TLS not.",
		}, func() float64 { return float64(m.stats.BytesRead.Load()) }),
		prometheus.NewCounterFunc(prometheus.CounterOpts{
			Name: "culvert_proxy_tunnel_written_bytes_total",
			Help: "Bytes written to the agents' tunnels, framing included, TLS not.",
		}, func() float64 { return float64(m.stats.BytesWritten.Load()) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "culvert_proxy_handshakes_pending",
			Help: "Sessions that have not registered yet. Near culvert_proxy_handshakes_max_pending agents are told to come back later.",
		}, func() float64 { return float64(s.admission.pending()) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "culvert_proxy_handshakes_max_pending",
			Help: "Sessions that may be without a registration at a time: --agent.max-handshakes.",
		}, func() float64 { return float64(s.admission.places) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "culvert_proxy_pushprox_clients",
			Help: "PushProx clients that are connected to this proxy; culvert_proxy_agents counts them too.",
		}, func() (n float64) {
			for _, conn := range s.fleet.Conns() {
				if conn.Kind == fleet.KindPushProx {
					n++
				}
			}
			return n
		}),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "culvert_proxy_fleet_stored",
			Help: "1 where the known agents survive a restart, 0 where storage is off or its file can't be used.",
		}, func() float64 {
			if s.fleetStored {
				return 1
			}
			return 0
		}))
	for _, outcome := range []string{relayApplied, relayRepeated, relayRefused, relayUnavailable} {
		m.relayed.WithLabelValues(outcome)
	}
	// Of a counter that appears with its first event, increase() does not see that.
	for _, code := range []protocol.Code{protocol.CodeNoUpgrade, protocol.CodeInvalid, protocol.CodeUnauthorized, protocol.CodeForbidden, protocol.CodeVersion, protocol.CodeBusy, protocol.CodeDraining} {
		m.handshakes.WithLabelValues(string(code))
	}
	for _, code := range []protocol.Code{protocol.CodeInvalid, protocol.CodeForbidden, protocol.CodeTaken, protocol.CodeCollision, protocol.CodeTooLarge, protocol.CodeUnavailable} {
		m.registrations.WithLabelValues(string(code))
	}
	m.reloaded(nil)
	return m
}

func (m *metrics) reloaded(err error) {
	if err != nil {
		m.reloadOK.Set(0)
		return
	}
	m.reloadOK.Set(1)
	m.reloadTime.SetToCurrentTime()
}

var agentsDesc = prometheus.NewDesc("culvert_proxy_agents",
	"Known agents by state. Lost ones stay known until --agent.forget-after.", []string{"state"}, nil)

type agentsCollector struct{ server *Server }

func (c agentsCollector) Describe(ch chan<- *prometheus.Desc) { ch <- agentsDesc }

func (c agentsCollector) Collect(ch chan<- prometheus.Metric) {
	connected, lost := c.server.fleet.Counts()
	ch <- prometheus.MustNewConstMetric(agentsDesc, prometheus.GaugeValue, float64(connected), "connected")
	ch <- prometheus.MustNewConstMetric(agentsDesc, prometheus.GaugeValue, float64(lost), "lost")
}

var certificateDesc = prometheus.NewDesc("culvert_proxy_tls_certificate_expiry_timestamp_seconds",
	"When the certificate of a web configuration expires; 0 where it can't be read, so that nobody can connect by TLS.", []string{"config"}, nil)

// certificateCollector tells of the certificates of the web configurations as they are now.
type certificateCollector []*keptTLS

func newCertificateCollector(config Config) (c certificateCollector) {
	paths := []string{config.WebConfigFile, config.AgentWebConfigFile, config.Cluster.WebConfigFile}
	slices.Sort(paths)
	for _, path := range slices.Compact(paths) { // listeners may share a file
		if path != "" {
			c = append(c, &keptTLS{path: path})
		}
	}
	return c
}

func (c certificateCollector) Describe(ch chan<- *prometheus.Desc) { ch <- certificateDesc }

func (c certificateCollector) Collect(ch chan<- prometheus.Metric) {
	for _, kept := range c {
		expiry := 0.0
		config, err := kept.current()
		if errors.Is(err, errNoTLS) {
			continue
		}
		if err == nil {
			expiry = float64(config.Certificates[0].Leaf.NotAfter.Unix())
		}
		ch <- prometheus.MustNewConstMetric(certificateDesc, prometheus.GaugeValue, expiry, kept.path)
	}
}
