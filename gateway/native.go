package gateway

import (
	"errors"
	"fmt"
	"math"
	"unicode/utf8"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/prometheus/model/histogram"
	"google.golang.org/protobuf/types/known/timestamppb"
)

// isNative reports whether Prometheus takes the histogram for a native one.
func isNative(h *dto.Histogram) bool {
	return len(h.PositiveSpan) > 0 || len(h.NegativeSpan) > 0 || h.GetZeroThreshold() > 0 || h.GetZeroCount() > 0
}

// hasFloatBuckets reports whether a native histogram counts in floats.
func hasFloatBuckets(h *dto.Histogram) bool {
	return h.GetSampleCountFloat() > 0 || h.GetZeroCountFloat() > 0 || len(h.PositiveCount) > 0 || len(h.NegativeCount) > 0
}

// nativeOf returns the native part of a histogram: the first where it counts in
// integers, the second where it counts in floats. Both share h's slices.
func nativeOf(h *dto.Histogram) (*histogram.Histogram, *histogram.FloatHistogram) {
	if hasFloatBuckets(h) {
		return nil, &histogram.FloatHistogram{
			Schema: h.GetSchema(), ZeroThreshold: h.GetZeroThreshold(), ZeroCount: h.GetZeroCountFloat(),
			Count: h.GetSampleCountFloat(), Sum: h.GetSampleSum(),
			PositiveSpans: spansOf(h.PositiveSpan), NegativeSpans: spansOf(h.NegativeSpan),
			PositiveBuckets: h.PositiveCount, NegativeBuckets: h.NegativeCount,
		}
	}
	return &histogram.Histogram{
		Schema: h.GetSchema(), ZeroThreshold: h.GetZeroThreshold(), ZeroCount: h.GetZeroCount(),
		Count: h.GetSampleCount(), Sum: h.GetSampleSum(),
		PositiveSpans: spansOf(h.PositiveSpan), NegativeSpans: spansOf(h.NegativeSpan),
		PositiveBuckets: h.PositiveDelta, NegativeBuckets: h.NegativeDelta,
	}, nil
}

func spansOf(in []*dto.BucketSpan) []histogram.Span {
	out := make([]histogram.Span, len(in))
	for i, s := range in {
		out[i] = histogram.Span{Offset: s.GetOffset(), Length: s.GetLength()}
	}
	return out
}

// maxNativeSchema and minNativeSchema bound the resolution of native histograms
// that Prometheus takes from an exposition.
const minNativeSchema, maxNativeSchema = -4, 8

// checkHistogram tells what Prometheus would refuse of a histogram, with all else
// that is in the scrape.
func checkHistogram(h *dto.Histogram) error {
	for _, b := range h.Bucket {
		if err := checkExemplar(b.Exemplar); err != nil {
			return err
		}
	}
	for _, e := range h.Exemplars {
		if err := checkExemplar(e); err != nil {
			return err
		}
	}
	if err := checkTime(h.CreatedTimestamp); err != nil {
		return err
	}
	if !isNative(h) {
		return nil
	}
	if schema := h.GetSchema(); schema < minNativeSchema || schema > maxNativeSchema {
		return fmt.Errorf("the native histogram has the schema %d; %d to %d are allowed", schema, minNativeSchema, maxNativeSchema)
	}
	// Whichever of the counts is read: an integer histogram may have these beside it.
	if c, z := h.GetSampleCountFloat(), h.GetZeroCountFloat(); !(c >= 0) || !(z >= 0) {
		return fmt.Errorf("the native histogram has a count of %v and a zero count of %v, which must be 0 or more", c, z)
	}
	// Prometheus's arithmetic never ends with the first, and panics where indexes are
	// far apart.
	if z := h.GetZeroThreshold(); !(z >= 0 && z <= math.MaxFloat64) {
		return fmt.Errorf("the zero threshold %v of the native histogram is negative or not finite", z)
	}
	first, last := bucketRange(h.GetSchema())
	for _, spans := range [][]*dto.BucketSpan{h.PositiveSpan, h.NegativeSpan} {
		end := int64(0)
		for _, s := range spans {
			end += int64(s.GetOffset()) + int64(s.GetLength())
		}
		if len(spans) > 0 && (int64(spans[0].GetOffset()) < first || end-1 > last) {
			return fmt.Errorf("the native histogram of schema %d has buckets outside those of float64, from %d to %d", h.GetSchema(), first, last)
		}
	}
	var err error
	if integer, float := nativeOf(h); float != nil {
		err = float.Validate()
	} else {
		err = integer.Validate()
	}
	if err != nil {
		return fmt.Errorf("the native histogram is not valid: %w", err)
	}
	return nil
}

// bucketRange returns the indexes of the first and of the last bucket that a
// float64 can fall into.
func bucketRange(schema int32) (first, last int64) {
	// The exponents of the smallest and of the largest float64. The bucket behind the
	// last one is for infinity.
	const smallest, largest = -1074, 1024
	resolution := maxNativeSchema - schema
	return int64(smallest << maxNativeSchema >> resolution), int64(largest<<maxNativeSchema>>resolution) + 1
}

func checkExemplar(e *dto.Exemplar) error {
	if e == nil {
		return nil
	}
	for _, l := range e.Label {
		if l.GetName() == "" || !utf8.ValidString(l.GetName()) || !utf8.ValidString(l.GetValue()) {
			return fmt.Errorf("the label %q=%q of an exemplar is empty or not UTF-8", l.GetName(), l.GetValue())
		}
	}
	return checkTime(e.Timestamp)
}

func checkTime(t *timestamppb.Timestamp) error {
	if t != nil && t.CheckValid() != nil {
		return errors.New("the time of an exemplar or of a creation is out of range")
	}
	return nil
}
