package gateway

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"slices"
	"sort"
	"strings"
	"unicode/utf8"
	"unique"

	"github.com/cespare/xxhash/v2"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// Names of the families that the gateway makes for each group. Pushed ones are
// overridden.
const (
	pushTimeName    = "push_time_seconds"
	failureTimeName = "push_failure_time_seconds"
	pushUpName      = "push_up"
)

// meta describes the family of a block. It is the same for most groups, and
// shared.
type meta struct {
	name, help, unit string
	kind             dto.MetricType
	// foreign: a name outside the legacy rules is in it, so that the text depends
	// on the escaping scheme.
	foreign bool
}

// prepared is one family of a push, labelled, checked and encoded for every way out. The
// values of most families stand apart, and most pushes replace them alone; not where a
// name is outside the legacy rules, or where a series has an exemplar or is a native
// histogram. A family is plain where its series have such a value each and nothing else.
type prepared struct {
	meta   unique.Handle[meta]
	series []uint64 // hashes of name and labels
	// text is the series in text format 0.0.4, without HELP and TYPE, names outside
	// the legacy rules escaped by underscores. Where the values stand apart it lacks them:
	// its lines end behind the blank.
	text []byte
	// values are those of the lines of the text, and behind them, of the series that tell
	// it, when they were created: see createdValue. Nil: they stand in text and proto.
	values []float64
	// proto is the series as the repeated field "metric" of a MetricFamily, with zeros for
	// values that stand apart; nil of a plain family.
	proto  []byte
	pushed int64 // Unix nanoseconds
}

// appendText appends the series in text format 0.0.4: see prepared.text.
func (p prepared) appendText(out []byte) []byte {
	if p.values == nil {
		return append(out, p.text...)
	}
	text := p.text
	for _, value := range p.values {
		if len(text) == 0 {
			break
		}
		end := bytes.IndexByte(text, '\n')
		out = append(appendFloat(append(out, text[:end]...), value), '\n')
		text = text[end+1:]
	}
	return out
}

// appendProto appends the series as the repeated field "metric" of a MetricFamily.
func (p prepared) appendProto(out []byte) []byte {
	switch {
	case p.values == nil:
		return append(out, p.proto...)
	case p.proto != nil:
		out, _, _ = appendProtoValues(out, p.proto, p.values) // they fit: they were cut out of it, or took the place of such
		return out
	}
	kind, text := p.meta.Value().kind, p.text
	var buf [16]plainLabel
	for _, value := range p.values {
		labels, rest := cutLine(buf[:0], text)
		out, text = appendPlain(out, kind, labels, value), rest
	}
	return out
}

// appendLabels appends the labels of NAME="VALUE",…} as appendText writes them.
func appendLabels(labels []plainLabel, text []byte) []plainLabel {
	for text[0] != '}' {
		equals := bytes.IndexByte(text, '=')
		name, rest := text[:equals], text[equals+2:] // behind the quote
		end := bytes.IndexByte(rest, '"')
		value := rest[:end:end]
		if bytes.IndexByte(value, '\\') >= 0 {
			for end = 0; rest[end] != '"'; end++ {
				if rest[end] == '\\' {
					end++
				}
			}
			value = []byte(unescape(string(rest[:end])))
		}
		labels = append(labels, plainLabel{name, value})
		if text = rest[end+1:]; text[0] == ',' {
			text = text[1:]
		}
	}
	return labels
}

// appendPlain appends a series with a value to a repeated field "metric".
func appendPlain(out []byte, kind dto.MetricType, labels []plainLabel, value float64) []byte {
	size := 2 + 9
	for _, l := range labels {
		size += 1 + protowire.SizeBytes(pairSize(l))
	}
	out = protowire.AppendVarint(append(out, familyMetric), uint64(size))
	for _, l := range labels {
		out = protowire.AppendVarint(append(out, metricLabel), uint64(pairSize(l)))
		out = protowire.AppendBytes(append(out, pairName), l.name)
		out = protowire.AppendBytes(append(out, pairValue), l.value)
	}
	out = append(out, valueTag(kind), 9, plainValue)
	return binary.LittleEndian.AppendUint64(out, math.Float64bits(value))
}

// valueTag returns the tag of the field that has the value of a counter, a gauge or an
// untyped series.
func valueTag(kind dto.MetricType) byte {
	switch kind {
	case dto.MetricType_GAUGE:
		return metricGauge
	case dto.MetricType_COUNTER:
		return metricCounter
	}
	return metricUntyped
}

// cutLine appends the labels of a text's first line, and returns the lines behind it.
func cutLine(labels []plainLabel, text []byte) ([]plainLabel, []byte) {
	end := bytes.IndexByte(text, '\n')
	return appendLabels(labels, text[bytes.IndexByte(text, '{')+1:end]), text[end+1:]
}

// plainLabels returns labels as bytes.
func plainLabels(labels []*dto.LabelPair) []plainLabel {
	plain := make([]plainLabel, len(labels))
	for i, l := range labels {
		plain[i] = plainLabel{[]byte(l.GetName()), []byte(l.GetValue())}
	}
	return plain
}

// pairSize returns the size of a label as a LabelPair.
func pairSize(l plainLabel) int {
	return 2 + protowire.SizeBytes(len(l.name)) + protowire.SizeBytes(len(l.value))
}

// decode returns the family as a message.
func (p prepared) decode() (*dto.MetricFamily, error) {
	m := p.meta.Value()
	f := new(dto.MetricFamily)
	if err := proto.Unmarshal(p.appendProto(nil), f); err != nil {
		return nil, fmt.Errorf("metric %q: stored series: %w", m.name, err)
	}
	f.Name, f.Type = &m.name, &m.kind
	if m.help != "" {
		f.Help = &m.help
	}
	if m.unit != "" {
		f.Unit = &m.unit
	}
	return f, nil
}

// equal reports whether two families are the same in all that a push brings, its time
// included.
func (p prepared) equal(o prepared) bool {
	return p.meta == o.meta && p.pushed == o.pushed && bytes.Equal(p.text, o.text) && bytes.Equal(p.proto, o.proto) &&
		slices.EqualFunc(p.values, o.values, func(a, b float64) bool { return math.Float64bits(a) == math.Float64bits(b) })
}

func (p prepared) name() string { return p.meta.Value().name }

// pushedFamilies is what a push brings: its families, sorted by name, and the
// names of those that have no series, which go.
type pushedFamilies struct {
	families []prepared
	dropped  []string
	places
}

// prepare forces the grouping labels onto the series of a push, checks what can be
// checked without looking at other groups, and encodes. families are sorted by
// name. reasons tells what is wrong, each with the metric's name; the result is
// not to be used then.
func prepare(key Key, families []*dto.MetricFamily, now int64) (out pushedFamilies, reasons []string) {
	forced := key.forced()
	for _, f := range families {
		if isGenerated(f.GetName()) { // it is overridden; what it says of its times counts
			if slices.ContainsFunc(f.Metric, func(m *dto.Metric) bool { return m.TimestampMs != nil }) {
				reasons = append(reasons, noTimestamps(f.GetName()))
			}
			continue
		}
		p, err := prepareFamily(key, forced, f, now)
		switch {
		case err != nil:
			reasons = append(reasons, err.Error())
		case len(p.series) == 0:
			out.dropped = append(out.dropped, f.GetName())
		default:
			out.families = append(out.families, p)
		}
	}
	return out, reasons
}

func noTimestamps(name string) string {
	return fmt.Sprintf("metric %q: timestamps are not allowed; the time of a push is in %s", name, pushTimeName)
}

func prepareFamily(key Key, forced []*dto.LabelPair, f *dto.MetricFamily, now int64) (p prepared, err error) {
	name := f.GetName()
	if name == "" || !utf8.ValidString(name) {
		return p, fmt.Errorf("metric name %q is empty or not UTF-8", name)
	}
	if !utf8.ValidString(f.GetHelp()) || !utf8.ValidString(f.GetUnit()) {
		return p, fmt.Errorf("metric %q: the HELP text or the unit is not UTF-8", name)
	}
	m := meta{name: name, help: f.GetHelp(), unit: f.GetUnit(), kind: f.GetType(), foreign: !model.LegacyValidation.IsValidMetricName(name)}
	for _, series := range f.Metric {
		if series.TimestampMs != nil {
			return p, errors.New(noTimestamps(name))
		}
		if !onlyValue(series, m.kind) {
			return p, fmt.Errorf("metric %q: a series is not of the family's type %s", name, typeName(m.kind))
		}
		if err := checkValue(series); err != nil {
			return p, fmt.Errorf("metric %q: %w", name, err)
		}
		forceLabels(key, forced, series)
		foreign, err := checkLabels(series.Label, m.kind)
		if err != nil {
			return p, fmt.Errorf("metric %q: %w", name, err)
		}
		m.foreign = m.foreign || foreign
	}
	slices.SortFunc(f.Metric, compareSeries)
	p = prepared{meta: unique.Make(m), series: make([]uint64, len(f.Metric)), pushed: now}
	for i, series := range f.Metric {
		if i > 0 && slices.EqualFunc(f.Metric[i-1].Label, series.Label, sameLabel) {
			return p, fmt.Errorf("metric %q: the labels %s were already seen", name, labelString(series.Label))
		}
		if !m.foreign {
			p.series[i] = hashSeries(name, series.Label)
			continue
		}
		p.series[i] = hashSeries(name, canonicalLabels(series.Label))
		if slices.Contains(p.series[:i], p.series[i]) {
			return p, fmt.Errorf("metric %q: the labels %s were already seen where UTF-8 names are escaped", name, labelString(series.Label))
		}
	}
	if len(f.Metric) == 0 {
		return p, nil
	}
	if p.text, err = encodeText(name, m.kind, f.Metric, model.UnderscoreEscaping, m.foreign); err != nil {
		return p, fmt.Errorf("metric %q: %w", name, err)
	}
	if values := plainValues(f.Metric); values != nil && !m.foreign {
		p.text, p.values = withoutValues(p.text), values
		return p, nil
	}
	if p.proto, err = encodeProto(f.Metric); err != nil {
		return p, fmt.Errorf("metric %q: %w", name, err)
	}
	if !m.foreign {
		if proto, values, ok := cutProtoValues(p.proto); ok {
			p.text, p.proto, p.values = withoutValues(p.text), proto, values
		}
	}
	return p, nil
}

// plainValues returns the values of series that have nothing beside; nil where one of
// them is no number, or has an exemplar or the time when it was created.
func plainValues(series []*dto.Metric) []float64 {
	values := make([]float64, len(series))
	for i, m := range series {
		switch {
		case m.Gauge != nil:
			values[i] = m.Gauge.GetValue()
		case m.Counter != nil && m.Counter.Exemplar == nil && m.Counter.CreatedTimestamp == nil:
			values[i] = m.Counter.GetValue()
		case m.Untyped != nil:
			values[i] = m.Untyped.GetValue()
		default:
			return nil
		}
	}
	return values
}

// withoutValues cuts the values off the lines of a text, in place.
func withoutValues(text []byte) []byte {
	out := text[:0]
	for line := range bytes.Lines(text) {
		out = append(append(out, line[:bytes.LastIndexByte(line, ' ')+1]...), '\n')
	}
	return slices.Clip(out)
}

// onlyValue reports whether the series has the value field of the type, and takes
// others away.
func onlyValue(m *dto.Metric, kind dto.MetricType) bool {
	counter, gauge, summary, untyped, histogram := m.Counter, m.Gauge, m.Summary, m.Untyped, m.Histogram
	m.Counter, m.Gauge, m.Summary, m.Untyped, m.Histogram = nil, nil, nil, nil, nil
	switch kind {
	case dto.MetricType_COUNTER:
		m.Counter = counter
	case dto.MetricType_GAUGE:
		m.Gauge = gauge
	case dto.MetricType_SUMMARY:
		m.Summary = summary
	case dto.MetricType_UNTYPED:
		m.Untyped = untyped
	case dto.MetricType_HISTOGRAM, dto.MetricType_GAUGE_HISTOGRAM:
		m.Histogram = histogram
	}
	return m.Counter != nil || m.Gauge != nil || m.Summary != nil || m.Untyped != nil || m.Histogram != nil
}

// checkValue tells what Prometheus would refuse beside the labels.
func checkValue(m *dto.Metric) error {
	switch {
	case m.Histogram != nil:
		return checkHistogram(m.Histogram)
	case m.Counter != nil:
		if err := checkExemplar(m.Counter.Exemplar); err != nil {
			return err
		}
		return checkTime(m.Counter.CreatedTimestamp)
	case m.Summary != nil:
		return checkTime(m.Summary.CreatedTimestamp)
	}
	return nil
}

// CheckSeries tells what Prometheus would refuse, with all else that is in the
// scrape, of a series of the given type: its labels, which have to be sorted by name, its
// exemplars and its native histogram.
func CheckSeries(m *dto.Metric, kind dto.MetricType) error {
	if err := checkValue(m); err != nil {
		return err
	}
	_, err := checkLabels(m.Label, kind)
	return err
}

// forced returns the labels that every series of a group has: those of its key,
// and instance="" where that lacks one.
func (k Key) forced() []*dto.LabelPair {
	labels := make([]*dto.LabelPair, 0, len(k)+1)
	for i := range k {
		labels = append(labels, &dto.LabelPair{Name: &k[i].Name, Value: &k[i].Value})
	}
	if _, ok := k.Get(model.InstanceLabel); !ok {
		labels = append(labels, &dto.LabelPair{Name: proto.String(model.InstanceLabel), Value: proto.String("")})
	}
	return labels
}

// forceLabels puts the forced labels of a key onto a series, and sorts its labels.
// An instance of its own stays where the key has none.
func forceLabels(key Key, forced []*dto.LabelPair, m *dto.Metric) {
	kept := slices.Grow(m.Label, len(forced))[:0]
	instance := false
	for _, l := range m.Label {
		if _, grouping := key.Get(l.GetName()); grouping {
			continue
		}
		instance = instance || l.GetName() == model.InstanceLabel
		kept = append(kept, l)
	}
	for i, l := range forced {
		if i < len(key) || !instance {
			kept = append(kept, l)
		}
	}
	m.Label = kept
	slices.SortFunc(m.Label, func(a, b *dto.LabelPair) int { return strings.Compare(a.GetName(), b.GetName()) })
}

// checkLabels reports the first label, of sorted ones, that must not be there, and
// whether a name is outside the legacy rules.
func checkLabels(labels []*dto.LabelPair, kind dto.MetricType) (foreign bool, err error) {
	var escaped map[string]bool
	for i, l := range labels {
		name := l.GetName()
		switch {
		case name == "" || strings.HasPrefix(name, model.ReservedLabelPrefix) || !utf8.ValidString(name):
			return false, fmt.Errorf("label name %q is not allowed", name)
		case !utf8.ValidString(l.GetValue()):
			return false, fmt.Errorf("the value %q of label %q is not UTF-8", l.GetValue(), name)
		case i > 0 && labels[i-1].GetName() == name:
			return false, fmt.Errorf("label %q stands twice in a series", name)
		case name == model.QuantileLabel && kind == dto.MetricType_SUMMARY,
			name == model.BucketLabel && (kind == dto.MetricType_HISTOGRAM || kind == dto.MetricType_GAUGE_HISTOGRAM):
			return false, fmt.Errorf("label %q is not allowed in a %s", name, strings.ToLower(kind.String()))
		}
		if !model.LegacyValidation.IsValidLabelName(name) {
			foreign = true
		}
	}
	if foreign {
		escaped = make(map[string]bool, len(labels))
		for _, l := range labels {
			name := model.EscapeName(l.GetName(), model.UnderscoreEscaping)
			if escaped[name] {
				return false, fmt.Errorf("label %q has the same name as another one where UTF-8 names are escaped (%s)", l.GetName(), name)
			}
			escaped[name] = true
		}
	}
	return foreign, nil
}

func sameLabel(a, b *dto.LabelPair) bool {
	return a.GetName() == b.GetName() && a.GetValue() == b.GetValue()
}

// SortSeries puts series in the order of an exposition. Those that CompareSeries takes for
// equal stay in theirs.
func SortSeries(series []*dto.Metric) {
	sort.SliceStable(series, func(i, j int) bool { return compareSeries(series[i], series[j]) < 0 })
}

// CompareSeries orders series as an exposition of the Go client library has them.
func CompareSeries(a, b *dto.Metric) int { return compareSeries(a, b) }

// compareSeries orders series by the number of labels, then by their values, then
// by their names.
func compareSeries(a, b *dto.Metric) int {
	if len(a.Label) != len(b.Label) {
		return len(a.Label) - len(b.Label)
	}
	for i := range a.Label {
		if c := strings.Compare(a.Label[i].GetValue(), b.Label[i].GetValue()); c != 0 {
			return c
		}
	}
	for i := range a.Label {
		if c := strings.Compare(a.Label[i].GetName(), b.Label[i].GetName()); c != 0 {
			return c
		}
	}
	return 0
}

func labelString(labels []*dto.LabelPair) string {
	k := make(Key, len(labels))
	for i, l := range labels {
		k[i] = Label{l.GetName(), l.GetValue()}
	}
	return k.String()
}

// canonicalLabels returns labels with their names as text format 0.0.4 escapes
// them, sorted.
func canonicalLabels(labels []*dto.LabelPair) []*dto.LabelPair {
	if !slices.ContainsFunc(labels, func(l *dto.LabelPair) bool { return !model.LegacyValidation.IsValidLabelName(l.GetName()) }) {
		return labels
	}
	canonical := make([]*dto.LabelPair, len(labels))
	for i, l := range labels {
		canonical[i] = &dto.LabelPair{Name: proto.String(model.EscapeName(l.GetName(), model.UnderscoreEscaping)), Value: l.Value}
	}
	slices.SortFunc(canonical, func(a, b *dto.LabelPair) int { return strings.Compare(a.GetName(), b.GetName()) })
	return canonical
}

// hashSeparator is a byte that UTF-8 doesn't have.
var hashSeparator = []byte{0xff}

func hashSeries(name string, labels []*dto.LabelPair) uint64 {
	var d xxhash.Digest
	d.Reset()
	d.WriteString(name)
	d.Write(hashSeparator)
	for _, l := range labels {
		d.WriteString(l.GetName())
		d.Write(hashSeparator)
		d.WriteString(l.GetValue())
		d.Write(hashSeparator)
	}
	return d.Sum64()
}

// encodeText returns the series in text format 0.0.4, without HELP and TYPE.
func encodeText(name string, kind dto.MetricType, series []*dto.Metric, escaping model.EscapingScheme, foreign bool) ([]byte, error) {
	f := &dto.MetricFamily{Name: &name, Type: &kind, Metric: series}
	if foreign {
		f = model.EscapeMetricFamily(f, escaping)
	}
	buf := buffers.Get().(*bytes.Buffer)
	defer buffers.Put(buf)
	buf.Reset()
	if _, err := expfmt.MetricFamilyToText(buf, f); err != nil {
		return nil, err
	}
	_, lines, _ := bytes.Cut(buf.Bytes(), []byte("\n")) // behind TYPE
	return bytes.Clone(lines), nil
}

// metricField is the field number of "metric" in a MetricFamily.
const metricField = 4

func encodeProto(series []*dto.Metric) ([]byte, error) {
	size := 0
	for _, m := range series {
		size += protowire.SizeTag(metricField) + protowire.SizeBytes(proto.Size(m))
	}
	out := make([]byte, 0, size)
	var err error
	for _, m := range series {
		out = protowire.AppendTag(out, metricField, protowire.BytesType)
		out = protowire.AppendVarint(out, uint64(proto.Size(m)))
		if out, err = (proto.MarshalOptions{UseCachedSize: true}).MarshalAppend(out, m); err != nil {
			return nil, err
		}
	}
	return out, nil
}
