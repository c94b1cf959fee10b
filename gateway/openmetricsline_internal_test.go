package gateway

import (
	"bytes"
	"cmp"
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"
	"testing"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/exemplar"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/textparse"
	"google.golang.org/protobuf/proto"
)

// FuzzParseOpenMetricsLine reads the lines of a body here and with Prometheus's
// parser, and wants the same of both: what is refused, and what is in the others.
//
// One difference is wanted. That parser passes over bytes of NUL in keywords, and in
// front of what follows the value of a label; here they may stand inside of values and
// of HELP only, where the specification has them.
func FuzzParseOpenMetricsLine(f *testing.F) {
	for _, test := range openMetricsAccepted {
		f.Add([]byte(test.body))
	}
	for _, test := range openMetricsRefused {
		if len(test.body) < 1000 {
			f.Add([]byte(test.body))
		}
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		for line := range bytes.Lines(body) {
			line = append(bytes.TrimSuffix(line, []byte("\n")), '\n')
			got, err := parseOpenMetricsLine(string(line[:len(line)-1]))
			want, refused := parseLineAsPrometheus(line)
			switch {
			case err != nil && refused != nil:
			case err != nil && bytes.IndexByte(line, 0) >= 0:
			case err != nil:
				t.Fatalf("%q is refused: %v; Prometheus reads\n%s", line, err, describeLine(want))
			case refused != nil:
				t.Fatalf("%q is read as\n%s\nPrometheus refuses it: %v", line, describeLine(got), refused)
			case describeLine(got) != describeLine(want):
				t.Fatalf("%q is read as\n%s\nand by Prometheus as\n%s", line, describeLine(got), describeLine(want))
			}
		}
	})
}

// describeLine shows all of a line, where the order of labels of one name is open, and
// so is which of two names of the metric wins.
func describeLine(l *openMetricsLine) string {
	var out strings.Builder
	name := l.name
	if slices.ContainsFunc(l.labels, func(p *dto.LabelPair) bool { return p.GetName() == model.MetricNameLabel }) {
		name = "twice"
	}
	fmt.Fprintf(&out, "%s %q %q %016x", l.keyword, name, l.text, math.Float64bits(l.value))
	write := func(pairs []*dto.LabelPair, hidden string) {
		pairs = slices.SortedFunc(slices.Values(pairs), func(a, b *dto.LabelPair) int {
			return cmp.Or(strings.Compare(a.GetName(), b.GetName()), strings.Compare(a.GetValue(), b.GetValue()))
		})
		for _, p := range pairs {
			if p.GetName() != hidden {
				fmt.Fprintf(&out, " %q=%q", p.GetName(), p.GetValue())
			}
		}
	}
	write(l.labels, model.MetricNameLabel)
	if l.at != nil {
		fmt.Fprintf(&out, " at %d", *l.at)
	}
	if l.example != nil {
		fmt.Fprintf(&out, " exemplar %016x", math.Float64bits(l.example.GetValue()))
		write(l.example.Label, "")
	}
	if l.exampleAt != nil {
		fmt.Fprintf(&out, " of %v", *l.exampleAt)
	}
	return out.String()
}

// parseLineAsPrometheus reads a line with its line feed as an exposition of its own:
// a parser of a whole body takes le and quantile for numbers by the last TYPE,
// whichever family that was for.
func parseLineAsPrometheus(line []byte) (*openMetricsLine, error) {
	p := textparse.NewOpenMetricsParser(slices.Concat(line, []byte("# EOF\n")), labels.NewSymbolTable())
	entry, err := p.Next()
	if err != nil {
		return nil, err
	}
	l := new(openMetricsLine)
	switch entry {
	case textparse.EntryType:
		name, kind := p.Type()
		l.keyword, l.name, l.text = "TYPE", unescape(string(name)), string(kind)
	case textparse.EntryHelp:
		name, help := p.Help()
		l.keyword, l.name, l.text = "HELP", unescape(string(name)), string(help)
	case textparse.EntryUnit:
		name, unit := p.Unit()
		l.keyword, l.name, l.text = "UNIT", unescape(string(name)), unescape(string(unit))
	case textparse.EntrySeries:
		var all labels.Labels
		p.Labels(&all)
		all.Range(func(label labels.Label) {
			if label.Name == model.MetricNameLabel && l.name == "" {
				l.name = label.Value
				return
			}
			l.labels = append(l.labels, &dto.LabelPair{Name: &label.Name, Value: &label.Value})
		})
		_, l.at, l.value = p.Series()
		var e exemplar.Exemplar
		if !p.Exemplar(&e) {
			break
		}
		l.example = &dto.Exemplar{Value: &e.Value}
		e.Labels.Range(func(label labels.Label) {
			l.example.Label = append(l.example.Label, &dto.LabelPair{
				Name: proto.String(unescape(label.Name)), Value: proto.String(unescape(label.Value)),
			})
		})
		if e.HasTs {
			// Its own is cut to milliseconds.
			at, err := strconv.ParseFloat(string(line[bytes.LastIndexByte(line, ' ')+1:len(line)-1]), 64)
			if err != nil {
				return nil, err
			}
			l.exampleAt = &at
		}
	}
	// What may not follow a value is noticed by the next call only.
	if _, err := p.Next(); err != io.EOF {
		return nil, fmt.Errorf("the line does not end behind its value: %v", err)
	}
	return l, nil
}
