// Package ui is the page that people open on the proxy.
package ui

import (
	_ "embed"
	"html/template"
	"net/http"
	"time"

	"github.com/culvert-io/culvert/proxy/fleet"
)

//go:embed page.html
var pageText string

var page = template.Must(template.New("page").Funcs(template.FuncMap{
	"time": func(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05 UTC") },
}).Parse(pageText))

// Serve writes the page: who is connected, and what they offer.
func Serve(w http.ResponseWriter, agents []fleet.Info) {
	connected := 0
	for _, a := range agents {
		if a.Connected {
			connected++
		}
	}
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'")
	h.Set("X-Content-Type-Options", "nosniff")
	// The status is out: an error now is the reader's going away.
	_ = page.Execute(w, map[string]any{"Agents": agents, "Connected": connected, "Lost": len(agents) - connected})
}
