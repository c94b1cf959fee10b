package gateway

import (
	"bytes"
	"math"
	"strconv"
	"unicode/utf8"

	dto "github.com/prometheus/client_model/go"
)

// parseText reads all lines. It returns false where the body isn't plain.
func (e *plainEncoder) parseText(body []byte) bool {
	if !utf8.Valid(body) {
		return false
	}
	for len(body) > 0 {
		end := bytes.IndexByte(body, '\n')
		if end < 0 {
			return false
		}
		line := body[:end]
		body = body[end+1:]
		switch {
		case len(line) == 0:
		case line[0] == '#':
			if !e.comment(line) {
				return false
			}
		default:
			if !e.sample(line) {
				return false
			}
		}
	}
	return true
}

// family returns the family of that name: the current one, or a new one.
func (e *plainEncoder) family(name []byte) *plainFamily {
	if n := len(e.families); n > 0 {
		if f := &e.families[n-1]; bytes.Equal(f.name, name) {
			return f
		}
	}
	e.families = append(e.families, plainFamily{name: name, kind: dto.MetricType_UNTYPED, series: len(e.series)})
	return &e.families[len(e.families)-1]
}

func (e *plainEncoder) comment(line []byte) bool {
	keyword, rest := line[:min(7, len(line))], line[min(7, len(line)):]
	switch string(keyword) {
	case "# TYPE ":
		name, word, _ := bytes.Cut(rest, []byte(" "))
		if !legacyName(name) {
			return false
		}
		f := e.family(name)
		if f.hasType || len(e.series) > f.series {
			return false
		}
		f.hasType = true
		switch string(word) {
		case "counter":
			f.kind = dto.MetricType_COUNTER
		case "gauge":
			f.kind = dto.MetricType_GAUGE
		case "untyped":
		default:
			return false
		}
	case "# HELP ":
		name, help, _ := bytes.Cut(rest, []byte(" "))
		// Blanks at its ends and escapes need more care.
		if !legacyName(name) || len(help) == 0 || bytes.IndexByte(help, '\\') >= 0 || !isGraphic(help[0]) || !isGraphic(help[len(help)-1]) {
			return false
		}
		f := e.family(name)
		if f.hasHelp {
			return false
		}
		f.help, f.hasHelp = help, true
	default:
		return false
	}
	return true
}

func isGraphic(c byte) bool { return c > ' ' && c != 0x7f }

// sample reads NAME{LABELS} VALUE.
func (e *plainEncoder) sample(line []byte) bool {
	end := 0
	for end < len(line) && isNameByte(line[end]) {
		end++
	}
	name := line[:end]
	if !legacyName(name) {
		return false
	}
	line = line[end:]
	f := e.family(name)
	first := len(e.labels)
	if len(line) > 0 && line[0] == '{' {
		var ok bool
		if line, ok = e.readLabels(line[1:]); !ok {
			return false
		}
	}
	if len(line) < 2 || line[0] != ' ' {
		return false
	}
	value, ok := plainFloat(line[1:])
	if !ok || !e.forceLabels(first) {
		return false
	}
	e.add(f, e.labels[first:], value)
	return true
}

// readLabels reads NAME="VALUE",…} and returns what follows.
func (e *plainEncoder) readLabels(s []byte) ([]byte, bool) {
	for {
		if len(s) > 0 && s[0] == '}' {
			return s[1:], true
		}
		name, rest, ok := bytes.Cut(s, []byte(`="`))
		if !ok || !plainLabelName(name) {
			return nil, false
		}
		value, rest, ok := bytes.Cut(rest, []byte(`"`))
		if !ok || bytes.IndexByte(value, '\\') >= 0 || len(rest) == 0 {
			return nil, false
		}
		e.labels = append(e.labels, plainLabel{name, value})
		switch rest[0] {
		case ',':
			s = rest[1:]
		case '}':
			return rest[1:], true
		default:
			return nil, false
		}
	}
}

// plainFloat reads a float without the forms that the text format refuses.
func plainFloat(s []byte) (float64, bool) {
	if len(s) > 0 && len(s) <= 15 { // integers that a float64 has exactly
		n := int64(0)
		for i := 0; ; i++ {
			if i == len(s) {
				return float64(n), true
			}
			if s[i] < '0' || s[i] > '9' {
				break
			}
			n = 10*n + int64(s[i]-'0')
		}
	}
	switch string(s) {
	case "NaN":
		return math.NaN(), true
	case "+Inf":
		return math.Inf(+1), true
	case "-Inf":
		return math.Inf(-1), true
	}
	for _, c := range s {
		if (c < '0' || c > '9') && c != '.' && c != '-' && c != '+' && c != 'e' && c != 'E' {
			return 0, false
		}
	}
	if f, ok := shortDecimal(s); ok {
		return f, true
	}
	f, err := strconv.ParseFloat(string(s), 64)
	return f, err == nil
}

// shortDecimal reads digits with a point among them. A float64 has both the digits
// without the point and the power of ten exactly, so their quotient is the one that is
// nearest to what is written.
func shortDecimal(s []byte) (float64, bool) {
	if len(s) > 16 {
		return 0, false
	}
	digits, decimals, point := int64(0), 0, false
	for _, c := range s {
		switch {
		case c >= '0' && c <= '9':
			digits = 10*digits + int64(c-'0')
			if point {
				decimals++
			}
		case c == '.' && !point:
			point = true
		default:
			return 0, false
		}
	}
	if !point || len(s) == 1 { // ParseFloat takes neither "" nor "."
		return 0, false
	}
	return float64(digits) / powersOfTen[decimals], true
}

var powersOfTen = [...]float64{1e0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9, 1e10, 1e11, 1e12, 1e13, 1e14, 1e15}
