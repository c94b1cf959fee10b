package gateway

import (
	"slices"
	"testing"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/prometheus/model/histogram"
	"google.golang.org/protobuf/proto"
)

// TestBucketBounds compares the bounds of all buckets with Prometheus's.
func TestBucketBounds(t *testing.T) {
	for schema := int32(minNativeSchema); schema <= maxNativeSchema; schema++ {
		first, last := bucketRange(schema)
		fh := &histogram.FloatHistogram{
			Schema:        schema,
			PositiveSpans: []histogram.Span{{Offset: int32(first), Length: uint32(last - first + 1)}}, PositiveBuckets: make([]float64, last-first+1),
		}
		for it := fh.PositiveBucketIterator(); it.Next(); {
			b := it.At()
			if lower, upper := bucketBound(b.Index-1, schema), bucketBound(b.Index, schema); lower != b.Lower || upper != b.Upper {
				t.Fatalf("schema %d: the bucket %d is from %v to %v, want from %v to %v", schema, b.Index, lower, upper, b.Lower, b.Upper)
			}
		}
	}
}

// FuzzNative compares with Prometheus which native histograms are valid, their
// buckets, and the sum of two.
func FuzzNative(f *testing.F) {
	f.Add(false, []byte("\x07\x00\x00\x00\x38\x81\x01"), []byte("\x07\x00\x00\x00\x38\x7f\x01"))
	f.Add(true, []byte("\x02\x05\x03\x02\xc0\x04\x01\x02"), []byte("\x04\x01\xfe\x01\xe0\x02\x01\x01\x01\x60\x01\x01\x00\x03"))
	f.Add(false, []byte("\x04\x03\xff\x01\xe0\xff\x02\x03\x04\x60\xfe\x01\x02\x03"), []byte("\x06\x03\x00\x01\xe0\xfe\x02\x03\x04\x60\xfd\x01\x02\x03\x40\x01\x02\x03"))
	f.Fuzz(func(t *testing.T, float bool, a, b []byte) {
		if len(a)+len(b) > maxNativeBuckets {
			return // which the sum might have more of
		}
		var sides [2]*dto.Histogram
		for i, data := range [][]byte{a, b} {
			h := nativeOfBytes(data).Metric[0].Histogram
			if float {
				// Halves are exact too.
				h.SampleCountFloat, h.ZeroCountFloat = proto.Float64(float64(h.GetSampleCount())/2), proto.Float64(float64(h.GetZeroCount())/2)
				h.PositiveCount, h.NegativeCount = sums(h.PositiveDelta), sums(h.NegativeDelta)
				for _, counts := range [][]float64{h.PositiveCount, h.NegativeCount} {
					for i := range counts {
						counts[i] /= 2
					}
				}
				h.SampleCount, h.ZeroCount, h.PositiveDelta, h.NegativeDelta = nil, nil, nil, nil
			}
			// A byte more or less in the middle makes some of them invalid.
			if len(data) > 20 && data[20] == 0 {
				h.PositiveDelta = append(h.PositiveDelta, -int64(data[19]))
				h.NegativeCount = append(h.NegativeCount, float64(data[19])-100)
			}
			err := checkHistogram(h)
			if err == nil || checkNativeCounts(h) != nil {
				integer, fh := prometheusNative(h)
				want := fh.Validate()
				if integer != nil {
					want = integer.Validate()
				}
				if (want == nil) != (checkNativeCounts(h) == nil) {
					t.Fatalf("got %v, Prometheus says %v, of\n%v", checkNativeCounts(h), want, h)
				}
			}
			if err != nil {
				return
			}
			sides[i] = h
			_, fh := prometheusNative(h)
			var want []interval
			for it := fh.AllBucketIterator(); it.Next(); {
				if b := it.At(); b.Count != 0 {
					want = append(want, interval{b.Lower, b.Upper, b.Count, b.LowerInclusive, b.UpperInclusive})
				}
			}
			if got := nativeOf(h).intervals(); !slices.Equal(got, want) {
				t.Fatalf("got the buckets\n%v\nwant\n%v\nof\n%v", got, want, h)
			}
		}

		want := prometheusSum(t, sides[0], sides[1])
		got := proto.Clone(sides[1]).(*dto.Histogram)
		mergeNative(sides[0], got, float)
		_, sum := prometheusNative(got)
		sum.Compact(0) // an empty span
		for _, h := range []*histogram.FloatHistogram{sum, want} {
			h.Count, h.Sum = 0, 0 // of which mergeHistogram takes care
		}
		if !sum.Equals(want) {
			t.Fatalf("got the sum\n%v\nwant\n%v\nof\n%v\nand\n%v", sum, want, sides[0], sides[1])
		}
	})
}

// prometheusNative returns the native part of h as Prometheus has it: what it is, nil
// if it has float counts, and with float counts.
func prometheusNative(h *dto.Histogram) (*histogram.Histogram, *histogram.FloatHistogram) {
	spans := func(in []*dto.BucketSpan) (out []histogram.Span) {
		for _, s := range in {
			out = append(out, histogram.Span{Offset: s.GetOffset(), Length: s.GetLength()})
		}
		return out
	}
	if hasFloatBuckets(h) {
		return nil, &histogram.FloatHistogram{
			Schema: h.GetSchema(), ZeroThreshold: h.GetZeroThreshold(), ZeroCount: h.GetZeroCountFloat(),
			Count: h.GetSampleCountFloat(), Sum: h.GetSampleSum(),
			PositiveSpans: spans(h.PositiveSpan), NegativeSpans: spans(h.NegativeSpan),
			PositiveBuckets: slices.Clone(h.PositiveCount), NegativeBuckets: slices.Clone(h.NegativeCount),
		}
	}
	integer := &histogram.Histogram{
		Schema: h.GetSchema(), ZeroThreshold: h.GetZeroThreshold(), ZeroCount: h.GetZeroCount(),
		Count: h.GetSampleCount(), Sum: h.GetSampleSum(),
		PositiveSpans: spans(h.PositiveSpan), NegativeSpans: spans(h.NegativeSpan),
		PositiveBuckets: h.PositiveDelta, NegativeBuckets: h.NegativeDelta,
	}
	return integer, integer.ToFloat(nil)
}

// prometheusSum adds with Prometheus's arithmetic.
func prometheusSum(t *testing.T, a, b *dto.Histogram) *histogram.FloatHistogram {
	var sides [2]*histogram.FloatHistogram
	for i, h := range []*dto.Histogram{a, b} {
		_, fh := prometheusNative(h)
		// Add would lose what lies inside the zero bucket.
		for it, i := fh.PositiveBucketIterator(), 0; it.Next() && it.At().Upper <= fh.ZeroThreshold; i++ {
			fh.ZeroCount += fh.PositiveBuckets[i]
			fh.PositiveBuckets[i] = 0
		}
		for it, i := fh.NegativeBucketIterator(), 0; it.Next() && it.At().Lower >= -fh.ZeroThreshold; i++ {
			fh.ZeroCount += fh.NegativeBuckets[i]
			fh.NegativeBuckets[i] = 0
		}
		// It panics on empty spans.
		sides[i] = fh.Compact(0)
	}
	// Left to Add, it would come behind the widening of the zero bucket.
	for _, fh := range sides {
		if schema := min(sides[0].Schema, sides[1].Schema); fh.Schema > schema {
			if err := fh.ReduceResolution(schema); err != nil {
				t.Fatal(err)
			}
		}
	}
	sum, _, _, err := sides[0].Add(sides[1])
	if err != nil {
		t.Fatal(err)
	}
	return sum.Compact(0)
}
