package gateway

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"math"
	"slices"
	"sort"
	"strconv"
	"strings"
	"unicode/utf8"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/model"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
)

const (
	// maxOpenMetricsLine bounds a line in bytes: Prometheus panics on a label of more
	// than 16 MiB.
	maxOpenMetricsLine = 1 << 20
	// maxExemplarLabels is how many characters the label names and values of an
	// exemplar may have, all together.
	maxExemplarLabels = 128
)

// parseOpenMetrics reads OpenMetrics 1.0 text
// (https://prometheus.io/docs/specs/om/open_metrics_spec/). The families are the
// ones that text 0.0.4 shows with the same series: a counter foo is foo_total, an
// info foo the gauge foo_info, a stateset a gauge. Families without samples are
// left out. Nothing of the result refers to body.
//
// It is as strict as the specification about names, types, order and completeness,
// and lenient about values that can be stored: fractional counts make a float
// histogram, and sums can be NaN or negative. Timestamps of samples are kept, for
// the caller to refuse.
func parseOpenMetrics(body []byte) (map[string]*dto.MetricFamily, error) {
	r, err := readOpenMetrics(body)
	if err != nil {
		return nil, err
	}
	return r.families, nil
}

// FoundFamily is a family and where it was found.
type FoundFamily struct {
	*dto.MetricFamily
	// Start and End are the bytes of the body that hold all its lines and no other
	// family's. Read alone, they give the same family.
	Start, End int
}

// ParseOpenMetrics reads OpenMetrics 1.0 text as a push in that format is read, and
// returns the families sorted by name. Nothing of them refers to body. Timestamps are
// kept, and labels are not checked: see CheckSeries.
func ParseOpenMetrics(body []byte) ([]FoundFamily, error) {
	r, err := readOpenMetrics(body)
	if err != nil {
		return nil, err
	}
	found := make([]FoundFamily, 0, len(r.families))
	for name, f := range r.families {
		found = append(found, FoundFamily{f, r.places[name][0], r.places[name][1]})
	}
	sort.Slice(found, func(i, j int) bool { return found[i].GetName() < found[j].GetName() })
	return found, nil
}

func readOpenMetrics(body []byte) (*openMetricsReader, error) {
	// A push has a length, so it is whole without the end mark: the Go client's push
	// package writes none.
	text, ended := bytes.CutSuffix(bytes.TrimSuffix(body, []byte("\n")), []byte("\n# EOF"))
	switch {
	case ended:
		text = body[:len(text)+1]
	case string(bytes.TrimSuffix(body, []byte("\n"))) == "# EOF":
		text = nil
	case len(body) > 0 && body[len(body)-1] != '\n':
		return nil, errors.New("the last line does not end with a line feed")
	default:
		text = body
	}
	r := &openMetricsReader{
		families: map[string]*dto.MetricFamily{},
		places:   map[string][2]int{},
		owners:   map[string]string{},
		seen:     map[uint64]struct{}{},
	}
	n := 1
	for line := range bytes.Lines(text) {
		// The reason stands in front of what an error repeats of the line.
		if err := r.readLine(line); err != nil {
			return nil, fmt.Errorf("line %d: %.400w", n, err)
		}
		n++
		r.offset += len(line)
	}
	if err := r.endFamily(); err != nil {
		return nil, fmt.Errorf("line %d: %.400w", n, err)
	}
	return r, nil
}

// openMetricsType is what a type of OpenMetrics means.
type openMetricsType struct {
	kind   model.MetricType
	stored dto.MetricType
	// suffix makes the name of the stored family.
	suffix string
	// samples are the suffixes of the samples' names.
	samples []string
	// label is a label that the samples with the suffix labelled must have, and no
	// other ones may have.
	label, labelled string
}

var openMetricsTypes = [...]openMetricsType{
	{kind: model.MetricTypeUnknown, stored: dto.MetricType_UNTYPED, samples: []string{""}},
	{kind: model.MetricTypeGauge, stored: dto.MetricType_GAUGE, samples: []string{""}},
	{kind: model.MetricTypeStateset, stored: dto.MetricType_GAUGE, samples: []string{""}},
	{kind: model.MetricTypeInfo, stored: dto.MetricType_GAUGE, suffix: "_info", samples: []string{"_info"}},
	{kind: model.MetricTypeCounter, stored: dto.MetricType_COUNTER, suffix: "_total", samples: []string{"_total", "_created"}},
	{
		kind: model.MetricTypeSummary, stored: dto.MetricType_SUMMARY, samples: []string{"", "_sum", "_count", "_created"}, label: model.QuantileLabel,
	},
	{
		kind: model.MetricTypeHistogram, stored: dto.MetricType_HISTOGRAM, samples: []string{"_bucket", "_sum", "_count", "_created"},
		label: model.BucketLabel, labelled: "_bucket",
	},
	// expfmt's encoder writes _sum and _count, where the specification has _gsum and
	// _gcount.
	{
		kind: model.MetricTypeGaugeHistogram, stored: dto.MetricType_GAUGE_HISTOGRAM, samples: []string{"_bucket", "_gsum", "_gcount", "_sum", "_count"},
		label: model.BucketLabel, labelled: "_bucket",
	},
}

// openMetricsTypeOf returns the type of that name, nil where there is none.
func openMetricsTypeOf(kind model.MetricType) *openMetricsType {
	for i := range openMetricsTypes {
		if t := &openMetricsTypes[i]; t.kind == kind {
			return t
		}
	}
	return nil
}

// openMetricsReader puts families together, line by line.
type openMetricsReader struct {
	families map[string]*dto.MetricFamily
	places   map[string][2]int // of the families: where they start and end
	// owners are the families' names by the names that they and their samples have or
	// could have.
	owners map[string]string
	seen   map[uint64]struct{} // hashes of the series
	offset int                 // of the line that is being read, in the body

	// The family that is being read, nil in front of the first, its name and type in
	// the body, and where it starts.
	family *dto.MetricFamily
	start  int
	name   string
	kind   model.MetricType
	// metric is its last series, which is not complete yet.
	metric *dto.Metric
}

// readLine reads one line, with its line feed.
func (r *openMetricsReader) readLine(line []byte) error {
	if len(line) > maxOpenMetricsLine {
		return fmt.Errorf("it is longer than %d bytes", maxOpenMetricsLine)
	}
	l, err := parseOpenMetricsLine(string(line[:len(line)-1]))
	if err != nil {
		return err
	}
	switch l.keyword {
	case "":
		return r.readSample(l)
	case "TYPE":
		return r.readType(l.name, model.MetricType(l.text))
	default:
		return r.readText(l.keyword, l.name, l.text)
	}
}

func (r *openMetricsReader) readType(name string, kind model.MetricType) error {
	if err := r.describe("TYPE", name); err != nil {
		return err
	}
	if r.family.Type != nil {
		return fmt.Errorf("metric %q: it has a TYPE already", name)
	}
	t := openMetricsTypeOf(kind)
	r.kind = kind
	r.family.Type = t.stored.Enum()
	r.family.Name = proto.String(name + t.suffix)
	for _, suffix := range t.samples {
		if suffix == "" {
			continue
		}
		if err := r.own(name + suffix); err != nil {
			return err
		}
	}
	return nil
}

// readText reads HELP or UNIT. An empty one counts as none.
func (r *openMetricsReader) readText(keyword, name, text string) error {
	if text == "" {
		return nil
	}
	if err := r.describe(keyword, name); err != nil {
		return err
	}
	field := &r.family.Help
	if keyword == "UNIT" {
		field = &r.family.Unit
	}
	if *field != nil {
		return fmt.Errorf("metric %q: it has a %s already", name, keyword)
	}
	*field = &text
	return nil
}

// describe makes the family of a line of metadata the one that is being read.
func (r *openMetricsReader) describe(keyword, name string) error {
	if r.family == nil || name != r.name {
		return r.startFamily(name)
	}
	if len(r.family.Metric) > 0 {
		return fmt.Errorf("metric %q: %s must stand in front of the samples", name, keyword)
	}
	return nil
}

func (r *openMetricsReader) startFamily(name string) error {
	if err := r.endFamily(); err != nil {
		return err
	}
	if !model.UTF8Validation.IsValidMetricName(name) {
		return fmt.Errorf("metric name %q is empty or not UTF-8", name)
	}
	r.name, r.kind, r.family, r.start = name, model.MetricTypeUnknown, &dto.MetricFamily{Name: &name}, r.offset
	return r.own(name)
}

// own keeps the name from other families.
func (r *openMetricsReader) own(name string) error {
	if owner, taken := r.owners[name]; taken {
		return fmt.Errorf("metric %q: the name belongs to the family %q above; the lines of a family stand together", name, owner)
	}
	r.owners[name] = r.name
	return nil
}

func (r *openMetricsReader) endFamily() error {
	if err := r.endSeries(); err != nil {
		return fmt.Errorf("metric %q: %w", r.name, err)
	}
	if r.family == nil || len(r.family.Metric) == 0 {
		return nil
	}
	if r.family.Unit != nil && (r.kind == model.MetricTypeInfo || r.kind == model.MetricTypeStateset) {
		return fmt.Errorf("metric %q: type %s has no UNIT", r.name, r.kind)
	}
	if r.family.Type == nil {
		r.family.Type = dto.MetricType_UNTYPED.Enum()
	}
	r.families[r.family.GetName()] = r.family
	r.places[r.family.GetName()] = [2]int{r.start, r.offset}
	return nil
}

func (r *openMetricsReader) readSample(l *openMetricsLine) error {
	name := l.name
	suffix, ofFamily := strings.CutPrefix(name, r.name)
	if r.family == nil || !ofFamily || !slices.Contains(openMetricsTypeOf(r.kind).samples, suffix) {
		if r.family != nil && ofFamily && r.family.Type != nil {
			// It may be a family of its own, but more likely is a mistake.
			for _, t := range openMetricsTypes {
				if slices.Contains(t.samples, suffix) {
					return fmt.Errorf("metric %q: the samples of the %s %q are named %s; a family of its own would need a TYPE",
						name, r.kind, r.name, r.name+strings.Join(openMetricsTypeOf(r.kind).samples, ", "+r.name))
				}
			}
		}
		if err := r.startFamily(name); err != nil {
			return err
		}
		suffix = ""
	}
	if err := r.addSample(l, suffix); err != nil {
		return fmt.Errorf("metric %q: %w", name, err)
	}
	return nil
}

// addSample adds a sample to its series, and a series where it is the first.
func (r *openMetricsReader) addSample(l *openMetricsLine, suffix string) error {
	t := openMetricsTypeOf(r.kind)
	var position *string // the value of t.label
	state := false
	pairs := make([]*dto.LabelPair, 0, len(l.labels))
	for i, pair := range l.labels {
		switch name := pair.GetName(); {
		case name == model.MetricNameLabel, i > 0 && name == l.labels[i-1].GetName():
			return fmt.Errorf("label %q stands twice", name)
		case !model.UTF8Validation.IsValidLabelName(name):
			return fmt.Errorf("label name %q is empty or not UTF-8", name)
		case t.label != "" && name == t.label:
			if suffix != t.labelled {
				return fmt.Errorf("label %q is not allowed here", name)
			}
			position = pair.Value
			continue
		case name == r.name:
			state = true
		}
		pairs = append(pairs, pair)
	}
	if r.kind == model.MetricTypeStateset && !state {
		return fmt.Errorf("the state is missing: a label with the name %q", r.name)
	}
	var bound float64
	var err error
	if t.label != "" && suffix == t.labelled {
		if position == nil {
			return fmt.Errorf("label %q is missing", t.label)
		}
		if bound, err = strconv.ParseFloat(*position, 64); err != nil {
			return fmt.Errorf("label %q is not a number: %q", t.label, *position)
		}
	}

	if r.metric == nil || !slices.EqualFunc(r.metric.Label, pairs, sameLabel) {
		if err := r.endSeries(); err != nil {
			return err
		}
		hash := hashSeries(r.name, pairs)
		if _, again := r.seen[hash]; again {
			return fmt.Errorf("the series %s stands above already; its samples stand together", labelString(pairs))
		}
		r.seen[hash] = struct{}{}
		r.metric = &dto.Metric{Label: pairs}
		switch t.stored {
		case dto.MetricType_COUNTER:
			r.metric.Counter = new(dto.Counter)
		case dto.MetricType_GAUGE:
			r.metric.Gauge = new(dto.Gauge)
		case dto.MetricType_UNTYPED:
			r.metric.Untyped = new(dto.Untyped)
		case dto.MetricType_SUMMARY:
			r.metric.Summary = new(dto.Summary)
		default:
			r.metric.Histogram = new(dto.Histogram)
		}
		r.family.Metric = append(r.family.Metric, r.metric)
	}
	m := r.metric
	if l.at != nil {
		m.TimestampMs = l.at
	}
	value, example := l.value, l.example
	if err := checkOpenMetricsExemplar(l); err != nil {
		return err
	}
	if example != nil && suffix != "_total" && suffix != "_bucket" {
		return errors.New("only counters and buckets can have an exemplar")
	}

	again := false
	switch suffix {
	case "_created":
		var created **timestamppb.Timestamp
		switch {
		case m.Counter != nil:
			created = &m.Counter.CreatedTimestamp
		case m.Summary != nil:
			created = &m.Summary.CreatedTimestamp
		default:
			created = &m.Histogram.CreatedTimestamp
		}
		again = *created != nil
		if *created, err = toTimestamp(value); err != nil {
			return err
		}
	case "_total":
		if !(value >= 0) {
			return fmt.Errorf("the counter is %v", value)
		}
		again = m.Counter.Value != nil
		m.Counter.Value, m.Counter.Exemplar = &value, example
	case "_info":
		if value != 1 {
			return fmt.Errorf("the info is %v, not 1", value)
		}
		again = m.Gauge.Value != nil
		m.Gauge.Value = &value
	case "_sum", "_gsum":
		if m.Summary != nil {
			again = m.Summary.SampleSum != nil
			m.Summary.SampleSum = &value
			break
		}
		again = m.Histogram.SampleSum != nil
		m.Histogram.SampleSum = &value
	case "_count", "_gcount":
		if !isCount(value) {
			return fmt.Errorf("%v is not a count", value)
		}
		if m.Summary == nil {
			again = m.Histogram.SampleCountFloat != nil
			m.Histogram.SampleCountFloat = &value
			break
		}
		if !isInteger(value) {
			return fmt.Errorf("the count %v of a summary is not an integer", value)
		}
		again = m.Summary.SampleCount != nil
		m.Summary.SampleCount = proto.Uint64(uint64(value))
	case "_bucket":
		buckets := m.Histogram.Bucket
		switch {
		case !isCount(value):
			return fmt.Errorf("%v is not a count", value)
		case math.IsNaN(bound):
			return errors.New("the bound of a bucket is NaN")
		case len(buckets) > 0 && bound <= buckets[len(buckets)-1].GetUpperBound():
			return fmt.Errorf("the bucket le=%q stands behind le=\"%v\"; buckets ascend", *position, buckets[len(buckets)-1].GetUpperBound())
		case len(buckets) > 0 && value < buckets[len(buckets)-1].GetCumulativeCountFloat():
			return fmt.Errorf("the bucket le=%q has less than the one in front of it; buckets are cumulative", *position)
		}
		m.Histogram.Bucket = append(buckets, &dto.Bucket{UpperBound: &bound, CumulativeCountFloat: &value, Exemplar: example})
	case "":
		switch {
		case m.Summary != nil:
			if !(bound >= 0 && bound <= 1) {
				return fmt.Errorf("the quantile %v is not between 0 and 1", bound)
			}
			m.Summary.Quantile = append(m.Summary.Quantile, &dto.Quantile{Quantile: &bound, Value: &value})
		case m.Gauge != nil:
			if r.kind == model.MetricTypeStateset && value != 0 && value != 1 {
				return fmt.Errorf("the state is %v, neither 0 nor 1", value)
			}
			again = m.Gauge.Value != nil
			m.Gauge.Value = &value
		default:
			again = m.Untyped.Value != nil
			m.Untyped.Value = &value
		}
	}
	if again {
		return fmt.Errorf("the series %s stands above already", labelString(pairs))
	}
	return nil
}

func isCount(v float64) bool { return v >= 0 && !math.IsInf(v, 1) }

// isInteger reports whether a count can be stored as uint64.
func isInteger(v float64) bool { return v == math.Trunc(v) && v < 1<<64 }

// checkOpenMetricsExemplar checks the exemplar of a line, where it has one, and sets
// its time.
func checkOpenMetricsExemplar(l *openMetricsLine) error {
	if l.example == nil {
		return nil
	}
	length := 0
	for i, pair := range l.example.Label {
		name := pair.GetName()
		if !model.UTF8Validation.IsValidLabelName(name) {
			return fmt.Errorf("label name %q of the exemplar is empty or not UTF-8", name)
		}
		if i > 0 && name == l.example.Label[i-1].GetName() {
			return fmt.Errorf("label %q stands twice in the exemplar", name)
		}
		if length += utf8.RuneCountInString(name) + utf8.RuneCountInString(pair.GetValue()); length > maxExemplarLabels {
			return fmt.Errorf("the labels of the exemplar have more than %d characters", maxExemplarLabels)
		}
	}
	if l.exampleAt == nil {
		return nil
	}
	var err error
	l.example.Timestamp, err = toTimestamp(*l.exampleAt)
	return err
}

// toTimestamp turns Unix seconds into a timestamp, rounded to microseconds: a
// float64 has no more of the times we live in.
func toTimestamp(seconds float64) (*timestamppb.Timestamp, error) {
	// Encoders count nanoseconds as int64.
	if !(math.Abs(seconds) < math.MaxInt64/1e9) {
		return nil, fmt.Errorf("%v is not a time", seconds)
	}
	whole := math.Floor(seconds)
	micros := int64(math.Round((seconds - whole) * 1e6))
	return &timestamppb.Timestamp{Seconds: int64(whole) + micros/1e6, Nanos: int32(micros % 1e6 * 1e3)}, nil
}

// endSeries checks what only the end of a series shows.
func (r *openMetricsReader) endSeries() error {
	m := r.metric
	r.metric = nil
	switch {
	case m == nil:
		return nil
	case m.Counter != nil:
		if m.Counter.Value == nil {
			return fmt.Errorf("the series %s above has no sample %q", labelString(m.Label), r.name+"_total")
		}
	case m.Summary != nil:
		sorted := slices.Clone(m.Summary.Quantile)
		slices.SortFunc(sorted, func(a, b *dto.Quantile) int { return cmp.Compare(a.GetQuantile(), b.GetQuantile()) })
		for i := 1; i < len(sorted); i++ {
			if sorted[i].GetQuantile() == sorted[i-1].GetQuantile() {
				return fmt.Errorf("the series %s above has the quantile %v twice", labelString(m.Label), sorted[i].GetQuantile())
			}
		}
	case m.Histogram != nil:
		h := m.Histogram
		n := len(h.Bucket)
		if n == 0 || !math.IsInf(h.Bucket[n-1].GetUpperBound(), 1) {
			return fmt.Errorf("the series %s above has no bucket le=\"+Inf\"", labelString(m.Label))
		}
		total := h.Bucket[n-1].GetCumulativeCountFloat()
		switch {
		case h.SampleCountFloat != nil && h.GetSampleCountFloat() != total:
			return fmt.Errorf("the series %s above has the count %v, but %v in the bucket le=\"+Inf\"", labelString(m.Label), h.GetSampleCountFloat(), total)
		case h.SampleCountFloat == nil && h.SampleSum != nil:
			return fmt.Errorf("the series %s above has a sum, but no count", labelString(m.Label))
		}
		h.SampleCountFloat = &total // without a sum, nothing but the bucket has it
		if slices.ContainsFunc(h.Bucket, func(b *dto.Bucket) bool { return !isInteger(b.GetCumulativeCountFloat()) }) {
			return nil
		}
		h.SampleCount, h.SampleCountFloat = proto.Uint64(uint64(total)), nil
		for _, b := range h.Bucket {
			b.CumulativeCount, b.CumulativeCountFloat = proto.Uint64(uint64(b.GetCumulativeCountFloat())), nil
		}
	}
	return nil
}
