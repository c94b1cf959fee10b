package ui

import (
	"time"

	"github.com/culvert-io/culvert/proxy/fleet"
)

// Agent is an agent as a row of the page, in the API's JSON.
type Agent struct {
	Name       string            `json:"name"`
	Kind       string            `json:"kind"` // "culvert" or "pushprox"
	Connected  bool              `json:"connected"`
	Since      time.Time         `json:"since"` // connected, or lost
	FirstSeen  time.Time         `json:"first_seen"`
	LostReason string            `json:"lost_reason,omitempty"`
	Version    string            `json:"version,omitempty"`
	Labels     map[string]string `json:"labels,omitempty"`
	Targets    []string          `json:"targets,omitempty"`
	Hosts      []string          `json:"hosts,omitempty"`
	RemoteAddr string            `json:"remote_address,omitempty"`
	Transport  string            `json:"transport,omitempty"`
	RTTSeconds float64           `json:"rtt_seconds,omitempty"`
	Proxies    []string          `json:"proxies,omitempty"` // that hold a session, where several are one
	// Health is "ok", "failing" where the last scrape of a target failed, or "none"
	// where nothing was scraped yet.
	Health string `json:"health"`
	// Failing and Scraped count targets.
	Failing int `json:"failing"`
	Scraped int `json:"scraped"`
}

// AgentDetails is an agent with what was scraped of it.
type AgentDetails struct {
	Agent
	// Endpoints are the targets that it declares, and the target "agent".
	Endpoints []Endpoint
	Scrapes   []fleet.TargetLog
	// BytesTotal is how much this proxy has passed on for the agent.
	BytesTotal int64
}

// Endpoint is a declared target.
type Endpoint struct{ Name, Path string }

// Group is a group of the push store as a row of the page, in the API's JSON.
type Group struct {
	// Path is what follows /metrics/ in the path of its pushes, one for each group.
	Path   string            `json:"path"`
	Labels map[string]string `json:"labels"`
	Series int               `json:"series"`
	// Pushed and Failed are when the last good push and the last refused one came, zero:
	// none did. Expires is when the samples go, zero: never, or they have.
	Pushed   time.Time `json:"pushed,omitzero"`
	Failed   time.Time `json:"failed,omitzero"`
	TTL      float64   `json:"ttl_seconds,omitempty"`
	Interval float64   `json:"interval_seconds,omitempty"`
	Expires  time.Time `json:"expires,omitzero"`
	Up       *bool     `json:"up,omitempty"` // push_up, where there is an interval
	Expired  bool      `json:"expired"`
	State    string    `json:"state"` // "ok", "late", "failed" or "expired"
}
