package main

import (
	"bytes"
	"fmt"
	"html"
	"math"
	"slices"
)

// The plot's measures, in SVG's pixels.
const (
	plotWidth, plotHeight    = 860, 520
	plotLeft, plotRight      = 80, 200
	plotTop, plotBottom      = 60, 70
	plotInnerX, plotInnerY   = plotWidth - plotLeft - plotRight, plotHeight - plotTop - plotBottom
	plotText, plotGrid       = "#333", "#ddd"
	plotDashed, plotTickSize = "6 4", 5
)

// plotColours differ for people who don't see red and green apart (Okabe and Ito).
var plotColours = []string{"#0072b2", "#009e73", "#e69f00", "#d55e00", "#cc79a7"}

// plot draws latency against load as SVG: both axes logarithmic, p50 solid and p99
// dashed for each subject.
func plot(r *result) []byte {
	var subjects []string
	low, high, most := math.Inf(1), 0.0, 1
	for _, m := range r.Rows {
		if !slices.Contains(subjects, m.Subject) {
			subjects = append(subjects, m.Subject)
		}
		low, high, most = min(low, m.P50), max(high, m.P99), max(most, m.Clients)
	}
	// Whole steps of 1, 2, 5 around all values.
	ticks := []float64{}
	for _, power := range []float64{0.01, 0.1, 1, 10, 100, 1000, 10000} {
		for _, step := range []float64{1, 2, 5} {
			ticks = append(ticks, power*step)
		}
	}
	for len(ticks) > 2 && ticks[1] <= low {
		ticks = ticks[1:]
	}
	for len(ticks) > 2 && ticks[len(ticks)-2] >= high {
		ticks = ticks[:len(ticks)-1]
	}
	x := func(clients int) float64 {
		return plotLeft + plotInnerX*math.Log2(float64(clients))/max(math.Log2(float64(most)), 1)
	}
	y := func(ms float64) float64 {
		return plotTop + plotInnerY*(1-math.Log(ms/ticks[0])/math.Log(ticks[len(ticks)-1]/ticks[0]))
	}

	styles := []struct{ name, dash string }{{"p50", "none"}, {"p99", plotDashed}}
	var b bytes.Buffer
	text := func(x, y float64, anchor string, size int, s string) {
		fmt.Fprintf(&b, `<text x="%.1f" y="%.1f" text-anchor="%s" font-size="%d" fill="%s">%s</text>`+"\n", x, y, anchor, size, plotText, html.EscapeString(s))
	}
	line := func(x1, y1, x2, y2 float64, colour, dash string, width float64) {
		fmt.Fprintf(&b, `<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" stroke="%s" stroke-width="%g" stroke-dasharray="%s"/>`+"\n", x1, y1, x2, y2, colour, width, dash)
	}
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" height="%d" font-family="sans-serif" role="img">`+"\n", plotWidth, plotHeight, plotWidth, plotHeight)
	fmt.Fprintf(&b, "<title>%s</title>\n", html.EscapeString(r.About))
	fmt.Fprintf(&b, `<rect width="100%%" height="100%%" fill="#fff"/>`+"\n")
	text(plotLeft, 32, "start", 16, r.About)
	for _, tick := range ticks {
		line(plotLeft-plotTickSize, y(tick), plotLeft+plotInnerX, y(tick), plotGrid, "none", 1)
		text(plotLeft-10, y(tick)+4, "end", 12, fmt.Sprintf("%g", math.Round(tick*100)/100))
	}
	for n := 1; n <= most; n *= 2 {
		line(x(n), plotTop, x(n), plotTop+plotInnerY+plotTickSize, plotGrid, "none", 1)
		text(x(n), plotTop+plotInnerY+22, "middle", 12, fmt.Sprint(n))
	}
	text(plotLeft+plotInnerX/2, plotHeight-20, "middle", 14, "concurrent scrapers")
	fmt.Fprintf(&b, `<g transform="translate(24 %d) rotate(-90)">`, plotTop+plotInnerY/2)
	text(0, 0, "middle", 14, "latency of a scrape in ms")
	b.WriteString("</g>\n")

	for i, subject := range subjects {
		colour := plotColours[i%len(plotColours)]
		for _, style := range styles {
			points := ""
			for _, m := range r.Rows {
				ms := m.P50
				if style.name == "p99" {
					ms = m.P99
				}
				if m.Subject != subject {
					continue
				}
				points += fmt.Sprintf("%.1f,%.1f ", x(m.Clients), y(ms))
				fmt.Fprintf(&b, `<circle cx="%.1f" cy="%.1f" r="3" fill="%s"><title>%s, %d scrapers, %s: %.2f ms</title></circle>`+"\n",
					x(m.Clients), y(ms), colour, html.EscapeString(subject), m.Clients, style.name, ms)
			}
			fmt.Fprintf(&b, `<polyline points="%s" fill="none" stroke="%s" stroke-width="2" stroke-dasharray="%s"/>`+"\n", points, colour, style.dash)
		}
		at := float64(plotTop + 24*i + 6)
		line(plotWidth-plotRight+16, at, plotWidth-plotRight+44, at, colour, "none", 3)
		text(plotWidth-plotRight+52, at+4, "start", 13, subject)
	}
	for i, style := range styles {
		at := float64(plotTop + 24*(len(subjects)+1+i) + 6)
		line(plotWidth-plotRight+16, at, plotWidth-plotRight+44, at, plotText, style.dash, 2)
		text(plotWidth-plotRight+52, at+4, "start", 13, style.name)
	}
	b.WriteString("</svg>\n")
	return b.Bytes()
}
