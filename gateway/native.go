package gateway

import (
	"errors"
	"fmt"
	"math"
	"unicode/utf8"

	dto "github.com/prometheus/client_model/go"
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
	// far apart. Ours counts indexes as int32.
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
	if err := checkNativeCounts(h); err != nil {
		return fmt.Errorf("the native histogram is not valid: %w", err)
	}
	return nil
}

// checkNativeCounts checks spans and buckets against each other, as Prometheus does
// before it stores them.
func checkNativeCounts(h *dto.Histogram) error {
	float := hasFloatBuckets(h)
	observations := h.GetZeroCount()
	for _, side := range []struct {
		name   string
		spans  []*dto.BucketSpan
		deltas []int64
		counts []float64
	}{
		{"positive", h.PositiveSpan, h.PositiveDelta, h.PositiveCount},
		{"negative", h.NegativeSpan, h.NegativeDelta, h.NegativeCount},
	} {
		length, buckets := uint64(0), len(side.deltas)
		if float {
			buckets = len(side.counts)
		}
		for i, s := range side.spans {
			if i > 0 && s.GetOffset() < 0 {
				return fmt.Errorf("the %s span %d has the offset %d; only the first can be negative", side.name, i+1, s.GetOffset())
			}
			length += uint64(s.GetLength())
		}
		if length != uint64(buckets) {
			return fmt.Errorf("the %s spans need %d buckets, and there are %d", side.name, length, buckets)
		}
		if float {
			for i, count := range side.counts {
				if count < 0 {
					return fmt.Errorf("the %s bucket %d has the count %v, which is negative", side.name, i+1, count)
				}
			}
			continue
		}
		count := int64(0)
		for i, d := range side.deltas {
			if count += d; count < 0 {
				return fmt.Errorf("the %s bucket %d has the count %d, which is negative", side.name, i+1, count)
			}
			observations += uint64(count)
		}
	}
	// Observations of NaN are in no bucket, and float counts don't add up exactly.
	count := h.GetSampleCount()
	if !float && observations != count && !(math.IsNaN(h.GetSampleSum()) && observations < count) {
		return fmt.Errorf("the buckets have %d observations, and the count is %d", observations, count)
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
