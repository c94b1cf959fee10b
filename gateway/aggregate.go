package gateway

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"net/url"
	"slices"
	"strings"

	dto "github.com/prometheus/client_model/go"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// aggregation tells how the series of a push are merged into those that its group
// holds, instead of replacing them. Values are summed; a gauge need not be.
type aggregation struct {
	gauge string // last, sum, min or max
}

// parseAggregation reads ?aggregate=sum&gauge=last|sum|min|max, where last is the
// default. It returns nil for a push that replaces. A parameter that is empty or
// given twice is an error: taken for none it would cost the counts so far.
func parseAggregation(query url.Values) (*aggregation, error) {
	aggregate, gauge := query["aggregate"], query["gauge"]
	switch {
	case aggregate == nil && gauge == nil:
		return nil, nil
	case aggregate == nil:
		return nil, errors.New("gauge has a meaning only with aggregate; write aggregate=sum too")
	case !slices.Equal(aggregate, []string{"sum"}):
		return nil, fmt.Errorf("aggregate=%q is not known; write aggregate=sum, or leave it out to replace", strings.Join(aggregate, ","))
	case gauge == nil:
		return &aggregation{gauge: "last"}, nil
	case len(gauge) != 1 || !slices.Contains([]string{"last", "sum", "min", "max"}, gauge[0]):
		return nil, fmt.Errorf("gauge=%q is not known; write gauge=last, gauge=sum, gauge=min or gauge=max", strings.Join(gauge, ","))
	}
	return &aggregation{gauge: gauge[0]}, nil
}

// merge returns the series of both families; those with equal labels become one.
// old is the family of the group, nil where it has none, pushed is that of the
// push; both are as prepareFamily leaves them. HELP and unit are old's. pushed is
// used up. old stays as it is, but the result's values refer to it: its labels may
// be forced again, its values must not be changed.
func (a *aggregation) merge(old, pushed *dto.MetricFamily) (*dto.MetricFamily, error) {
	name, kind := pushed.GetName(), pushed.GetType()
	if kind == dto.MetricType_GAUGE_HISTOGRAM && a.gauge != "last" && a.gauge != "sum" {
		return nil, fmt.Errorf("metric %q: a gauge histogram has no %s; write gauge=last or gauge=sum", name, a.gauge)
	}
	if old != nil && old.GetType() != kind {
		return nil, fmt.Errorf("metric %q has type %s, should have %s as in the group", name, typeName(kind), typeName(old.GetType()))
	}
	// Both are sorted, so one pass finds the pairs.
	stored := old.GetMetric()
	merged := make([]*dto.Metric, 0, len(stored)+len(pushed.Metric))
	keep := func(m *dto.Metric) {
		merged = append(merged, &dto.Metric{
			Label: slices.Clone(m.Label), Gauge: m.Gauge, Counter: m.Counter, Summary: m.Summary, Untyped: m.Untyped, Histogram: m.Histogram,
		})
	}
	for _, m := range pushed.Metric {
		for len(stored) > 0 && compareSeries(stored[0], m) < 0 {
			keep(stored[0])
			stored = stored[1:]
		}
		var err error
		switch {
		case len(stored) > 0 && compareSeries(stored[0], m) == 0:
			if !a.replaces(kind) {
				err = a.mergeSeries(stored[0], m)
			}
			stored = stored[1:]
		}
		if err != nil {
			return nil, fmt.Errorf("metric %q: labels %s: %w", name, labelString(m.Label), err)
		}
		merged = append(merged, m)
	}
	for _, m := range stored {
		keep(m)
	}
	head := cmp.Or(old, pushed)
	return &dto.MetricFamily{Name: head.Name, Help: head.Help, Type: head.Type, Unit: head.Unit, Metric: merged}, nil
}

// replaces reports whether the pushed value of the type replaces the stored one.
func (a *aggregation) replaces(kind dto.MetricType) bool {
	return a.gauge == "last" && (kind == dto.MetricType_GAUGE || kind == dto.MetricType_GAUGE_HISTOGRAM)
}

// mergeSeries adds the value of a stored series to that of a pushed one.
func (a *aggregation) mergeSeries(old, pushed *dto.Metric) error {
	switch {
	case pushed.Counter != nil:
		o, p := old.Counter, pushed.Counter
		p.Value = proto.Float64(o.GetValue() + p.GetValue())
		p.Exemplar = cmp.Or(p.Exemplar, o.Exemplar)
		p.CreatedTimestamp = earlier(o.CreatedTimestamp, p.CreatedTimestamp)
	case pushed.Untyped != nil:
		pushed.Untyped.Value = proto.Float64(old.Untyped.GetValue() + pushed.Untyped.GetValue())
	case pushed.Gauge != nil:
		o, p := old.Gauge.GetValue(), pushed.Gauge.GetValue()
		switch a.gauge {
		case "sum":
			p += o
		case "min":
			p = min(p, o) // NaN if one is
		case "max":
			p = max(p, o)
		}
		pushed.Gauge.Value = &p
	case pushed.Summary != nil:
		o, p := old.Summary, pushed.Summary
		p.SampleCount = proto.Uint64(addCounts(o.GetSampleCount(), p.GetSampleCount()))
		p.SampleSum = proto.Float64(o.GetSampleSum() + p.GetSampleSum())
		p.CreatedTimestamp = earlier(o.CreatedTimestamp, p.CreatedTimestamp)
		// The quantiles of two sets of observations tell nothing of those of the union.
		p.Quantile = nil
	case pushed.Histogram != nil:
		return mergeHistogram(old.Histogram, pushed.Histogram)
	}
	return nil
}

// addCounts adds, up to what a count can hold.
func addCounts(a, b uint64) uint64 {
	if a > math.MaxUint64-b {
		return math.MaxUint64
	}
	return a + b
}

func earlier(a, b *timestamppb.Timestamp) *timestamppb.Timestamp {
	if a == nil || b != nil && cmp.Or(cmp.Compare(a.Seconds, b.Seconds), cmp.Compare(a.Nanos, b.Nanos)) > 0 {
		return b
	}
	return a
}

// mergeHistogram adds a stored histogram to a pushed one: its classic buckets, its
// native ones, or both.
func mergeHistogram(old, pushed *dto.Histogram) error {
	native := isNative(pushed)
	if native != isNative(old) {
		form := map[bool]string{true: "native", false: "classic"}
		return fmt.Errorf("the stored histogram is %s and the pushed one is %s; push what is stored, or delete the group first", form[!native], form[native])
	}
	float := isFloat(old) || isFloat(pushed)
	buckets := mergeBuckets(old, pushed, float)
	if native {
		if len(old.Bucket) == 0 || len(pushed.Bucket) == 0 {
			// The observations of a side that is only native would be missing below +Inf.
			buckets = nil
		}
		mergeNative(old, pushed, float)
	}
	pushed.Bucket = buckets
	if float {
		pushed.SampleCount, pushed.SampleCountFloat = nil, proto.Float64(sampleCount(old)+sampleCount(pushed))
	} else {
		pushed.SampleCount, pushed.SampleCountFloat = proto.Uint64(addCounts(old.GetSampleCount(), pushed.GetSampleCount())), nil
	}
	pushed.SampleSum = proto.Float64(old.GetSampleSum() + pushed.GetSampleSum())
	pushed.CreatedTimestamp = earlier(old.CreatedTimestamp, pushed.CreatedTimestamp)
	if len(pushed.Exemplars) == 0 {
		pushed.Exemplars = old.Exemplars
	}
	return nil
}

// isFloat reports whether a count is a float. One of 0 says nothing: the integer
// beside it holds then.
func isFloat(h *dto.Histogram) bool {
	return hasFloatBuckets(h) || h.GetSampleCountFloat() != 0 || slices.ContainsFunc(h.Bucket, func(b *dto.Bucket) bool { return b.GetCumulativeCountFloat() != 0 })
}

func sampleCount(h *dto.Histogram) float64 {
	return cmp.Or(h.GetSampleCountFloat(), float64(h.GetSampleCount()))
}

func bucketCount(b *dto.Bucket) float64 {
	return cmp.Or(b.GetCumulativeCountFloat(), float64(b.GetCumulativeCount()))
}

// mergeBuckets adds the cumulative counts of classic buckets at each bound that a
// side has. A side without that bound has counted there at least what it has at its
// next lower one, and that much is added: with less the sum could fall from bound
// to bound.
func mergeBuckets(old, pushed *dto.Histogram, float bool) []*dto.Bucket {
	o, p := sortBuckets(old.Bucket), sortBuckets(pushed.Bucket)
	endsInf := func(buckets []*dto.Bucket) bool {
		return len(buckets) > 0 && math.IsInf(buckets[len(buckets)-1].GetUpperBound(), +1)
	}
	inf := func(h *dto.Histogram) *dto.Bucket {
		return &dto.Bucket{CumulativeCount: h.SampleCount, CumulativeCountFloat: h.SampleCountFloat, UpperBound: proto.Float64(math.Inf(+1))}
	}
	// +Inf may be left out, its count is that of the samples.
	switch infO, infP := endsInf(o), endsInf(p); {
	case infO && !infP:
		p = append(p, inf(pushed))
	case infP && !infO:
		o = append(o, inf(old))
	}
	merged := make([]*dto.Bucket, 0, max(len(o), len(p)))
	var lastO, lastP *dto.Bucket // nil below the first bound: counts 0
	for len(o) > 0 || len(p) > 0 {
		bound := math.Inf(+1)
		if len(o) > 0 {
			bound = o[0].GetUpperBound()
		}
		if len(p) > 0 {
			bound = min(bound, p[0].GetUpperBound())
		}
		sum := &dto.Bucket{UpperBound: &bound}
		if len(o) > 0 && o[0].GetUpperBound() == bound {
			lastO, o = o[0], o[1:]
			sum.Exemplar = lastO.Exemplar
		}
		if len(p) > 0 && p[0].GetUpperBound() == bound {
			lastP, p = p[0], p[1:]
			sum.Exemplar = cmp.Or(lastP.Exemplar, sum.Exemplar)
		}
		if float {
			sum.CumulativeCountFloat = proto.Float64(bucketCount(lastO) + bucketCount(lastP))
		} else {
			sum.CumulativeCount = proto.Uint64(addCounts(lastO.GetCumulativeCount(), lastP.GetCumulativeCount()))
		}
		merged = append(merged, sum)
	}
	return merged
}

// sortBuckets returns the buckets with ascending bounds; of equal ones that with
// the highest count. A bound of NaN is left out, as the text parser does.
func sortBuckets(buckets []*dto.Bucket) []*dto.Bucket {
	buckets = slices.DeleteFunc(slices.Clone(buckets), func(b *dto.Bucket) bool { return math.IsNaN(b.GetUpperBound()) })
	slices.SortFunc(buckets, func(a, b *dto.Bucket) int {
		return cmp.Or(cmp.Compare(a.GetUpperBound(), b.GetUpperBound()), cmp.Compare(bucketCount(b), bucketCount(a)))
	})
	return slices.CompactFunc(buckets, func(a, b *dto.Bucket) bool { return a.GetUpperBound() == b.GetUpperBound() })
}

// mergeNative adds the native buckets of a stored histogram to those of a pushed
// one. Where both the resolution and the zero bucket differ, it depends on the order
// of pushes how wide the latter gets.
func mergeNative(old, pushed *dto.Histogram, float bool) {
	sum := addendOf(old)
	sum.add(addendOf(pushed))
	sum.limit()
	sum.encodeInto(pushed, float)
}

// addendOf returns the native part of a histogram as it is added: no bucket lies
// inside the zero bucket, and there are not too many.
func addendOf(h *dto.Histogram) *nativeHistogram {
	n := nativeOf(h)
	n.moveToZero()
	n.limit()
	return n
}
