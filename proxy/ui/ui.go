// Package ui is the page that people open on the proxy.
package ui

import (
	_ "embed"
	"html/template"
	"net/http"
	"time"

	"github.com/prometheus/common/model"

	"github.com/culvert-io/culvert/gateway"
	"github.com/culvert-io/culvert/proxy/fleet"
)

//go:embed page.html
var pageText string

var page = template.Must(template.New("page").Funcs(template.FuncMap{
	"time":     func(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05 UTC") },
	"duration": func(d time.Duration) string { return model.Duration(d).String() },
}).Parse(pageText))

// Content is what the page shows.
type Content struct {
	// Open says that there are no roles.
	Open   bool
	Agents []fleet.Info
	Groups []gateway.GroupInfo
	// PushError is why pushes can't be taken now.
	PushError error
	// MetricsPath is where the proxy's own metrics are, relative to the page.
	MetricsPath string
}

// Connected returns the number of connected agents.
func (c Content) Connected() int {
	n := 0
	for _, a := range c.Agents {
		if a.Connected {
			n++
		}
	}
	return n
}

// Lost returns the number of lost agents.
func (c Content) Lost() int { return len(c.Agents) - c.Connected() }

// Serve writes the page: who is connected and what they offer, and what jobs have
// pushed.
func Serve(w http.ResponseWriter, content Content) {
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; img-src 'self'; frame-ancestors 'none'")
	h.Set("X-Content-Type-Options", "nosniff")
	// The status is out: an error now is the reader's going away.
	_ = page.Execute(w, content)
}
