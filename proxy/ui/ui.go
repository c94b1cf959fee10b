// Package ui is the page that people open on the proxy. It is made on the server, so
// that it can be read without JavaScript; its modules then keep it up to date by the
// proxy's API, and add what a list of links can't do.
package ui

import (
	"bytes"
	"embed"
	"fmt"
	"html/template"
	"net/http"
	"time"
)

// Content is what the page shows. Of the lists only those that the query asks for are
// needed.
type Content struct {
	Query    Query
	Version  string // of the proxy
	Proxy    string // its ID
	Summary  Summary
	Warnings []Warning

	Agents []Agent
	Groups []Group
	// Agent is the one that Query.Agent names, nil: it is not known, or not for who asks.
	Agent *AgentDetails
	// Group is the one that Query.Group names, nil: there is none.
	Group *Group
	// Samples are those of Group, in text format 0.0.4.
	Samples string
	// Status is what /api/v1/status tells, nil: it is not for who asks.
	Status map[string]any
	// ScrapeConfig is what /api/v1/scrape_config tells.
	ScrapeConfig string
	// MetricsPath is where the proxy's own metrics are, relative to the page.
	MetricsPath string
}

// Summary counts what the page shows as filters: agents that who asks may scrape, and all
// groups.
type Summary struct {
	Agents       uint32 `json:"agents"`
	Connected    uint32 `json:"connected"`
	Lost         uint32 `json:"lost"`
	Failing      uint32 `json:"failing"` // agents with a target whose last scrape failed
	Groups       uint32 `json:"groups"`
	GroupsLate   uint32 `json:"groups_late"`   // push_up is 0
	GroupsFailed uint32 `json:"groups_failed"` // the last push was refused
}

// Warning is what the page says on top, and what to do about it.
type Warning struct {
	Code string `json:"code"`
	Text string `json:"text"`
}

//go:embed page.html
var pageText string

//go:embed assets
var assetFiles embed.FS

// policy lets the page load what the proxy serves and nothing else, and keeps its
// modules from making markup of text.
const policy = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; form-action 'self'; " +
	"base-uri 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"

// Serve writes the page. What the query names and is not there is 404.
func Serve(w http.ResponseWriter, r *http.Request, content Content) {
	status := http.StatusOK
	if content.Query.Agent != "" && content.Agent == nil || content.Query.Group != "" && content.Group == nil {
		status = http.StatusNotFound
	}
	// Into memory first: a page is some 100 kB, and half a page would look like a whole one.
	var body bytes.Buffer
	if err := page.Execute(&body, newView(content, time.Now())); err != nil {
		http.Error(w, fmt.Sprintf("the page can't be made: %v", err), http.StatusInternalServerError)
		return
	}
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Content-Security-Policy", policy)
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Referrer-Policy", "same-origin")
	h.Set("Cache-Control", "no-store") // it may show what only who asked may see
	writeMaybeZipped(w, r, status, body.Bytes())
}

var page = template.Must(template.New("page").Funcs(template.FuncMap{
	"asset":    assetPath,
	"modules":  func() []string { return []string{"agents.js", "dom.js", "groups.js", "live.js", "table.js"} }, // that page.js imports
	"absolute": absolute,
	"rfc3339":  func(t time.Time) string { return t.UTC().Format(time.RFC3339) },
	"seconds":  seconds,
	"bytes":    byteSize,
	"count":    count,
}).Parse(pageText))
