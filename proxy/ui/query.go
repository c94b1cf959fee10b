package ui

import (
	"cmp"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Query is what the page is asked to show, in the query of its URL.
type Query struct {
	View  string // "agents", "groups", "status" or "config"
	Text  string // all of its words have to be in a row
	State string // of AgentStates or GroupStates; "": all
	Sort  string // a column; "-" in front turns it round
	Page  int    // from 1
	Agent string // the one to show the details of
	Group string // Group.Path of the one to show the details of
	Port  string // of every agent, in the scrape configuration
}

// rowsPerPage is how many rows a page has that is read without JavaScript.
const rowsPerPage = 200

// ParseQuery reads the query of a URL. What it doesn't know means the default: a link
// from another version should still lead somewhere.
func ParseQuery(values url.Values) Query {
	q := Query{View: values.Get("view"), Text: strings.TrimSpace(values.Get("q")), State: values.Get("state"), Sort: values.Get("sort"), Agent: values.Get("agent"), Group: values.Get("group"), Port: values.Get("port")}
	if q.Page, _ = strconv.Atoi(values.Get("page")); q.Page < 1 {
		q.Page = 1
	}
	switch {
	case q.Agent != "":
		q.View, q.Group = "agents", ""
	case q.Group != "":
		q.View = "groups"
	case q.View != "groups" && q.View != "status" && q.View != "config":
		q.View = "agents"
	}
	column := strings.TrimPrefix(q.Sort, "-")
	known := agentColumns
	states := agentStates
	if q.View == "groups" {
		known, states = groupColumns, groupStates
	}
	if !slices.Contains(known, column) {
		q.Sort = known[0]
	}
	if !slices.Contains(states, q.State) {
		q.State = ""
	}
	return q
}

// The columns that rows can be sorted by, the default first, and the states that they
// can be filtered by.
var (
	agentColumns = []string{"name", "state", "since", "health", "rtt", "version", "proxy"}
	groupColumns = []string{"group", "state", "pushed", "expires", "up", "series", "interval"}
	agentStates  = []string{"connected", "lost", "failing"}
	groupStates  = []string{"ok", "late", "failed", "expired"}
)

// URL returns the address of the page for the query, relative to the page.
func (q Query) URL() string {
	values := url.Values{}
	set := func(name, value string) {
		if value != "" {
			values.Set(name, value)
		}
	}
	if q.Agent == "" && q.Group == "" && q.View != "agents" {
		set("view", q.View)
	}
	set("q", q.Text)
	set("state", q.State)
	if q.Sort != "name" && q.Sort != "group" {
		set("sort", q.Sort)
	}
	if q.Page > 1 {
		set("page", strconv.Itoa(q.Page))
	}
	set("agent", q.Agent)
	set("group", q.Group)
	return "./?" + values.Encode()
}

// agents returns the agents that the query selects, in its order.
func (q Query) agents(all []Agent) []Agent {
	words := strings.Fields(strings.ToLower(q.Text))
	var rows []Agent
	for _, a := range all {
		switch q.State {
		case "connected":
			if !a.Connected {
				continue
			}
		case "lost":
			if a.Connected {
				continue
			}
		case "failing":
			if a.Health != "failing" {
				continue
			}
		}
		if len(words) == 0 || holds(a.words(), words) {
			rows = append(rows, a)
		}
	}
	column, down := strings.CutPrefix(q.Sort, "-")
	sorted(rows, down, func(a Agent) string { return a.Name }, func(a, b Agent) int {
		switch column {
		case "state":
			return cmp.Compare(a.rank(), b.rank())
		case "since":
			return latest(a.Since, b.Since)
		case "health":
			return cmp.Or(cmp.Compare(b.Failing, a.Failing), cmp.Compare(b.Scraped, a.Scraped))
		case "rtt":
			return cmp.Compare(a.RTTSeconds, b.RTTSeconds)
		case "version":
			return strings.Compare(natural(a.Version), natural(b.Version))
		case "proxy":
			return strings.Compare(strings.Join(a.Proxies, " "), strings.Join(b.Proxies, " "))
		}
		return 0
	})
	return rows
}

// rank sorts what needs attention first.
func (a Agent) rank() int {
	switch {
	case !a.Connected:
		return 0
	case a.Health == "failing":
		return 1
	}
	return 2
}

// words is what the filter looks at, as the module of the page has it too.
func (a Agent) words() string {
	var b strings.Builder
	for _, s := range [][]string{{a.Name, a.Version, a.Kind, a.RemoteAddr, a.LostReason}, a.Targets, a.Hosts, a.Proxies} {
		for _, s := range s {
			b.WriteString(s)
			b.WriteByte('\n')
		}
	}
	writeLabels(&b, a.Labels)
	return strings.ToLower(b.String())
}

func writeLabels(b *strings.Builder, labels map[string]string) {
	for _, name := range slices.Sorted(maps.Keys(labels)) {
		fmt.Fprintf(b, "%s=%s\n", name, labels[name])
	}
}

// groups returns the groups that the query selects, in its order.
func (q Query) groups(all []Group) []Group {
	words := strings.Fields(strings.ToLower(q.Text))
	var rows []Group
	for _, g := range all {
		if q.State == "late" && (g.Up == nil || *g.Up) || q.State != "late" && q.State != "" && g.State != q.State {
			continue
		}
		if len(words) > 0 {
			var b strings.Builder
			writeLabels(&b, g.Labels)
			if !holds(strings.ToLower(b.String()), words) {
				continue
			}
		}
		rows = append(rows, g)
	}
	column, down := strings.CutPrefix(q.Sort, "-")
	sorted(rows, down, Group.title, func(a, b Group) int {
		switch column {
		case "state":
			return cmp.Compare(a.rank(), b.rank())
		case "pushed":
			return latest(orLast(a.Pushed), orLast(b.Pushed))
		case "expires":
			return latest(orLast(b.Expires), orLast(a.Expires))
		case "up":
			return cmp.Compare(a.upRank(), b.upRank())
		case "series":
			return cmp.Compare(b.Series, a.Series)
		case "interval":
			return cmp.Compare(a.Interval, b.Interval)
		}
		return 0
	})
	return rows
}

func (g Group) rank() int { return slices.Index([]string{"failed", "late", "expired", "ok"}, g.State) }

func (g Group) upRank() int {
	switch {
	case g.Up == nil:
		return 2
	case *g.Up:
		return 1
	}
	return 0
}

// title returns the labels for sorting: the job first.
func (g Group) title() string {
	var b strings.Builder
	b.WriteString(g.Labels["job"])
	for _, l := range g.others() {
		b.WriteString("\n" + l.Name + "=" + l.Value)
	}
	return b.String()
}

// label is a label of a group or an agent.
type label struct{ Name, Value string }

// others returns the labels of the group but for the job, sorted.
func (g Group) others() []label {
	return slices.DeleteFunc(sortedLabels(g.Labels), func(l label) bool { return l.Name == "job" })
}

func sortedLabels(labels map[string]string) []label {
	var out []label
	for _, name := range slices.Sorted(maps.Keys(labels)) {
		out = append(out, label{name, labels[name]})
	}
	return out
}

// latest compares times, the latest first, to the millisecond: the page's modules know no
// less.
func latest(a, b time.Time) int { return cmp.Compare(b.UnixMilli(), a.UnixMilli()) }

func orLast(t time.Time) time.Time {
	if t.IsZero() {
		return time.Unix(1<<40, 0) // behind all others
	}
	return t
}

func holds(text string, words []string) bool {
	for _, word := range words {
		if !strings.Contains(text, word) {
			return false
		}
	}
	return true
}

// sorted sorts rows by compare and then by name, as people read names: web-2 before
// web-10.
func sorted[T any](rows []T, down bool, name func(T) string, compare func(a, b T) int) {
	type keyed struct {
		row T
		key string
	}
	list := make([]keyed, len(rows))
	for i, row := range rows {
		list[i] = keyed{row, natural(name(row))}
	}
	slices.SortStableFunc(list, func(a, b keyed) int {
		order := compare(a.row, b.row)
		if order == 0 {
			order = strings.Compare(a.key, b.key)
		}
		if down {
			return -order
		}
		return order
	})
	for i := range list {
		rows[i] = list[i].row
	}
}

// natural returns a key that sorts by the value of the numbers in s.
func natural(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); {
		j := i
		for j < len(s) && '0' <= s[j] && s[j] <= '9' {
			j++
		}
		if j == i {
			b.WriteByte(s[i])
			i++
			continue
		}
		for n := j - i; n < 12; n++ {
			b.WriteByte('0')
		}
		b.WriteString(s[i:j])
		i = j
	}
	return b.String()
}
