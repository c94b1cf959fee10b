package gateway

import (
	"fmt"
	"slices"
	"strings"

	dto "github.com/prometheus/client_model/go"
)

// groupBy reads the label names of a batch push.
func groupBy(list string) ([]string, error) {
	names := strings.Split(list, ",")
	for i, name := range names {
		names[i] = strings.TrimSpace(name)
		if err := checkKeyLabel(names[i], ""); err != nil {
			return nil, fmt.Errorf("group_by=%q: %w; write the labels that make the groups, as in group_by=job,instance", list, err)
		}
	}
	slices.Sort(names)
	names = slices.Compact(names)
	if !slices.Contains(names, "job") {
		return nil, fmt.Errorf("group_by=%q: job must be among the labels", list)
	}
	return names, nil
}

// part is what a batch push brings for one group.
type part struct {
	key      Key
	families []*dto.MetricFamily
}

// splitByKey deals the series out to groups by their own labels.
func splitByKey(families []*dto.MetricFamily, names []string) ([]*part, error) {
	var parts []*part
	byID := map[string]*part{}
	for _, f := range families {
		for _, m := range f.Metric {
			key := make(Key, 0, len(names))
			for _, name := range names {
				if value := labelValue(m, name); value != "" {
					key = append(key, Label{name, value})
				}
			}
			id := key.ID()
			p := byID[id]
			if p == nil {
				if _, err := NewKey(key.Map()); err != nil {
					return nil, fmt.Errorf("metric %q: the series with the labels %s belongs to no group: %w", f.GetName(), labelString(m.Label), err)
				}
				p = &part{key: key}
				byID[id] = p
				parts = append(parts, p)
			}
			if n := len(p.families); n == 0 || p.families[n-1].GetName() != f.GetName() {
				p.families = append(p.families, &dto.MetricFamily{Name: f.Name, Help: f.Help, Type: f.Type, Unit: f.Unit})
			}
			last := p.families[len(p.families)-1]
			last.Metric = append(last.Metric, m)
		}
	}
	return parts, nil
}

func labelValue(m *dto.Metric, name string) string {
	for _, l := range m.Label {
		if l.GetName() == name {
			return l.GetValue()
		}
	}
	return ""
}
