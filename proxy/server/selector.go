package server

import (
	"fmt"

	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql/parser"
)

// selectors are those of match[] parameters. One that matches is enough.
type selectors [][]*labels.Matcher

// parseSelectors parses selectors as Prometheus writes them.
func parseSelectors(texts []string) (selectors, error) {
	p := parser.NewParser(parser.Options{})
	var out selectors
	for _, text := range texts {
		matchers, err := p.ParseMetricSelector(text)
		if err != nil {
			return nil, fmt.Errorf("match[]=%q: %w; write it as in match[]={env=\"prod\"}", text, err)
		}
		out = append(out, matchers)
	}
	return out, nil
}

// match reports whether a selector matches the labels that value tells, "" for
// those that aren't there.
func (s selectors) match(value func(name string) string) bool {
next:
	for _, matchers := range s {
		for _, m := range matchers {
			if !m.Matches(value(m.Name)) {
				continue next
			}
		}
		return true
	}
	return false
}
