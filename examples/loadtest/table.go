package main

import (
	"fmt"
	"io"
	"math"
	"strings"
	"text/tabwriter"
)

// result is what a scenario has found.
type result struct {
	Scenario string   `json:"scenario"`
	About    string   `json:"about"`
	Skipped  string   `json:"skipped,omitempty"` // why it did not run
	Rows     []row    `json:"rows,omitempty"`
	Ratios   []ratio  `json:"ratios,omitempty"`
	Figures  []figure `json:"figures,omitempty"`
}

// row is what was measured of one subject: medians of the rounds.
type row struct {
	Subject string  `json:"subject"`
	Clients int     `json:"clients"`
	Rate    float64 `json:"rate_per_second"`
	MBps    float64 `json:"megabytes_per_second"`
	P50     float64 `json:"p50_milliseconds"`
	P95     float64 `json:"p95_milliseconds"`
	P99     float64 `json:"p99_milliseconds"`
	Proxy   usage   `json:"proxy,omitzero"`
	Agent   usage   `json:"agent,omitzero"`
	Failed  int     `json:"failed"` // of all rounds
	Error   string  `json:"error,omitempty"`
}

// usage is what a process needed; 0 is unknown.
type usage struct {
	CPU      float64 `json:"cpu_seconds_per_1000,omitzero"`
	Resident float64 `json:"resident_bytes,omitzero"`
}

// ratio compares a subject with a baseline.
type ratio struct {
	Subject  string `json:"subject"`
	Baseline string `json:"baseline"`
	Rate     spread `json:"rate"`
	P50      spread `json:"p50"`
	P99      spread `json:"p99"`
}

// spread is the median of the rounds' quotients, and the extremes.
type spread struct {
	Median float64 `json:"median"`
	Least  float64 `json:"least"`
	Most   float64 `json:"most"`
}

func (s spread) String() string { return fmt.Sprintf("%.2f (%.2f–%.2f)", s.Median, s.Least, s.Most) }

// figure is any other number, with its unit.
type figure struct {
	Name  string  `json:"name"`
	Value float64 `json:"value"`
	Unit  string  `json:"unit"`
}

func (r *result) add(name string, value float64, unit string) {
	r.Figures = append(r.Figures, figure{name, value, unit})
}

// print writes the result for people.
func (r *result) print(w io.Writer) {
	fmt.Fprintf(w, "\n%s: %s\n", r.Scenario, r.About)
	if r.Skipped != "" {
		fmt.Fprintf(w, "  skipped: %s\n", r.Skipped)
	}
	if len(r.Rows) > 0 {
		t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
		fmt.Fprintln(t, "\tclients\trate/s\tMB/s\tp50 ms\tp95 ms\tp99 ms\tproxy CPU s/1000\tagent CPU s/1000\tproxy MiB\tagent MiB\tfailed\t")
		for _, m := range r.Rows {
			fmt.Fprintf(t, "%s\t%d\t%s\t%s\t%.2f\t%.2f\t%.2f\t%s\t%s\t%s\t%s\t%d\t\n", m.Subject, m.Clients, short(m.Rate), short(m.MBps), m.P50, m.P95, m.P99,
				known("%.3f", m.Proxy.CPU), known("%.3f", m.Agent.CPU), known("%.1f", m.Proxy.Resident/(1<<20)), known("%.1f", m.Agent.Resident/(1<<20)), m.Failed)
		}
		t.Flush()
		for _, m := range r.Rows {
			if m.Error != "" {
				fmt.Fprintf(w, "  %s failed with: %s\n", m.Subject, m.Error)
			}
		}
	}
	for _, q := range r.Ratios {
		fmt.Fprintf(w, "  %s / %s: rate %v, p50 %v, p99 %v\n", q.Subject, q.Baseline, q.Rate, q.P50, q.P99)
	}
	for _, f := range r.Figures {
		fmt.Fprintf(w, "  %s: %s\n", f.Name, strings.TrimSpace(decimal(f.Value)+" "+f.Unit))
	}
}

// decimal formats a whole number as it is, and any other to four digits.
func decimal(value float64) string {
	if value == math.Trunc(value) {
		return fmt.Sprintf("%.0f", value)
	}
	return fmt.Sprintf("%.4g", value)
}

// short formats a value with a decimal place where it is small.
func short(value float64) string {
	if value < 100 {
		return fmt.Sprintf("%.1f", value)
	}
	return fmt.Sprintf("%.0f", value)
}

// known formats a value, unless it is 0, which is unknown.
func known(format string, value float64) string {
	if value == 0 {
		return ""
	}
	return fmt.Sprintf(format, value)
}
