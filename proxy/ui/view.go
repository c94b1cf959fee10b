package ui

import (
	"cmp"
	"encoding/json"
	"fmt"
	"html/template"
	"math"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/culvert-io/culvert/proxy/fleet"
)

// view is what page.html is executed with.
type view struct {
	Content
	AgentRows []Agent // of one page
	GroupRows []Group
	Found     int // rows on all pages
	Pages     int
	Skeleton  bool // only what surrounds the rows, for the page's modules

	now time.Time
}

func newView(content Content, now time.Time) *view {
	v := &view{Content: content, now: now}
	switch content.Query.View {
	case "agents":
		v.AgentRows = paged(v, content.Query.agents(content.Agents))
	case "groups":
		v.GroupRows = paged(v, content.Query.groups(content.Groups))
	}
	return v
}

// paged returns the rows of the page that the query asks for; the last one where it
// asks for more.
func paged[T any](v *view, rows []T) []T {
	v.Found = len(rows)
	v.Pages = max(1, (len(rows)+rowsPerPage-1)/rowsPerPage)
	v.Query.Page = min(v.Query.Page, v.Pages)
	first := (v.Query.Page - 1) * rowsPerPage
	return rows[first:min(first+rowsPerPage, len(rows))]
}

// Of returns the skeleton of a view.
func (v *view) Of(name string) *view {
	s := &view{Content: v.Content, Skeleton: true, now: v.now}
	s.Query = ParseQuery(url.Values{"view": {name}})
	return s
}

// Several reports whether several proxies are one.
func (v *view) Several() bool {
	return slices.ContainsFunc(v.Agents, func(a Agent) bool { return len(a.Proxies) > 0 })
}

// Title is the title of the document.
func (v *view) Title() string {
	switch {
	case v.Query.Agent != "":
		return v.Query.Agent
	case v.Query.Group != "":
		return v.Query.Group
	}
	return map[string]string{"agents": "Agents", "groups": "Push groups", "status": "Status", "config": "Prometheus"}[v.Query.View]
}

// ViewURL is the address of a view.
func (v *view) ViewURL(name string) string { return Query{View: name, Sort: "name"}.URL() }

// chip is a count that is a filter too.
type chip struct {
	Kind, Text, URL string
	View, State     string
	N               uint32
	Active          bool
}

// Chips are the counts of the header.
func (v *view) Chips() []chip {
	chips := []chip{
		{Kind: "ok", Text: "connected", View: "agents", State: "connected", N: v.Summary.Connected},
		{Kind: "lost", Text: "lost", View: "agents", State: "lost", N: v.Summary.Lost},
		{Kind: "failing", Text: "failing", View: "agents", State: "failing", N: v.Summary.Failing},
		{Kind: "late", Text: "groups late", View: "groups", State: "late", N: v.Summary.GroupsLate},
		{Kind: "failed", Text: "groups refused", View: "groups", State: "failed", N: v.Summary.GroupsFailed},
	}
	for i := range chips {
		c := &chips[i]
		c.Active = c.View == v.Query.View && c.State == v.Query.State
		q := Query{View: c.View, State: c.State, Sort: "name"}
		if c.Active {
			q.State = "" // once more takes the filter away
		}
		c.URL = q.URL()
	}
	return chips
}

// column is a column's head.
type column struct {
	Name, Text string
	URL        string // "": it can't be sorted by
	Sorted     string // aria-sort, where it is sorted by
}

// AgentColumns are the columns of the agents, GroupColumns those of the groups. The
// page's modules fill the same ones.
func (v *view) AgentColumns() []column {
	return v.columns("name", "Agent", "state", "State", "since", "Since", "health", "Scrapes", "rtt", "RTT", "version", "Version", "", "Labels", "proxy", "Proxy")
}

func (v *view) GroupColumns() []column {
	return v.columns("group", "Group", "state", "State", "pushed", "Last push", "expires", "Expires", "up", "push_up", "series", "Series", "interval", "Interval")
}

func (v *view) columns(namesAndTexts ...string) []column {
	var columns []column
	for pair := range slices.Chunk(namesAndTexts, 2) {
		c := column{Name: pair[0], Text: pair[1]}
		if c.Name != "" {
			q := v.Query
			q.Sort, q.Page = c.Name, 1
			switch v.Query.Sort {
			case c.Name:
				c.Sorted, q.Sort = "ascending", "-"+c.Name
			case "-" + c.Name:
				c.Sorted = "descending"
			}
			c.URL = q.URL()
		}
		columns = append(columns, c)
	}
	return columns
}

// States are the filters of the view.
func (v *view) States() []string {
	if v.Query.View == "groups" {
		return groupStates
	}
	return agentStates
}

// PageURL is the address of the page that is so many pages on; "": there is none.
func (v *view) PageURL(on int) string {
	q := v.Query
	if q.Page += on; q.Page < 1 || q.Page > v.Pages {
		return ""
	}
	return q.URL()
}

// Range tells which rows are on this page.
func (v *view) Range() string {
	first := (v.Query.Page-1)*rowsPerPage + 1
	last := min(v.Query.Page*rowsPerPage, v.Found)
	return fmt.Sprintf("%s to %s of %s", count(first), count(last), count(v.Found))
}

// AgentURL is the address of an agent's details, GroupURL that of a group's.
func (v *view) AgentURL(name string) string { return "./?" + url.Values{"agent": {name}}.Encode() }

func (v *view) GroupURL(path string) string { return "./?" + url.Values{"group": {path}}.Encode() }

// Known is the number of rows without a filter.
func (v *view) Known() int {
	if v.Query.View == "groups" {
		return int(v.Summary.Groups)
	}
	return int(v.Summary.Agents)
}

// LabelList returns the agent's labels, sorted by name.
func (a Agent) LabelList() []label { return sortedLabels(a.Labels) }

// State is what the page calls the agent's state: the kind of its mark, too.
func (a Agent) State() string {
	switch {
	case !a.Connected:
		return "lost"
	case a.Health == "failing":
		return "failing"
	}
	return "connected"
}

// Scrapes tells in short how the agent's scrapes went.
func (a Agent) ScrapesText() string {
	switch {
	case a.LostReason != "" && !a.Connected:
		return a.LostReason
	case a.Scraped == 0:
		return "none yet"
	case a.Failing > 0:
		return fmt.Sprintf("%d of %d failing", a.Failing, a.Scraped)
	}
	return fmt.Sprintf("%d ok", a.Scraped)
}

// Job is the label that every group has, Others are the others.
func (g Group) Job() string { return g.Labels["job"] }

// Others returns the labels but for the job, sorted by name.
func (g Group) Others() []label { return g.others() }

// UpText is the value of push_up.
func (g Group) UpText() string {
	switch {
	case g.Up == nil:
		return "–"
	case *g.Up:
		return "1"
	}
	return "0"
}

// Ago returns how long ago t was, or how far ahead, as an element that tells the time itself.
func (v *view) Ago(at time.Time) template.HTML {
	if at.IsZero() {
		return "–"
	}
	text := "now"
	switch d := v.now.Sub(at); {
	case d >= time.Second:
		text = span(d) + " ago"
	case d <= -time.Second:
		text = "in " + span(d)
	}
	return template.HTML(fmt.Sprintf(`<time datetime="%s" title="%s">%s</time>`, at.UTC().Format(time.RFC3339), absolute(at), text))
}

// Last returns the last scrape of a log.
func (*view) Last(log fleet.TargetLog) fleet.ScrapeEntry {
	if len(log.History) == 0 {
		return fleet.ScrapeEntry{}
	}
	return log.History[len(log.History)-1]
}

// span is a duration for people: one unit is enough.
func span(d time.Duration) string {
	switch d = d.Abs(); {
	case d < time.Minute:
		return fmt.Sprintf("%d s", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%d min", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%d h", int(d.Hours()))
	}
	return fmt.Sprintf("%d d", int(d.Hours()/24))
}

func absolute(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05 UTC") }

// seconds is a duration in seconds for people; "–" for none.
func seconds(s float64) string {
	switch {
	case s <= 0:
		return "–"
	case s < 0.001:
		return fmt.Sprintf("%.2f ms", s*1000)
	case s < 0.01:
		return fmt.Sprintf("%.1f ms", s*1000)
	case s < 1:
		return fmt.Sprintf("%.0f ms", s*1000)
	case s < 60:
		return fmt.Sprintf("%.3g s", s)
	}
	return span(time.Duration(s * float64(time.Second)))
}

// byteSize is a number of bytes for people.
func byteSize(n int64) string {
	if n < 1000 {
		return fmt.Sprintf("%d B", n)
	}
	exponent := min(int(math.Log10(float64(n))/3), 4)
	return fmt.Sprintf("%.3g %cB", float64(n)/math.Pow(1000, float64(exponent)), " kMGT"[exponent])
}

// count is a whole number with commas.
func count(n any) string {
	s := fmt.Sprint(n)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

// section is a part of the status.
type section struct {
	ID, Title string
	Rows      []label    // of an object
	Head      []string   // of a list of objects
	Table     [][]string // its rows
}

// StatusSections are the parts of what /api/v1/status tells: whatever it tells.
func (v *view) StatusSections() []section {
	titles := map[string]string{"build_information": "Build", "config": "Configuration"}
	// As the API encodes it, so that the page needs to know none of the types.
	var status map[string]any
	text, err := json.Marshal(v.Status)
	if err == nil {
		err = json.Unmarshal(text, &status)
	}
	if err != nil {
		return []section{{ID: "error", Title: "Status", Rows: []label{{"error", err.Error()}}}}
	}
	general := section{ID: "proxy", Title: "Proxy", Rows: []label{{"ID", v.Proxy}, {"version", v.Version}}}
	var sections []section
	for name, value := range status {
		if slices.Contains([]string{"proxy", "warnings", "agents", "groups"}, name) { // they stand elsewhere on the page
			continue
		}
		title := titles[name]
		if title == "" {
			title = strings.ToUpper(name[:1]) + strings.ReplaceAll(name[1:], "_", " ")
		}
		switch value := value.(type) {
		case map[string]any:
			s := section{ID: name, Title: title}
			for inner, list := range value {
				if list, ok := list.([]any); ok && slices.ContainsFunc(list, func(e any) bool { _, ok := e.(map[string]any); return ok }) {
					sections = append(sections, listSection(name+"-"+inner, title+": "+strings.ReplaceAll(inner, "_", " "), list))
					delete(value, inner)
				}
			}
			s.Rows = flat("", value, name != "flags")
			slices.SortFunc(s.Rows, func(a, b label) int { return strings.Compare(a.Name, b.Name) })
			sections = append(sections, s)
		case []any:
			sections = append(sections, listSection(name, title, value))
		default:
			general.Rows = append(general.Rows, label{strings.ReplaceAll(name, "_", " "), scalar(value)})
		}
	}
	slices.SortFunc(general.Rows[2:], func(a, b label) int { return strings.Compare(a.Name, b.Name) })
	rank := func(s section) int {
		switch s.ID {
		case "build_information":
			return 0
		case "flags": // they are many
			return 2
		}
		return 1
	}
	slices.SortFunc(sections, func(a, b section) int {
		return cmp.Or(cmp.Compare(rank(a), rank(b)), strings.Compare(a.Title, b.Title))
	})
	return append([]section{general}, sections...)
}

// flat returns the leaves of an object, with their names as words where that is wanted.
func flat(prefix string, object map[string]any, words bool) []label {
	var rows []label
	for name, value := range object {
		if words {
			name = strings.ReplaceAll(name, "_", " ")
		}
		if inner, ok := value.(map[string]any); ok {
			rows = append(rows, flat(prefix+name+" ", inner, words)...)
			continue
		}
		rows = append(rows, label{prefix + name, scalar(value)})
	}
	return rows
}

func listSection(id, title string, values []any) section {
	s := section{ID: id, Title: title}
	for _, value := range values {
		object, ok := value.(map[string]any)
		if !ok {
			s.Rows = append(s.Rows, label{"", scalar(value)})
			continue
		}
		for name := range object {
			if !slices.Contains(s.Head, name) {
				s.Head = append(s.Head, name)
			}
		}
	}
	slices.Sort(s.Head)
	for _, value := range values {
		if object, ok := value.(map[string]any); ok {
			row := make([]string, len(s.Head))
			for i, name := range s.Head {
				row[i] = scalar(object[name])
			}
			s.Table = append(s.Table, row)
		}
	}
	return s
}

// scalar is a value of JSON for people.
func scalar(value any) string {
	switch value := value.(type) {
	case nil:
		return "–"
	case string:
		if t, err := time.Parse(time.RFC3339, value); err == nil {
			return absolute(t)
		}
		return value
	case float64:
		return strings.TrimSuffix(fmt.Sprintf("%.6g", value), ".0")
	case bool:
		if value {
			return "yes"
		}
		return "no"
	case []any:
		var list []string
		for _, e := range value {
			list = append(list, scalar(e))
		}
		return cmp.Or(strings.Join(list, ", "), "none")
	}
	text, err := json.Marshal(value)
	if err != nil {
		return err.Error()
	}
	return string(text)
}
