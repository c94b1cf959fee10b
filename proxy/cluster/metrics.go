package cluster

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Outcomes of scrapes that were passed on to another proxy.
const (
	OutcomeOK          = "ok"          // the agent's answer came through
	OutcomeRefused     = "refused"     // the other proxy, or the agent, said no
	OutcomeNotHeld     = "not-held"    // the agent had just left that proxy
	OutcomeUnreachable = "unreachable" // the other proxy gave no answer
	OutcomeCancelled   = "cancelled"   // the scraper went away, or its time was over
)

// metrics are the cluster's, prefix culvert_proxy_cluster_.
type metrics struct {
	forwarded    *prometheus.CounterVec
	transactions prometheus.Counter
}

func newMetrics(registry prometheus.Registerer, c *Cluster) *metrics {
	m := &metrics{
		forwarded: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "culvert_proxy_cluster_forwarded_scrapes_total",
			Help: "Scrapes passed on to the proxy that holds the agent, by outcome: ok, refused (by it or the agent), not-held (the agent had just left), unreachable, cancelled. A rise of unreachable means that proxies can't reach each other at --cluster.advertise-url.",
		}, []string{"outcome"}),
		transactions: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "culvert_proxy_cluster_etcd_writes_total",
			Help: "Transactions by which this proxy wrote agents to etcd. One holds many agents where many come at once.",
		}),
	}
	for _, outcome := range []string{OutcomeOK, OutcomeRefused, OutcomeNotHeld, OutcomeUnreachable, OutcomeCancelled} {
		m.forwarded.WithLabelValues(outcome)
	}
	registry.MustRegister(m.forwarded, m.transactions,
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "culvert_proxy_cluster_peers",
			Help: "Other proxies of the cluster, as etcd told last.",
		}, func() float64 {
			c.mu.Lock()
			defer c.mu.Unlock()
			return float64(len(c.peers))
		}),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "culvert_proxy_cluster_etcd_up",
			Help: "1 while etcd answers and what other proxies write arrives. At 0 the proxy goes on with what it knew last.",
		}, func() float64 {
			if up, _ := c.Up(); up {
				return 1
			}
			return 0
		}),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "culvert_proxy_cluster_behind_seconds",
			Help: "How old what the proxy knows of others may be, 0 while etcd answers.",
		}, func() float64 {
			up, heard := c.Up()
			if up {
				return 0
			}
			return time.Since(heard).Seconds()
		}),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "culvert_proxy_cluster_unwritten_agents",
			Help: "Agents with changes that etcd does not have yet.",
		}, func() float64 {
			n, _ := c.Unwritten()
			return float64(n)
		}))
	return m
}

// Forwarded counts a scrape that was passed on, by one of the Outcomes.
func (c *Cluster) Forwarded(outcome string) { c.metrics.forwarded.WithLabelValues(outcome).Inc() }
