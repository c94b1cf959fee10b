package gateway

import (
	"math"
	"slices"

	dto "github.com/prometheus/client_model/go"
	"google.golang.org/protobuf/proto"
)

// nativeHistogram is the native part of a histogram that passed checkHistogram, with
// its counts as floats: exact up to 2^53. The arithmetic is Prometheus's, which has
// sums of native histograms from there.
type nativeHistogram struct {
	schema                   int32
	zeroThreshold, zeroCount float64
	positive, negative       []nativeBucket // populated ones, their indexes ascend
}

// nativeBucket counts the observations whose absolute value is above the bound of the
// index below, and up to the bound of its own, see bucketBound.
type nativeBucket struct {
	index int32
	count float64
}

// nativeOf returns the native part of h.
func nativeOf(h *dto.Histogram) *nativeHistogram {
	n := &nativeHistogram{schema: h.GetSchema(), zeroThreshold: h.GetZeroThreshold()}
	if hasFloatBuckets(h) {
		n.zeroCount = h.GetZeroCountFloat()
		n.positive = nativeBuckets(h.PositiveSpan, h.PositiveCount)
		n.negative = nativeBuckets(h.NegativeSpan, h.NegativeCount)
		return n
	}
	n.zeroCount = float64(h.GetZeroCount())
	n.positive = nativeBuckets(h.PositiveSpan, sums(h.PositiveDelta))
	n.negative = nativeBuckets(h.NegativeSpan, sums(h.NegativeDelta))
	return n
}

// sums undoes deltas.
func sums(deltas []int64) []float64 {
	counts := make([]float64, len(deltas))
	var count int64
	for i, d := range deltas {
		count += d
		counts[i] = float64(count)
	}
	return counts
}

func nativeBuckets(spans []*dto.BucketSpan, counts []float64) []nativeBucket {
	buckets := make([]nativeBucket, 0, len(counts))
	index := int32(0)
	for _, s := range spans {
		index += s.GetOffset()
		length := min(uint64(len(counts)), uint64(s.GetLength()))
		for _, count := range counts[:length] {
			if count != 0 {
				buckets = append(buckets, nativeBucket{index, count})
			}
			index++
		}
		counts = counts[length:]
	}
	return buckets
}

// encodeInto sets the native part of h, with integer or float counts. Integers are
// cut off at what they can hold.
func (n *nativeHistogram) encodeInto(h *dto.Histogram, float bool) {
	positive, positiveCounts := encodeBuckets(n.positive)
	negative, negativeCounts := encodeBuckets(n.negative)
	h.Schema, h.ZeroThreshold = &n.schema, &n.zeroThreshold
	h.PositiveSpan, h.NegativeSpan = positive, negative
	h.ZeroCount, h.ZeroCountFloat = nil, nil
	h.PositiveDelta, h.PositiveCount = nil, nil
	h.NegativeDelta, h.NegativeCount = nil, nil
	if float {
		h.ZeroCountFloat = &n.zeroCount
		h.PositiveCount, h.NegativeCount = positiveCounts, negativeCounts
	} else {
		zero := uint64(math.MaxUint64)
		if n.zeroCount < math.MaxUint64 {
			zero = uint64(n.zeroCount)
		}
		h.ZeroCount = &zero
		h.PositiveDelta, h.NegativeDelta = deltas(positiveCounts), deltas(negativeCounts)
	}
	if !isNative(h) {
		// An empty span tells it from a classic one, see Histogram.positive_span.
		h.PositiveSpan = []*dto.BucketSpan{{Offset: proto.Int32(0), Length: proto.Uint32(0)}}
	}
}

func encodeBuckets(buckets []nativeBucket) ([]*dto.BucketSpan, []float64) {
	var spans []*dto.BucketSpan
	counts := make([]float64, len(buckets))
	next := int32(0) // behind the last bucket
	for i, b := range buckets {
		counts[i] = b.count
		if i == 0 || b.index != next {
			spans = append(spans, &dto.BucketSpan{Offset: proto.Int32(b.index - next), Length: proto.Uint32(0)})
		}
		*spans[len(spans)-1].Length++
		next = b.index + 1
	}
	return spans, counts
}

// deltas returns the counts of integer buckets as differences.
func deltas(counts []float64) []int64 {
	out := make([]int64, len(counts))
	var last int64
	for i, c := range counts {
		count := int64(math.MaxInt64)
		if c < math.MaxInt64 {
			count = int64(c)
		}
		out[i], last = count-last, count
	}
	return out
}

// add adds other, which it uses up, at the lower resolution and the wider zero bucket
// of the two.
func (n *nativeHistogram) add(other *nativeHistogram) {
	// Behind the widening of the zero bucket, what that takes in would count again in a
	// coarse bucket across its border.
	n.reduceTo(other.schema)
	other.reduceTo(n.schema)
	for n.zeroThreshold != other.zeroThreshold {
		if n.zeroThreshold > other.zeroThreshold {
			other.widenZero(n.zeroThreshold)
		} else {
			n.widenZero(other.zeroThreshold)
		}
	}
	n.zeroCount += other.zeroCount
	n.positive = addBuckets(n.positive, other.positive)
	n.negative = addBuckets(n.negative, other.negative)
}

func addBuckets(a, b []nativeBucket) []nativeBucket {
	sum := make([]nativeBucket, 0, len(a)+len(b))
	for len(a) > 0 && len(b) > 0 {
		switch {
		case a[0].index < b[0].index:
			sum, a = append(sum, a[0]), a[1:]
		case b[0].index < a[0].index:
			sum, b = append(sum, b[0]), b[1:]
		default:
			sum = append(sum, nativeBucket{a[0].index, a[0].count + b[0].count})
			a, b = a[1:], b[1:]
		}
	}
	return append(append(sum, a...), b...)
}

// reduceTo lowers the resolution to that of schema, if it is higher.
func (n *nativeHistogram) reduceTo(schema int32) {
	if n.schema <= schema {
		return
	}
	for _, side := range []*[]nativeBucket{&n.positive, &n.negative} {
		reduced := (*side)[:0]
		for _, b := range *side {
			// Each halving has the upper one of two buckets keep its bound.
			b.index = (b.index-1)>>(n.schema-schema) + 1
			if last := len(reduced) - 1; last >= 0 && reduced[last].index == b.index {
				reduced[last].count += b.count
				continue
			}
			reduced = append(reduced, b)
		}
		*side = reduced
	}
	n.schema = schema
}

// widenZero raises the threshold, to the upper bound of the bucket that it falls into
// if there is one, and moves the buckets below to the zero bucket.
func (n *nativeHistogram) widenZero(threshold float64) {
	for _, side := range [][]nativeBucket{n.positive, n.negative} {
		for _, b := range side {
			if upper := bucketBound(b.index, n.schema); upper > threshold {
				// The bounds of both sides are the same ones: no bucket of the other side has
				// this threshold inside.
				if bucketBound(b.index-1, n.schema) < threshold {
					threshold = upper
				}
				break
			}
		}
	}
	n.zeroThreshold = threshold
	n.moveToZero()
}

// moveToZero moves the buckets that end below the zero threshold, or at it, to the
// zero bucket.
func (n *nativeHistogram) moveToZero() {
	for _, side := range []*[]nativeBucket{&n.positive, &n.negative} {
		for len(*side) > 0 && bucketBound((*side)[0].index, n.schema) <= n.zeroThreshold {
			n.zeroCount += (*side)[0].count
			*side = (*side)[1:]
		}
	}
}

// maxNativeBuckets bounds the buckets of a native histogram that is added, and of the
// sum: aggregation must not make them more from push to push.
const maxNativeBuckets = 2048

// limit lowers the resolution until there are at most maxNativeBuckets; the lowest has
// about 270 for all of float64.
func (n *nativeHistogram) limit() {
	for len(n.positive)+len(n.negative) > maxNativeBuckets {
		n.reduceTo(n.schema - 1)
	}
}

// interval is a bucket of a native histogram with its bounds.
type interval struct {
	lower, upper, count float64
	// closedLower and closedUpper tell that the bounds are inside.
	closedLower, closedUpper bool
}

// intervals returns the populated buckets, ascending. None reaches into the zero
// bucket.
func (n *nativeHistogram) intervals() []interval {
	out := make([]interval, 0, len(n.negative)+1+len(n.positive))
	lower := func(b nativeBucket) float64 {
		bound := bucketBound(b.index-1, n.schema)
		if bound > 0 && bound < n.zeroThreshold {
			return n.zeroThreshold
		}
		return bound
	}
	for _, b := range slices.Backward(n.negative) {
		bound := bucketBound(b.index, n.schema) // of an extreme index 0: then Prometheus has both ends open
		out = append(out, interval{lower: -bound, upper: -lower(b), count: b.count, closedLower: bound > 0})
	}
	if n.zeroCount > 0 {
		out = append(out, interval{lower: -n.zeroThreshold, upper: n.zeroThreshold, count: n.zeroCount, closedLower: true, closedUpper: true})
	}
	for _, b := range n.positive {
		bound := bucketBound(b.index, n.schema)
		out = append(out, interval{lower: lower(b), upper: bound, count: b.count, closedUpper: bound > 0})
	}
	return out
}

// bucketBound returns the upper bound of the bucket with the index: 2^(index/2^schema),
// but for the last bucket of finite values, which ends at math.MaxFloat64.
func bucketBound(index, schema int32) float64 {
	// As an index of the highest resolution, which has all bounds of the others.
	i := int64(index) << (maxNativeSchema - schema)
	fraction, exponent := nativeBounds[i&(1<<maxNativeSchema-1)], i>>maxNativeSchema
	if fraction == 1 && exponent == 1024 {
		return math.MaxFloat64
	}
	return math.Ldexp(fraction, int(exponent))
}

// nativeBounds are the bounds from 1 to 2 at the highest resolution. Not all are the
// float64 next to 2^(i/256), but they are those that Prometheus and its clients count
// by.
var nativeBounds = [1 << maxNativeSchema]float64{
	1, 1.0027112750502025, 1.0054299011128027, 1.0081558981184175, 1.0108892860517005, 1.0136300849514894,
	1.0163783149109529, 1.019133996077738, 1.0218971486541166, 1.0246677928971357, 1.0274459491187635, 1.030231637686041,
	1.0330248790212284, 1.0358256936019572, 1.0386341019613787, 1.041450124688316, 1.0442737824274138, 1.0471050958792898,
	1.049944085800687, 1.052790773004626, 1.0556451783605572, 1.0585073227945128, 1.0613772272892619, 1.0642549128844643,
	1.0671404006768235, 1.0700337118202417, 1.0729348675259753, 1.0758438890627908, 1.0787607977571196, 1.081685614993215,
	1.084618362213309, 1.0875590609177694, 1.0905077326652577, 1.0934643990728858, 1.0964290818163767, 1.099401802630222,
	1.102382583307841, 1.1053714457017412, 1.1083684117236785, 1.1113735033448175, 1.1143867425958924, 1.117408151567369,
	1.1204377524096065, 1.1234755673330197, 1.1265216186082418, 1.129575928566288, 1.132638519598719, 1.1357094141578052,
	1.1387886347566916, 1.1418762039695616, 1.144972144431804, 1.1480764788401787, 1.1511892299529827, 1.1543104205902162,
	1.157440073633751, 1.1605782120274986, 1.1637248587775775, 1.1668800369524817, 1.17004376968325, 1.173216080163637,
	1.1763969916502812, 1.1795865274628758, 1.1827847109843408, 1.1859915656609936, 1.189207115002721, 1.1924313825831512,
	1.1956643920398273, 1.1989061670743806, 1.202156731452703, 1.2054161090051239, 1.2086843236265814, 1.211961399276801,
	1.2152473599804687, 1.2185422298274082, 1.2218460329727572, 1.225158793637145, 1.2284805361068698, 1.2318112847340759,
	1.235151063936933, 1.2384998981998163, 1.241857812073484, 1.245224830175258, 1.2486009771892046, 1.2519862778663162,
	1.255380757024691, 1.2587844395497165, 1.2621973503942505, 1.2656195145788063, 1.2690509571917332, 1.2724917033894028,
	1.275941778396392, 1.279401207505669, 1.2828700160787783, 1.2863482295460256, 1.2898358734066657, 1.2933329732290895,
	1.2968395546510096, 1.3003556433796506, 1.3038812651919358, 1.307416445934677, 1.3109612115247644, 1.3145155879493549,
	1.318079601266064, 1.3216532776031575, 1.325236643159741, 1.3288297242059544, 1.332432547083161, 1.3360451382041454,
	1.339667524053303, 1.3432997311868353, 1.3469417862329456, 1.3505937158920343, 1.3542555469368927, 1.357927306212901,
	1.3616090206382245, 1.3653007172040117, 1.3690024229745905, 1.3727141650876684, 1.37643597075453, 1.380167867260238,
	1.3839098819638318, 1.387662042298529, 1.3914243757719258, 1.3951969099661998, 1.398979672538311, 1.4027726912202045,
	1.4065759938190152, 1.4103896082172704, 1.414213562373095, 1.4180478843204152, 1.4218926021691654, 1.4257477441054942,
	1.4296133383919698, 1.4334894133677887, 1.437375997448982, 1.4412731191286252, 1.4451808069770464, 1.4490990896420348,
	1.4530279958490522, 1.4569675544014435, 1.4609177941806468, 1.4648787441464057, 1.4688504333369816, 1.4728328908693673,
	1.4768261459394991, 1.4808302278224716, 1.4848451658727522, 1.4888709895243968, 1.4929077282912646, 1.4969554117672352,
	1.5010140696264251, 1.5050837316234063, 1.5091644275934224, 1.5132561874526096, 1.5173590411982143, 1.5214730189088141,
	1.525598150744538, 1.5297344669472868, 1.5338819978409555, 1.5380407738316564, 1.5422108254079407, 1.5463921831410214,
	1.5505848776849998, 1.5547889397770884, 1.559004400237837, 1.5632312899713576, 1.5674696399655528, 1.5717194812923414,
	1.5759808451078863, 1.5802537626528244, 1.5845382652524933, 1.5888343843171635, 1.5931421513422668, 1.597461597908627,
	1.601792755682693, 1.6061356564167706, 1.610490331949254, 1.6148568142048605, 1.6192351351948633, 1.6236253270173284,
	1.6280274218573476, 1.632441451987275, 1.6368674497669642, 1.641305447644006, 1.6457554781539645, 1.6502175739206175,
	1.6546917676561939, 1.6591780921616157, 1.6636765803267362, 1.6681872651305822, 1.6727101796415962, 1.6772453570178782,
	1.6817928305074288, 1.6863526334483931, 1.6909247992693046, 1.6955093614893322, 1.7001063537185233, 1.704715809658051,
	1.7093377631004625, 1.7139722479299258, 1.7186192981224775, 1.7232789477462735, 1.727951230961837, 1.7326361820223106,
	1.7373338352737058, 1.742044225155156, 1.7467673861991684, 1.7515033530318778, 1.756252160373299, 1.7610138430375835,
	1.7657884359332723, 1.7705759740635543, 1.7753764925265207, 1.780190026515424, 1.7850166113189343, 1.7898562823214004,
	1.7947090750031065, 1.7995750249405345, 1.804454167806623, 1.809346539371031, 1.8142521755003982, 1.819171112158608,
	1.8241033854070525, 1.8290490314048966, 1.8340080864093422, 1.8389805867758935, 1.8439665689586255, 1.8489660695104506,
	1.8539791250833852, 1.85900577242882, 1.8640460483977885, 1.8690999899412382, 1.8741676341102995, 1.87924901805656,
	1.8843441790323339, 1.8894531543909385, 1.8945759815869654, 1.899712698176555, 1.9048633418176737, 1.9100279502703894,
	1.915206561397147, 1.9203992131630472, 1.9256059436361244, 1.9308267909876267, 1.9360617934922941, 1.9413109895286402,
	1.9465744175792328, 1.9518521162309779, 1.9571441241753997, 1.9624504802089269, 1.967771223233175, 1.9731063922552337,
	1.9784560263879505, 1.983820164850219, 1.9891988469672657, 1.9945921121709396,
}
