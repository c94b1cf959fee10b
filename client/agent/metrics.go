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
	polls      *prometheus.CounterVec
	polled     *prometheus.CounterVec

	// Of pushes, where they are taken.
	relayed       *prometheus.CounterVec
	relayRetries  *prometheus.CounterVec
	spoolRequests *prometheus.CounterVec
}

func newMetrics(a *Agent) *metrics {
	counters := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)
	}
	gauge := func(name, help string, value func() float64) prometheus.Collector {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: name, Help: help}, value)
	}
	counter := func(name, help string, value func() float64) prometheus.Collector {
		return prometheus.NewCounterFunc(prometheus.CounterOpts{Name: name, Help: help}, value)
	}
	m := &metrics{
		registry: prometheus.NewRegistry(),
		stats:    new(protocol.Stats),
		scrapes: counters("culvert_client_scrapes_total",
			"Scrapes that came through a proxy, by outcome: ok, cancelled, broken, too-long, or the reason of the refusal. A rise of not-allowed asks for an --allow flag, or says that a name leads where it should not; of target-unreachable for a look at the exporter; of agent-busy for fewer scrapers or a higher --scrape.max-concurrent; of too-long for a look at what the exporter sends, or a higher --scrape.max-body-size.",
			"outcome"),
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
		connects: counters("culvert_client_connects_total",
			"Tries to get a session, by result; polling means that a proxy without a tunnel took a poll in its stead, and no-tunnel that it was looked for and not found. Anything but these and ok that goes on rising means that this proxy can't be reached or refuses the agent.",
			"proxy", "result"),
		reconnects: counters("culvert_client_reconnects_total",
			"Sessions that ended and made the agent dial again, by reason. A steady rise of silent or lost points to the network between.",
			"proxy", "reason"),
		dropped: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "culvert_client_dropped_series_total",
			Help: "Series that scrapes of the agent itself left out because the agent has the same one, or the same name with another type, from another source. Those of textfiles are in culvert_client_textfile_dropped_series.",
		}),
	}
	m.polls = counters("culvert_client_polls_total",
		"Polls of a pushprox-proxy that have ended, by result: scrape, replaced (by another poll of the same name), failed. A steady rise of replaced means that two clients have one name; of failed, that the proxy can't be reached, or that something between ends polls.",
		"proxy", "result")
	m.polled = counters("culvert_client_polled_scrapes_total",
		"Answers to scrapes that polls brought, by result of their way to the pushprox-proxy: ok, refused (most often they came too late for the scraper), failed.",
		"proxy", "result")
	m.relayed = counters("culvert_client_relayed_pushes_total",
		"Pushes that left the spool for a proxy, by outcome: applied, repeated (the proxy had it from an earlier try), and what the proxy will never take, which was dropped: refused, too_large, other. A rise of refused means that jobs push what can't be taken; the log names them.",
		"proxy", "outcome")
	m.relayRetries = counters("culvert_client_relay_retries_total",
		"Tries to relay a push that are to be repeated, by reason: no_answer, forbidden, not_supported (by an old proxy), busy, unavailable. What rises on and on holds all pushes up; the log says why.",
		"proxy", "reason")
	m.spoolRequests = counters("culvert_client_spool_requests_total",
		"Pushes and deletions for the proxies' push stores that came from this host, by status code: 202 is in the spool, 400 can't ever be taken, 503 has no room in the spool, or can't be written to it.",
		"code")
	m.registry.MustRegister(m.scrapes, m.duration, m.inFlight, m.bytes, m.connects, m.reconnects, m.dropped, m.polls, m.polled,
		gauge("culvert_client_streams",
			"Open streams of all sessions, the pooled ones included.",
			func() float64 { return float64(m.stats.Streams.Load()) }),
		counter("culvert_client_tunnel_read_bytes_total",
			"Bytes read from the tunnels, framing included, TLS not.",
			func() float64 { return float64(m.stats.BytesRead.Load()) }),
		counter("culvert_client_tunnel_written_bytes_total",
			"Bytes written to the tunnels, framing included, TLS not.",
			func() float64 { return float64(m.stats.BytesWritten.Load()) }),
		gauge("culvert_client_scrapes_max_concurrent",
			"Scrapes that may run at a time: --scrape.max-concurrent; 0: no limit.",
			func() float64 { return float64(a.scrapes.limit()) }),
		gauge("culvert_client_tunnels_max_concurrent",
			"CONNECT tunnels that may be open at a time: --connect.max-concurrent; 0: no limit.",
			func() float64 { return float64(a.tunnels.limit()) }),
		sessionCollector{a})
	return m
}

var (
	connectedDesc = prometheus.NewDesc("culvert_client_connected",
		"1 while the agent has a session to this proxy that accepted its registration, or the proxy takes its polls, else 0.", []string{"proxy"}, nil)
	protocolDesc = prometheus.NewDesc("culvert_client_protocol_info",
		"How the agent reaches this proxy now, where it does: culvert (the tunnel) or pushprox (long polling). The value is 1.", []string{"proxy", "protocol"}, nil)
	rttDesc = prometheus.NewDesc("culvert_client_session_rtt_seconds",
		"Round trip of the last ping to this proxy, through the tunnel.", []string{"proxy"}, nil)
)

// sessionCollector tells of the sessions as they are now.
type sessionCollector struct{ agent *Agent }

func (c sessionCollector) Describe(ch chan<- *prometheus.Desc) {
	ch <- connectedDesc
	ch <- protocolDesc
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
		polls := session == nil && l.polls()
		if session == nil && !polls {
			ch <- prometheus.MustNewConstMetric(connectedDesc, prometheus.GaugeValue, 0, label)
			continue
		}
		ch <- prometheus.MustNewConstMetric(connectedDesc, prometheus.GaugeValue, 1, label)
		if polls {
			ch <- prometheus.MustNewConstMetric(protocolDesc, prometheus.GaugeValue, 1, label, string(ProtocolPushProx))
			continue
		}
		ch <- prometheus.MustNewConstMetric(protocolDesc, prometheus.GaugeValue, 1, label, string(ProtocolCulvert))
		if rtt := session.RTT(); rtt > 0 {
			ch <- prometheus.MustNewConstMetric(rttDesc, prometheus.GaugeValue, rtt.Seconds(), label)
		}
	}
}

var (
	spoolUpDesc = prometheus.NewDesc("culvert_client_push_store_up",
		"1 while pushes are taken, 0 while a file of them can't be opened or written.", nil, nil)
	spoolBytesDesc = prometheus.NewDesc("culvert_client_spool_bytes",
		"Bytes that wait in the spool for any proxy.", nil, nil)
	spoolMaxDesc = prometheus.NewDesc("culvert_client_spool_max_bytes",
		"Bytes that the spool may have: --push.spool-max-bytes.", nil, nil)
	spoolRefusedDesc = prometheus.NewDesc("culvert_client_spool_refused_total",
		"Pushes that were refused because the spool had no room.", nil, nil)
	spoolWaitingDesc = prometheus.NewDesc("culvert_client_spool_waiting_pushes",
		"Pushes that wait in the spool for this proxy, or for the first that is connected.", []string{"proxy"}, nil)
	spoolWaitingBytesDesc = prometheus.NewDesc("culvert_client_spool_waiting_bytes",
		"Bytes that wait in the spool for this proxy, or for the first that is connected.", []string{"proxy"}, nil)
	spoolAgeDesc = prometheus.NewDesc("culvert_client_spool_oldest_age_seconds",
		"How long ago the oldest push that waits for this proxy was made, 0 where none waits. A steady rise means that it takes none.", []string{"proxy"}, nil)
	spoolTrimmedDesc = prometheus.NewDesc("culvert_client_spool_trimmed_total",
		"Pushes that this proxy will not get because it was away, the spool was full, and another proxy had them.", []string{"proxy"}, nil)
)

// pushCollector tells of the spool as it is now, and holds the counters that are of use
// where pushes are taken.
type pushCollector struct {
	pushes   *pushes
	counters []prometheus.Collector
}

func newPushCollector(p *pushes) *pushCollector {
	m := p.agent.metrics
	return &pushCollector{p, []prometheus.Collector{m.relayed, m.relayRetries, m.spoolRequests}}
}

func (c *pushCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, counter := range c.counters {
		counter.Describe(ch)
	}
	for _, desc := range []*prometheus.Desc{spoolUpDesc, spoolBytesDesc, spoolMaxDesc, spoolRefusedDesc, spoolWaitingDesc, spoolWaitingBytesDesc, spoolAgeDesc, spoolTrimmedDesc} {
		ch <- desc
	}
}

func (c *pushCollector) Collect(ch chan<- prometheus.Metric) {
	for _, counter := range c.counters {
		counter.Collect(ch)
	}
	metric := func(desc *prometheus.Desc, kind prometheus.ValueType, value float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(desc, kind, value, labels...)
	}
	up := 1.0
	if c.pushes.Err() != nil {
		up = 0
	}
	metric(spoolUpDesc, prometheus.GaugeValue, up)
	spool := c.pushes.spool.Load()
	if spool == nil {
		return
	}
	stats := spool.Stats()
	metric(spoolBytesDesc, prometheus.GaugeValue, float64(stats.Bytes))
	metric(spoolMaxDesc, prometheus.GaugeValue, float64(stats.MaxBytes))
	metric(spoolRefusedDesc, prometheus.CounterValue, float64(stats.Refused))
	for name, cursor := range stats.Cursors {
		age := 0.0
		if cursor.Pushes > 0 {
			age = max(0, time.Since(cursor.Oldest).Seconds())
		}
		metric(spoolWaitingDesc, prometheus.GaugeValue, float64(cursor.Pushes), name)
		metric(spoolWaitingBytesDesc, prometheus.GaugeValue, float64(cursor.Bytes), name)
		metric(spoolAgeDesc, prometheus.GaugeValue, age, name)
		metric(spoolTrimmedDesc, prometheus.CounterValue, float64(cursor.Trimmed), name)
	}
}
