package textfile

import (
	"encoding/binary"
	"fmt"
	"iter"
	"maps"
	"slices"
	"sort"
	"strings"
	"time"

	dto "github.com/prometheus/client_model/go"
	"google.golang.org/protobuf/proto"

	"github.com/culvert-io/culvert/gateway"
)

// The collector's own families. Nobody else may have one of these names. Those that
// start with node_ are node_exporter's, for the alerts that are there.
const (
	errorsName   = "culvert_client_textfile_errors"
	droppedName  = "culvert_client_textfile_dropped_series"
	durationName = "node_scrape_collector_duration_seconds"
	successName  = "node_scrape_collector_success"
	mtimeName    = "node_textfile_mtime_seconds"
	errorName    = "node_textfile_scrape_error"
)

var ownNames = []string{errorsName, droppedName, durationName, successName, mtimeName, errorName}

// Snapshot is what one Collect found. It holds little but where the series are stored.
type Snapshot struct {
	// Dropped is how many series of the other sources are left out because they have a
	// name that is the collector's own.
	Dropped int

	collector *Collector
	files     []*file
	others    []*dto.MetricFamily       // of other sources, and the collector's own; sorted by name
	clashes   map[string]map[int]string // see findClashes
	drops     dropList
}

// merged is a family of all sources.
type merged struct {
	meta
	other    []*dto.Metric // of other sources; they come first
	fixed    bool          // HELP is that of another source
	parts    []*cursor
	series   int    // of the parts, with those that are dropped
	drop     bitmap // the series of the parts that somebody has already
	conflict bool   // two files have different HELP
}

// bitmap tells something of series by their number; those behind its end have it not.
type bitmap []byte

func (b bitmap) has(i int) bool { return i/8 < len(b) && b[i/8]&(1<<(i%8)) != 0 }

// count returns how many of n from i on have it.
func (b bitmap) count(i, n int) (count int) {
	for end := i + n; i < end && i/8 < len(b); i++ {
		if b.has(i) {
			count++
		}
	}
	return count
}

// walk calls visit for each name that the files or the other sources have, sorted, with
// what is served of it, until visit returns false. The first of a name settles what it
// is. With found it looks for series that come twice, notes them in s.drops, and tells
// what it leaves out; without, it goes by the notes.
func (s *Snapshot) walk(found *problems, visit func(m *merged) bool) {
	w := newWalker(s.collector, s.files)
	drops := dropReader{list: &s.drops}
	otherKind := func(name string) (dto.MetricType, bool) {
		i, has := searchFamily(s.others, name)
		if !has || slices.Contains(ownNames, name) {
			return 0, false
		}
		return s.others[i].GetType(), true
	}
	others := s.others
	for number := 0; ; number++ {
		parts := w.next()
		for len(others) > 0 && (len(parts) == 0 || others[0].GetName() < string(parts[0].name)) {
			if m := mergedOther(others[0]); !visit(m) {
				return
			}
			others = others[1:]
		}
		if len(parts) == 0 {
			return
		}
		name := string(parts[0].name)
		own := slices.Contains(ownNames, name)
		var m *merged
		if len(others) > 0 && others[0].GetName() == name && !own {
			m = mergedOther(others[0])
			others = others[1:]
		}
		for _, p := range parts {
			if p.duplicates > 0 && found != nil {
				found.add(p.file.path, ReasonDuplicate, p.duplicates, "%s: metric %q: %d of its series stand in the file twice; the first counts", p.file.path, name, p.duplicates)
			}
			reason := ""
			if m != nil {
				reason = m.accept(p)
			} else if owner := s.clashes[name][p.index]; owner != "" {
				reason = "the name clashes with the samples of " + owner
			} else if owner, clash := collides(name, p.kind, otherKind); clash {
				reason = "the name clashes with the samples of " + owner
			} else if own {
				reason = "the name is the collector's own"
			} else {
				m = &merged{meta: meta{name, string(p.help), string(p.unit), p.kind}}
			}
			if reason == "" {
				m.parts = append(m.parts, p)
				m.series += p.series
			} else if found != nil {
				found.add(p.file.path, ReasonConflict, p.series, "%s: metric %q: %s", p.file.path, name, reason)
			}
		}
		if m == nil {
			continue
		}
		if found == nil {
			m.drop = drops.of(number)
		} else if m.findDuplicates(w, found); m.drop != nil {
			s.drops.add(s.collector, number, m.drop)
		}
		if m.help == "" && m.other == nil && found == nil {
			paths := make([]string, len(m.parts))
			for i, p := range m.parts {
				paths[i] = p.file.path
			}
			m.help = "Metric read from " + strings.Join(paths, ", ")
		}
		if !visit(m) {
			return
		}
	}
}

func mergedOther(f *dto.MetricFamily) *merged {
	return &merged{meta: meta{f.GetName(), f.GetHelp(), f.GetUnit(), f.GetType()}, other: f.Metric, fixed: f.GetHelp() != ""}
}

func searchFamily(sorted []*dto.MetricFamily, name string) (int, bool) {
	return slices.BinarySearchFunc(sorted, name, func(f *dto.MetricFamily, name string) int { return strings.Compare(f.GetName(), name) })
}

// accept takes over what a file says of the family. It returns the reason why the
// file's series can't be part of it.
func (m *merged) accept(of *cursor) (reason string) {
	first := "another source"
	if len(m.parts) > 0 {
		first = m.parts[0].file.path
	}
	const most = 100
	switch {
	case of.kind != m.kind:
		return fmt.Sprintf("its TYPE is %s here, and %s in %s", kindName(of.kind), kindName(m.kind), first)
	case m.conflict:
		return "other files have different HELP texts for it; use one text in all files"
	case len(of.help) > 0 && m.help != "" && string(of.help) != m.help && !m.fixed:
		m.conflict = true
		return fmt.Sprintf("the HELP text is %.*q, but %.*q in another file (%s is the first one); use one text in all files", most, of.help, most, m.help, first)
	}
	if m.help == "" {
		m.help = string(of.help)
	}
	if m.unit == "" {
		m.unit = string(of.unit)
	}
	return ""
}

func kindName(kind dto.MetricType) string { return strings.ToLower(kind.String()) }

// suffixes are those of the samples of summaries and histograms.
var suffixes = []string{"_count", "_sum", "_bucket"}

// hasSuffix reports whether families of a kind have samples with the suffix.
func hasSuffix(kind dto.MetricType, suffix string) bool {
	switch kind {
	case dto.MetricType_SUMMARY:
		return suffix != "_bucket"
	case dto.MetricType_HISTOGRAM, dto.MetricType_GAUGE_HISTOGRAM:
		return true
	}
	return false
}

// collides reports whether a new family and one that is there would have samples of one
// name: those of a histogram or summary have suffixes.
func collides(name string, kind dto.MetricType, kindOf func(string) (dto.MetricType, bool)) (owner string, clash bool) {
	for _, suffix := range suffixes {
		if base, ok := strings.CutSuffix(name, suffix); ok {
			if other, known := kindOf(base); known && hasSuffix(other, suffix) {
				return fmt.Sprintf("the %s %q", kindName(other), base), true
			}
		}
		if hasSuffix(kind, suffix) {
			if other, known := kindOf(name + suffix); known {
				return fmt.Sprintf("the %s %q", kindName(other), name+suffix), true
			}
		}
	}
	return "", false
}

// findClashes returns, by name and the file's number, who has the samples of families
// that are left out because of their name. Which of two families that is depends on the
// order of the files, not on that of the names: so it has to be known ahead of the walk.
func (s *Snapshot) findClashes() map[string]map[int]string {
	var bases, suffixed bool
	for _, f := range s.files {
		bases, suffixed = bases || f.bases, suffixed || f.suffixed
	}
	if !bases || !suffixed {
		return nil
	}
	type entry struct {
		file int
		name string
		kind dto.MetricType
	}
	// The names that start with a base's follow it: so of bases only those are kept that
	// the name at hand starts with.
	var open [][]entry
	candidates := map[string][]entry{}
	w := newWalker(s.collector, s.files)
	for parts := w.next(); len(parts) > 0; parts = w.next() {
		name := string(parts[0].name)
		for len(open) > 0 && !strings.HasPrefix(name, open[len(open)-1][0].name) {
			open = open[:len(open)-1]
		}
		var entries []entry
		base := false
		for _, p := range parts {
			base = base || hasSuffix(p.kind, "_sum")
		}
		suffixed := slices.ContainsFunc(suffixes, func(suffix string) bool { return strings.HasSuffix(name, suffix) })
		if !base && (!suffixed || len(open) == 0) {
			continue
		}
		for _, p := range parts {
			entries = append(entries, entry{p.index, name, p.kind})
		}
		for _, suffix := range suffixes {
			for _, of := range open {
				if of[0].name+suffix == name {
					candidates[of[0].name], candidates[name] = of, entries
				}
			}
		}
		if base {
			open = append(open, entries)
		}
	}
	clashes := map[string]map[int]string{}
	families := map[string]dto.MetricType{}
	kindOf := func(name string) (dto.MetricType, bool) {
		if i, has := searchFamily(s.others, name); has {
			return s.others[i].GetType(), true
		}
		kind, known := families[name]
		return kind, known
	}
	all := slices.Concat(slices.Collect(maps.Values(candidates))...)
	sort.Slice(all, func(i, j int) bool {
		return all[i].file < all[j].file || all[i].file == all[j].file && all[i].name < all[j].name
	})
	for _, e := range all {
		if _, known := kindOf(e.name); known {
			continue
		}
		if owner, clash := collides(e.name, e.kind, kindOf); !clash {
			families[e.name] = e.kind
		} else if clashes[e.name] == nil {
			clashes[e.name] = map[int]string{e.file: owner}
		} else {
			clashes[e.name][e.file] = owner
		}
	}
	return clashes
}

// maxHashes is about how many series of a family are compared at a time. Those of larger
// ones are compared in several goes, each of which takes the series whose hashes are in
// a part of all there are.
const maxHashes = 32 << 10

// findDuplicates notes which series of the parts somebody has already.
func (m *merged) findDuplicates(w *walker, found *problems) {
	if len(m.parts) == 0 || len(m.parts) == 1 && len(m.other) == 0 {
		return
	}
	dropped := make([]int, len(m.parts))
	total := m.series + len(m.other)
	goes, shift := uint64(1), 64
	for total>>(64-shift) > maxHashes {
		goes, shift = goes*2, shift-1
	}
	for turn := range goes {
		// hashes yields those of this go: of a part and with the number of the series, or
		// of other sources.
		hashes := func(yield func(part, number int, hash int64)) {
			for _, metric := range m.other {
				if h := hashSeries(metric.Label); h>>shift == turn {
					yield(-1, -1, int64(h))
				}
			}
			first := 0
			for i, p := range m.parts {
				stored := p.view(p.hashes, 8*p.series, &w.scratch)
				for at := 0; at < len(stored); at += 8 {
					if h := binary.LittleEndian.Uint64(stored[at:]); h>>shift == turn {
						yield(i, first+at/8, int64(h))
					}
				}
				first += p.series
			}
		}
		w.hashes = w.hashes[:0]
		hashes(func(_, _ int, h int64) { w.hashes = append(w.hashes, h) })
		slices.Sort(w.hashes)
		doubles := w.hashes[:0]
		for i, h := range w.hashes[:max(len(w.hashes)-1, 0)] {
			if h == w.hashes[i+1] && (len(doubles) == 0 || doubles[len(doubles)-1] != h) {
				doubles = append(doubles, h)
			}
		}
		if len(doubles) == 0 {
			continue
		}
		taken := make([]bool, len(doubles)) // by those that have come
		hashes(func(part, number int, h int64) {
			i, double := slices.BinarySearch(doubles, h)
			if double && taken[i] && part >= 0 {
				if m.drop == nil {
					m.drop = make(bitmap, (m.series+7)/8)
				}
				m.drop[number/8] |= 1 << (number % 8)
				dropped[part]++
			} else if double {
				taken[i] = true
			}
		})
	}
	for i, n := range dropped {
		if n > 0 {
			path := m.parts[i].file.path
			found.add(path, ReasonDuplicate, n, "%s: metric %q: another file or source in front has %d of its series", path, m.name, n)
		}
	}
}

// fileTime is when a file was modified.
type fileTime struct {
	path string
	at   time.Time
}

// addOwn adds the collector's own families.
func (s *Snapshot) addOwn(found *problems, times []fileTime, took time.Duration) {
	gauge := func(value float64, labels ...string) *dto.Metric {
		m := &dto.Metric{Gauge: &dto.Gauge{Value: &value}}
		for i := 0; i < len(labels); i += 2 {
			// A path may be any bytes.
			m.Label = append(m.Label, &dto.LabelPair{Name: &labels[i], Value: proto.String(strings.ToValidUTF8(labels[i+1], "\uFFFD"))})
		}
		return m
	}
	add := func(name, help string, series ...*dto.Metric) {
		if len(series) == 0 {
			return
		}
		gateway.SortSeries(series)
		series = slices.CompactFunc(series, func(a, b *dto.Metric) bool { return gateway.CompareSeries(a, b) == 0 })
		i, _ := searchFamily(s.others, name)
		s.others = slices.Insert(s.others, i, &dto.MetricFamily{Name: &name, Help: &help, Type: dto.MetricType_GAUGE.Enum(), Metric: series})
	}
	var failed, dropped, modified []*dto.Metric
	anything := 0.0
	for _, p := range found.list {
		anything = 1
		failed = append(failed, gauge(1, "file", p.path, "reason", string(p.reason)))
		if p.series > 0 {
			dropped = append(dropped, gauge(float64(p.series), "file", p.path, "reason", string(p.reason)))
		}
	}
	for _, t := range times {
		modified = append(modified, gauge(float64(t.at.Unix())+float64(t.at.Nanosecond())/1e9, "file", t.path))
	}
	add(errorsName, "1 for each textfile or directory of which something is left out, by reason: parse, timestamp, label, permission, too_old, too_large, io, changed for all of it, conflict and duplicate for some of its series. The log says more.", failed...)
	add(droppedName, "Series of a textfile that are left out, by reason: conflict where their family has another TYPE or HELP elsewhere, duplicate where the same series is there already.", dropped...)
	add(durationName, "Time that reading the textfiles took, by collector, which is textfile.", gauge(took.Seconds(), "collector", "textfile"))
	add(successName, "1, by collector, which is textfile: bad files are told by node_textfile_scrape_error.", gauge(1, "collector", "textfile"))
	add(mtimeName, "Unix time of the last modification of a textfile that was read, or is too old.", modified...)
	add(errorName, "1 if anything of the textfiles is left out, else 0. culvert_client_textfile_errors tells what.", gauge(anything))
}

// Families yields all families, the others of Collect included, sorted by name. The
// messages must not be changed, and are good until the next one comes. A family with many
// series comes in pieces, which have the same name and follow each other.
func (s *Snapshot) Families() iter.Seq[*dto.MetricFamily] {
	return func(yield func(*dto.MetricFamily) bool) {
		var d seriesDecoder
		s.families(&d, func(f *dto.MetricFamily) bool {
			more := yield(f)
			d.release()
			return more
		})
	}
}

// Gather returns the families as a list, each name once.
func (s *Snapshot) Gather() (families []*dto.MetricFamily) {
	s.families(new(seriesDecoder), func(f *dto.MetricFamily) bool {
		if n := len(families); n > 0 && families[n-1].GetName() == f.GetName() {
			families[n-1].Metric = append(families[n-1].Metric, f.Metric...)
		} else {
			f.Metric = slices.Clip(f.Metric) // what is behind may be another's
			families = append(families, f)
		}
		return true
	})
	return families
}

// families calls yield for all families until it returns false. d makes the series.
func (s *Snapshot) families(d *seriesDecoder, yield func(*dto.MetricFamily) bool) {
	var scratch []byte
	s.walk(nil, func(m *merged) bool {
		if m.series+len(m.other) > maxSorted {
			if len(m.other) > 0 && !yield(m.family(m.other)) {
				return false
			}
			first := 0
			for _, p := range m.parts {
				for metrics := range p.read(d, m.drop, first, &scratch) {
					if len(metrics) > 0 && !yield(m.family(metrics)) {
						return false
					}
				}
				first += p.series
			}
			return true
		}
		metrics := slices.Clip(m.other)
		first := 0
		for _, p := range m.parts {
			for more := range p.read(d, m.drop, first, &scratch) {
				metrics = append(metrics, more...)
			}
			first += p.series
		}
		if len(m.parts) > 1 || len(m.parts) > 0 && len(m.other) > 0 {
			gateway.SortSeries(metrics)
		}
		return len(metrics) == 0 || yield(m.family(metrics))
	})
}

// family returns a message with the given series.
func (m *merged) family(series []*dto.Metric) *dto.MetricFamily {
	f := &dto.MetricFamily{Name: &m.name, Type: &m.kind, Metric: series}
	if m.help != "" {
		f.Help = &m.help
	}
	if m.unit != "" {
		f.Unit = &m.unit
	}
	return f
}

// Merge puts the families of several sources together, sorted by name and each name
// once, as Collect takes them. The first source that has a name settles its TYPE and,
// unless it has none, its HELP. Of series that several have, the first stays. dropped counts
// those left out: they are there already, or their family has another TYPE or a name
// that is taken. The sources' messages are not changed.
func Merge(sources ...[]*dto.MetricFamily) (families []*dto.MetricFamily, dropped int) {
	byName := map[string]*dto.MetricFamily{}
	kindOf := func(name string) (dto.MetricType, bool) { f := byName[name]; return f.GetType(), f != nil }
	seen := map[string]map[uint64]bool{} // of families that several sources have
	for _, source := range sources {
		for _, f := range source {
			name := f.GetName()
			known := byName[name]
			if known == nil {
				if _, clash := collides(name, f.GetType(), kindOf); clash {
					dropped += len(f.Metric)
				} else {
					byName[name] = &dto.MetricFamily{Name: f.Name, Help: f.Help, Type: f.Type, Unit: f.Unit, Metric: slices.Clip(f.Metric)}
				}
				continue
			}
			if f.GetType() != known.GetType() {
				dropped += len(f.Metric)
				continue
			}
			if known.GetHelp() == "" {
				known.Help = f.Help
			}
			if seen[name] == nil {
				seen[name] = map[uint64]bool{}
				for _, m := range known.Metric {
					seen[name][hashSeries(m.Label)] = true
				}
			}
			for _, m := range f.Metric {
				if h := hashSeries(m.Label); seen[name][h] {
					dropped++
				} else {
					seen[name][h] = true
					known.Metric = append(known.Metric, m)
				}
			}
		}
	}
	families = slices.SortedFunc(maps.Values(byName), func(a, b *dto.MetricFamily) int { return strings.Compare(a.GetName(), b.GetName()) })
	for name := range seen {
		metrics := slices.Clone(byName[name].Metric)
		gateway.SortSeries(metrics)
		byName[name].Metric = metrics
	}
	return families, dropped
}
