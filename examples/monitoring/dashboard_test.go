//go:build unix

package monitoring

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/grafana/grafana-foundation-sdk/go/cog/plugins"
	"github.com/grafana/grafana-foundation-sdk/go/dashboard"
	"github.com/grafana/grafana-foundation-sdk/go/prometheus"
	"github.com/grafana/grafana-foundation-sdk/go/units"
	"github.com/prometheus/prometheus/promql/parser"
)

// board is a dashboard as Grafana 10 and 11 read it, and later ones too.
//
//lint:ignore SA1019 its successor is for Grafana 12 and later alone
type board = dashboard.Dashboard

// readDashboard reads dashboard.json by the types that Grafana generates from its own
// schema. A field that they don't have, or of another type, is an error.
func readDashboard(t *testing.T) (d board) {
	t.Helper()
	plugins.RegisterDefaultPlugins()
	text, err := os.ReadFile("dashboard.json")
	if err != nil {
		t.Fatal(err)
	}
	// Strict reading finds the errors, of which an empty list is one without a text, and
	// leaves the panels out; plain reading has them.
	if err := new(board).UnmarshalJSONStrict(text); err != nil && err.Error() != "" {
		t.Fatalf("dashboard.json does not fit Grafana's schema: %v", err)
	}
	if err := json.Unmarshal(text, &d); err != nil {
		t.Fatalf("dashboard.json: %v", err)
	}
	if err := d.Validate(); err != nil {
		t.Fatalf("dashboard.json is not valid: %v", err)
	}
	// Where the types are not strict, what they don't know is lost on the way back.
	again, err := json.Marshal(d)
	if err != nil {
		t.Fatal(err)
	}
	var before, after any
	if err := errors.Join(json.Unmarshal(text, &before), json.Unmarshal(again, &after)); err != nil {
		t.Fatal(err)
	}
	compare(t, "dashboard", before, after)
	return d
}

// compare reports what is in before and not in after, but for fields that say nothing.
func compare(t *testing.T, path string, before, after any) {
	t.Helper()
	switch before := before.(type) {
	case map[string]any:
		after, _ := after.(map[string]any)
		for name, value := range before {
			compare(t, path+"."+name, value, after[name])
		}
	case []any:
		after, _ := after.([]any)
		for i, value := range before {
			if i >= len(after) {
				t.Errorf("Grafana's schema has no place for %s[%d]", path, i)
				return
			}
			compare(t, fmt.Sprintf("%s[%d]", path, i), value, after[i])
		}
	case nil:
	default:
		if !reflect.ValueOf(before).IsZero() && !reflect.DeepEqual(before, after) {
			t.Errorf("Grafana's schema has no place for %s = %v", path, before)
		}
	}
}

// query is one of a panel, with its variables at All.
type query struct {
	panel  *dashboard.Panel
	expr   string // as it stands there
	all    string // with the variables at All
	legend string
}

// queries returns those of all panels.
func queries(t *testing.T, d board) (all []query) {
	t.Helper()
	for _, either := range d.Panels {
		if either.Panel == nil {
			continue // a row
		}
		for _, target := range either.Panel.Targets {
			q, ok := target.(*prometheus.Dataquery)
			if !ok {
				p, isValue := target.(prometheus.Dataquery)
				if !isValue {
					t.Fatalf("%q asks by a %T", *either.Panel.Title, target)
				}
				q = &p
			}
			legend := ""
			if q.LegendFormat != nil {
				legend = *q.LegendFormat
			}
			all = append(all, query{either.Panel, q.Expr, allOf.Replace(q.Expr), legend})
		}
	}
	return all
}

// allOf sets the variables as Grafana does for All.
var allOf = strings.NewReplacer("$__rate_interval", "20s", "$agent_job", ".+", "$agent", ".+", "$job", ".+", "$instance", ".+")

// TestDashboard: the dashboard fits Grafana's schema, and can be read: each panel has a
// title, a description, a unit and a place of its own, and asks whatever source is chosen
// for what is selected.
func TestDashboard(t *testing.T) {
	d := readDashboard(t)
	variables := map[string]bool{}
	for _, v := range d.Templating.List {
		variables[v.Name] = true
		if v.Name != "datasource" && (v.Datasource == nil || v.Datasource.Uid == nil || *v.Datasource.Uid != "${datasource}") {
			t.Errorf("the variable %s is of a fixed source", v.Name)
		}
	}
	for _, name := range []string{"datasource", "job", "instance", "agent_job", "agent"} {
		if !variables[name] {
			t.Errorf("there is no variable %s", name)
		}
	}
	known := []string{units.Short, units.Seconds, units.BytesIEC, units.BytesPerSecondSI, units.OpsPerSecond, units.RequestsPerSecond, units.WritesPerSecond, units.PercentUnit}
	const width = 24
	taken := map[[2]uint32]string{}
	ids := map[uint32]bool{}
	rows := 0
	for _, either := range d.Panels {
		if either.RowPanel != nil {
			rows++
			if ids[either.RowPanel.Id] {
				t.Errorf("the id %d is there twice", either.RowPanel.Id)
			}
			ids[either.RowPanel.Id] = true
			continue
		}
		p := either.Panel
		if p.Title == nil || *p.Title == "" || p.Id == nil || p.GridPos == nil {
			t.Fatalf("a panel has no title, no id or no place: %+v", p)
		}
		title := *p.Title
		if ids[*p.Id] {
			t.Errorf("%q: the id %d is there twice", title, *p.Id)
		}
		ids[*p.Id] = true
		if p.Description == nil || len(*p.Description) < 10 {
			t.Errorf("%q has no description", title)
		}
		if p.FieldConfig == nil || p.FieldConfig.Defaults.Unit == nil || !slices.Contains(known, *p.FieldConfig.Defaults.Unit) {
			t.Errorf("%q has no unit, or one that Grafana does not have", title)
		}
		if p.Datasource == nil || p.Datasource.Uid == nil || *p.Datasource.Uid != "${datasource}" {
			t.Errorf("%q is of a fixed source", title)
		}
		if len(p.Targets) == 0 {
			t.Errorf("%q asks for nothing", title)
		}
		if p.GridPos.X+p.GridPos.W > width {
			t.Errorf("%q is wider than there is room", title)
		}
		for x := p.GridPos.X; x < p.GridPos.X+p.GridPos.W; x++ {
			for y := p.GridPos.Y; y < p.GridPos.Y+p.GridPos.H; y++ {
				if other, ok := taken[[2]uint32{x, y}]; ok {
					t.Fatalf("%q lies upon %q", title, other)
				}
				taken[[2]uint32{x, y}] = title
			}
		}
	}
	if rows < 7 {
		t.Errorf("there are %d rows", rows)
	}

	selects := regexp.MustCompile(`job=~"\$job", instance=~"\$instance"|job=~"\$agent_job", instance=~"\$agent"`)
	for _, q := range queries(t, d) {
		title := *q.panel.Title
		expr, err := parser.NewParser(parser.Options{}).ParseExpr(q.all)
		if err != nil {
			t.Errorf("%q: %s: %v", title, q.expr, err)
			continue
		}
		if q.panel.Type == "timeseries" && q.legend == "" {
			t.Errorf("%q: %s has no legend", title, q.expr)
		}
		if strings.Contains(q.all, "$") {
			t.Errorf("%q has a variable that is not known here: %s", title, q.expr)
		}
		parser.Inspect(expr, func(node parser.Node, path []parser.Node) error {
			call, isCall := node.(*parser.Call)
			if isCall && (call.Func.Name == "rate" || call.Func.Name == "increase") && !strings.Contains(q.expr, "$__rate_interval") {
				t.Errorf("%q: %s: use $__rate_interval, which is never too short", title, q.expr)
			}
			// What programs say of themselves is selected; groups have other jobs, and
			// recording rules no instance.
			selector, isSelector := node.(*parser.VectorSelector)
			if isSelector && regexp.MustCompile(`^(culvert_|process_|go_|up$)`).MatchString(selector.Name) && !selects.MatchString(q.expr) {
				t.Errorf("%q: %s does not select by the variables", title, q.expr)
			}
			return nil
		})
	}
}
