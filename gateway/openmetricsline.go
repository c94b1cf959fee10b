package gateway

import (
	"errors"
	"fmt"
	"math"
	"sort"
	"strconv"
	"strings"
	"unicode/utf8"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/model"
	"google.golang.org/protobuf/proto"
)

// openMetricsLine is a line of OpenMetrics 1.0 text, read by the grammar of the
// specification and not more: whether the families make sense is for
// openMetricsReader. The grammar is Prometheus's reading of it, which takes
//
//	{"a metric's name","a label's"="value",bare="value"} 1
//
// beside it, a comma behind the last label, and any number that Go writes except
// for hexadecimal ones.
type openMetricsLine struct {
	keyword string // HELP, TYPE or UNIT, empty for a sample
	name    string
	text    string // of the metadata

	labels []*dto.LabelPair // sorted by name, which may stand twice, be empty or not be UTF-8
	value  float64
	at     *int64 // Unix time in milliseconds
	// example is nil where there is none. Its labels are no more checked, and its time
	// stands in exampleAt, in Unix seconds.
	example   *dto.Exemplar
	exampleAt *float64
}

// parseOpenMetricsLine reads a line, without its line feed. The result refers to
// line.
func parseOpenMetricsLine(line string) (*openMetricsLine, error) {
	if rest, is := strings.CutPrefix(line, "# "); is {
		return parseOpenMetricsMetadata(rest)
	}
	l := new(openMetricsLine)
	rest := line
	n := bareName(rest, true)
	l.name, rest = rest[:n], rest[n:]
	named := n > 0
	if !named && !strings.HasPrefix(rest, "{") {
		return nil, errors.New("expected a valid start token: the name of a metric, {, # HELP, # TYPE or # UNIT")
	}
	if inside, is := strings.CutPrefix(rest, "{"); is {
		var name *string
		var err error
		if l.labels, name, rest, err = parseOpenMetricsLabels(inside, false); err != nil {
			return nil, err
		}
		if name != nil {
			if named {
				return nil, fmt.Errorf("metric name already set: %q, and %q between the braces", l.name, *name)
			}
			l.name, named = *name, true
		}
	}
	if !named {
		return nil, errors.New("metric name not set: it stands in front of the braces, or in quotes between them")
	}
	token, rest, is := cutNumber(rest)
	if !is {
		return nil, fmt.Errorf("expected value after metric, behind one blank: got %.100q", rest)
	}
	var err error
	if l.value, err = parseOpenMetricsFloat(token); err != nil {
		return nil, err
	}
	const exemplar = " # {"
	if rest != "" && !strings.HasPrefix(rest, exemplar) {
		if token, rest, is = cutNumber(rest); !is {
			return nil, fmt.Errorf("the line does not end behind its value: %.100q", rest)
		}
		seconds, err := parseOpenMetricsFloat(token)
		if err != nil {
			return nil, err
		}
		if math.IsNaN(seconds) || math.IsInf(seconds, 0) {
			return nil, fmt.Errorf("invalid timestamp %v", seconds)
		}
		l.at = proto.Int64(int64(seconds * 1000))
		if rest != "" && !strings.HasPrefix(rest, exemplar) {
			return nil, fmt.Errorf("expected next entry after timestamp: got %.100q", rest)
		}
	}
	if rest == "" {
		return l, nil
	}

	l.example = new(dto.Exemplar)
	if l.example.Label, _, rest, err = parseOpenMetricsLabels(rest[len(exemplar):], true); err != nil {
		return nil, err
	}
	if token, rest, is = cutNumber(rest); !is {
		return nil, fmt.Errorf("expected value after exemplar labels, behind one blank: got %.100q", rest)
	}
	value, err := parseOpenMetricsFloat(token)
	if err != nil {
		return nil, err
	}
	l.example.Value = &value
	if rest == "" {
		return l, nil
	}
	if token, rest, is = cutNumber(rest); !is {
		return nil, fmt.Errorf("expected timestamp of the exemplar, behind one blank: got %.100q", rest)
	}
	seconds, err := parseOpenMetricsFloat(token)
	if err != nil {
		return nil, err
	}
	if math.IsNaN(seconds) || math.IsInf(seconds, 0) {
		return nil, fmt.Errorf("invalid exemplar timestamp %v", seconds)
	}
	l.exampleAt = &seconds
	if rest != "" {
		return nil, fmt.Errorf("expected next entry after exemplar timestamp: got %.100q", rest)
	}
	return l, nil
}

// parseOpenMetricsMetadata reads what stands behind "# ".
func parseOpenMetricsMetadata(line string) (*openMetricsLine, error) {
	keyword, rest, _ := strings.Cut(line, " ")
	switch {
	case keyword == "HELP", keyword == "TYPE", keyword == "UNIT":
	case strings.HasPrefix(keyword, "EOF"):
		return nil, errors.New("unexpected data after # EOF")
	default:
		return nil, errors.New("expected a valid start token: # HELP, # TYPE or # UNIT; there are no comments")
	}
	l := &openMetricsLine{keyword: keyword}
	raw := ""
	if strings.HasPrefix(rest, `"`) {
		var closed bool
		if raw, rest, closed = cutQuoted(rest, false); !closed {
			return nil, fmt.Errorf("expected metric name after %s: the quotes are not closed", keyword)
		}
	} else {
		n := bareName(rest, true)
		if n == 0 {
			return nil, fmt.Errorf("expected metric name after %s: got %.100q", keyword, rest)
		}
		raw, rest = rest[:n], rest[n:]
	}
	l.name = unescape(raw)
	text, is := strings.CutPrefix(rest, " ")
	if !is {
		return nil, fmt.Errorf("expected text in %s, behind the name and one blank: got %.100q", keyword, rest)
	}
	switch keyword {
	case "TYPE":
		if openMetricsTypeOf(model.MetricType(text)) == nil {
			return nil, fmt.Errorf("invalid metric type %q", text)
		}
	case "HELP":
		if !utf8.ValidString(text) {
			return nil, fmt.Errorf("help text %q is not a valid utf8 string", text)
		}
	case "UNIT":
		// As they are written, which the name and its unit both are.
		if text != "" && !strings.HasSuffix(raw, "_"+text) {
			return nil, fmt.Errorf("unit %q not a suffix of metric %q", text, raw)
		}
	}
	l.text = unescape(text)
	return l, nil
}

// parseOpenMetricsLabels reads what stands behind an opening brace, with the closing
// one, and returns what is left. A name in quotes without a value is the metric's,
// which an exemplar has not; nil means that there is none.
func parseOpenMetricsLabels(line string, exemplar bool) (labels []*dto.LabelPair, name *string, rest string, err error) {
	rest = line
	for {
		if left, closed := strings.CutPrefix(rest, "}"); closed {
			sort.SliceStable(labels, func(i, j int) bool { return *labels[i].Name < *labels[j].Name })
			return labels, name, left, nil
		}
		var label string
		quoted := strings.HasPrefix(rest, `"`)
		if quoted {
			var closed bool
			if label, rest, closed = cutQuoted(rest, false); !closed {
				return nil, nil, "", errors.New("expected label name: the quotes are not closed")
			}
			label = unescape(label)
		} else {
			n := bareName(rest, false)
			if n == 0 {
				return nil, nil, "", fmt.Errorf("expected label name, or }: got %.100q", rest)
			}
			label, rest = rest[:n], rest[n:]
		}
		if quoted && (strings.HasPrefix(rest, ",") || strings.HasPrefix(rest, "}")) {
			switch {
			case exemplar:
				return nil, nil, "", fmt.Errorf("expected label name with a value: %q has none", label)
			case name != nil:
				return nil, nil, "", fmt.Errorf("metric name already set: %q, and %q behind it", *name, label)
			}
			name, rest = &label, strings.TrimPrefix(rest, ",")
			continue
		}
		left, is := strings.CutPrefix(rest, "=")
		if !is {
			return nil, nil, "", fmt.Errorf("expected equal behind the label name %q: got %.100q", label, rest)
		}
		if !strings.HasPrefix(left, `"`) {
			return nil, nil, "", fmt.Errorf("expected label value of %q, in quotes: got %.100q", label, left)
		}
		// Only a label's value may have a NUL: Prometheus takes none elsewhere.
		value, left, closed := cutQuoted(left, !exemplar)
		if !closed {
			return nil, nil, "", fmt.Errorf("expected label value of %q: the quotes are not closed", label)
		}
		if !utf8.ValidString(value) {
			return nil, nil, "", fmt.Errorf("invalid UTF-8 label value: %q", value)
		}
		value = unescape(value)
		labels = append(labels, &dto.LabelPair{Name: &label, Value: &value})
		if rest, is = strings.CutPrefix(left, ","); !is && !strings.HasPrefix(rest, "}") {
			return nil, nil, "", fmt.Errorf("expected comma or brace close behind the label %q: got %.100q", label, rest)
		}
	}
}

// bareName returns the length of the name without quotes that text starts with, 0
// where it starts with none. Those of metrics may have colons.
func bareName(text string, metric bool) int {
	for i := range len(text) {
		c := text[i]
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', c == '_':
		case c == ':' && metric:
		case '0' <= c && c <= '9' && i > 0:
		default:
			return i
		}
	}
	return len(text)
}

// cutQuoted returns what stands between the quotes that text starts with, escaped as
// it is, and what is behind them.
func cutQuoted(text string, nul bool) (content, rest string, closed bool) {
	escaped := false
	for i := 1; i < len(text); i++ {
		switch c := text[i]; {
		case c == 0 && !nul:
			return "", text, false
		case c == 0:
			// One between a backslash and what it escapes hides neither.
		case escaped:
			escaped = false
		case c == '\\':
			escaped = true
		case c == '"':
			return text[1:i], text[i+1:], true
		}
	}
	return "", text, false
}

// cutNumber returns what stands between the blank that text starts with and the next
// one.
func cutNumber(text string) (number, rest string, is bool) {
	if len(text) < 2 || text[0] != ' ' || text[1] == ' ' {
		return "", text, false
	}
	end := strings.IndexByte(text[1:], ' ') + 1
	if end == 0 {
		end = len(text)
	}
	return text[1:end], text[end:], true
}

// parseOpenMetricsFloat reads a number. Hexadecimal ones and underscores are Go's.
func parseOpenMetricsFloat(text string) (float64, error) {
	if strings.ContainsAny(text, "pP_") {
		return 0, fmt.Errorf("unsupported character in float %q", text)
	}
	v, err := strconv.ParseFloat(text, 64)
	if math.IsNaN(v) {
		v = math.NaN() // whichever one it was: Prometheus has a meaning for another one
	}
	return v, err
}

// unescape undoes the escaping of names, values and HELP. A backslash in front of
// anything else stands for itself.
func unescape(s string) string {
	if strings.IndexByte(s, '\\') < 0 {
		return s
	}
	return openMetricsEscapes.Replace(s)
}

var openMetricsEscapes = strings.NewReplacer(`\\`, `\`, `\"`, `"`, `\n`, "\n")
