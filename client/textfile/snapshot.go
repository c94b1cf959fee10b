package textfile

import (
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"
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

// Snapshot is what one Collect found. It holds the index, and series of small files
// only.
type Snapshot struct {
	// Dropped is how many series of the other sources are left out because they have a
	// name that is the collector's own.
	Dropped int

	collector *Collector
	families  []*merged // sorted by name
}

// merged is a family of all sources.
type merged struct {
	meta
	other    []*dto.Metric // of other sources; they come first
	fixed    bool          // HELP is that of another source
	parts    []part
	series   int
	conflict bool // two files have different HELP
}

// part is what one file has of a family.
type part struct {
	file   *file
	family *family
	drop   map[uint64]bool // hashes of series that somebody has already
}

// merge puts the families together. The first of a name settles what it is.
func (s *Snapshot) merge(files []*file, others []*dto.MetricFamily, found *problems) {
	families := map[string]*merged{}
	kindOf := func(name string) (dto.MetricType, bool) {
		if m := families[name]; m != nil {
			return m.kind, true
		}
		return 0, false
	}
	for _, f := range others {
		if slices.Contains(ownNames, f.GetName()) {
			s.Dropped += len(f.Metric)
			continue
		}
		families[f.GetName()] = &merged{meta: meta{f.GetName(), f.GetHelp(), f.GetUnit(), f.GetType()}, other: f.Metric, fixed: f.GetHelp() != "", series: len(f.Metric)}
	}
	for _, file := range files {
		for i := range file.families {
			f := &file.families[i]
			name := f.meta.Value().name
			if f.duplicates > 0 {
				found.add(file.path, ReasonDuplicate, f.duplicates, fmt.Sprintf("%s: metric %q: %d of its series stand in the file twice; the first counts", file.path, name, f.duplicates))
			}
			m, reason := families[name], ""
			if m == nil {
				m = &merged{meta: f.meta.Value()}
				if owner, clash := collides(name, m.kind, kindOf); clash {
					reason = fmt.Sprintf("the name clashes with the samples of %s", owner)
				} else if slices.Contains(ownNames, name) {
					reason = "the name is the collector's own"
				} else {
					families[name] = m
				}
			} else {
				reason = m.accept(f.meta.Value())
			}
			if reason != "" {
				found.add(file.path, ReasonConflict, len(f.series), fmt.Sprintf("%s: metric %q: %s", file.path, name, reason))
				continue
			}
			m.parts = append(m.parts, part{file: file, family: f})
			m.series += len(f.series)
		}
	}
	s.families = slices.SortedFunc(maps.Values(families), func(a, b *merged) int { return strings.Compare(a.name, b.name) })
	var hashes []uint64
	for _, m := range s.families {
		hashes = m.dropDuplicates(hashes, found)
		if m.help == "" && m.other == nil {
			paths := make([]string, len(m.parts))
			for i, p := range m.parts {
				paths[i] = p.file.path
			}
			m.help = "Metric read from " + strings.Join(paths, ", ")
		}
	}
}

// accept takes over what a file says of the family. It returns the reason why the
// file's series can't be part of it.
func (m *merged) accept(of meta) (reason string) {
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
	case of.help != "" && m.help != "" && of.help != m.help && !m.fixed:
		m.conflict = true
		return fmt.Sprintf("the HELP text is %.*q, but %.*q in another file (%s is the first one); use one text in all files", most, of.help, most, m.help, first)
	}
	if m.help == "" {
		m.help = of.help
	}
	if m.unit == "" {
		m.unit = of.unit
	}
	return ""
}

func kindName(kind dto.MetricType) string { return strings.ToLower(kind.String()) }

// collides reports whether a new family and one that is there would have samples of one
// name: those of a histogram or summary have suffixes.
func collides(name string, kind dto.MetricType, kindOf func(string) (dto.MetricType, bool)) (owner string, clash bool) {
	has := func(kind dto.MetricType, suffix string) bool {
		switch kind {
		case dto.MetricType_SUMMARY:
			return suffix != "_bucket"
		case dto.MetricType_HISTOGRAM, dto.MetricType_GAUGE_HISTOGRAM:
			return true
		}
		return false
	}
	for _, suffix := range []string{"_count", "_sum", "_bucket"} {
		if base, ok := strings.CutSuffix(name, suffix); ok {
			if other, known := kindOf(base); known && has(other, suffix) {
				return fmt.Sprintf("the %s %q", kindName(other), base), true
			}
		}
		if has(kind, suffix) {
			if other, known := kindOf(name + suffix); known {
				return fmt.Sprintf("the %s %q", kindName(other), name+suffix), true
			}
		}
	}
	return "", false
}

// dropDuplicates notes which series of the parts somebody has already. It returns its
// working memory.
func (m *merged) dropDuplicates(all []uint64, found *problems) []uint64 {
	all = all[:0]
	if len(m.parts) == 0 || len(m.parts) == 1 && len(m.other) == 0 {
		return all
	}
	taken := map[uint64]bool{} // those with a double, once they have come
	var others []uint64
	for _, metric := range m.other {
		others = append(others, hashSeries(metric.Label))
	}
	all = append(slices.Grow(all, m.series), others...)
	for _, p := range m.parts {
		all = append(all, p.family.series...)
	}
	slices.Sort(all)
	var doubles []uint64
	for i := 1; i < len(all); i++ {
		if all[i] == all[i-1] && (len(doubles) == 0 || doubles[len(doubles)-1] != all[i]) {
			doubles = append(doubles, all[i])
		}
	}
	if len(doubles) == 0 {
		return all
	}
	for _, h := range others {
		taken[h] = true
	}
	for i := range m.parts {
		p := &m.parts[i]
		for _, h := range doubles {
			if _, has := slices.BinarySearch(p.family.series, h); !has {
				continue
			}
			if taken[h] {
				if p.drop == nil {
					p.drop = map[uint64]bool{}
				}
				p.drop[h] = true
			}
			taken[h] = true
		}
		if n := len(p.drop); n > 0 {
			m.series -= n
			found.add(p.file.path, ReasonDuplicate, n, fmt.Sprintf("%s: metric %q: another file or source in front has %d of its series", p.file.path, m.name, n))
		}
	}
	return all
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
		slices.SortFunc(series, gateway.CompareSeries)
		series = slices.CompactFunc(series, func(a, b *dto.Metric) bool { return gateway.CompareSeries(a, b) == 0 })
		i, _ := slices.BinarySearchFunc(s.families, name, func(m *merged, name string) int { return strings.Compare(m.name, name) })
		s.families = slices.Insert(s.families, i, &merged{meta: meta{name: name, help: help, kind: dto.MetricType_GAUGE}, other: series, series: len(series)})
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
// messages must not be changed. One with many series that stand in several files
// comes in parts, which have the same name and follow each other.
//
// Files that were replaced since Collect and have other series now are left out, which
// the next Collect tells.
func (s *Snapshot) Families() iter.Seq[*dto.MetricFamily] {
	return func(yield func(*dto.MetricFamily) bool) {
		r := reader{collector: s.collector, replaced: map[*file]*file{}}
		for _, m := range s.families {
			metrics := m.other
			switch {
			case len(m.parts) == 0:
			case len(m.parts) == 1 && len(m.other) == 0:
				metrics = r.load(m.parts[0])
			case m.series <= maxSorted:
				metrics = slices.Clone(m.other)
				for _, p := range m.parts {
					metrics = append(metrics, r.load(p)...)
				}
				slices.SortStableFunc(metrics, gateway.CompareSeries)
			default:
				for _, p := range m.parts {
					if len(metrics) > 0 && !yield(m.family(metrics)) {
						return
					}
					metrics = r.load(p)
				}
			}
			if len(metrics) > 0 && !yield(m.family(metrics)) {
				return
			}
		}
	}
}

// Gather returns the families as a list, each name once.
func (s *Snapshot) Gather() (families []*dto.MetricFamily) {
	for f := range s.Families() {
		if n := len(families); n > 0 && families[n-1].GetName() == f.GetName() {
			families[n-1].Metric = append(families[n-1].Metric, f.Metric...)
		} else {
			f.Metric = slices.Clip(f.Metric) // what is behind may be another's
			families = append(families, f)
		}
	}
	return families
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

// reader reads the series of one exposition.
type reader struct {
	collector *Collector
	buffer    []byte
	replaced  map[*file]*file // by what is in the index; nil where they can't be read
}

// load returns the series of a part.
func (r *reader) load(p part) []*dto.Metric {
	f, fam := p.file, p.family
	if now, replaced := r.replaced[f]; replaced {
		if now == nil {
			return nil
		}
		if fam = now.same(p.family); fam == nil {
			r.leave(f, errChanged)
			return nil
		}
		f = now
	}
	metrics, err := f.load(fam, &r.buffer)
	if err != nil {
		// The usual thing is that a newer version has taken the file's place.
		now, fail := r.collector.read(p.file.path, new([]byte), 0)
		if fail != nil {
			err = fail
		} else if now.fail != nil {
			err = now.fail
		} else if fam = now.same(p.family); fam != nil {
			r.replaced[p.file] = now
			metrics, err = now.load(fam, &r.buffer)
		} else {
			err = errChanged
		}
	}
	if err != nil {
		r.leave(p.file, err)
		return nil
	}
	if len(p.drop) > 0 {
		metrics = slices.DeleteFunc(slices.Clone(metrics), func(m *dto.Metric) bool { return p.drop[hashSeries(m.Label)] })
	}
	return metrics
}

// same returns the family that has the series of another version of the file.
func (f *file) same(as *family) *family {
	fam := f.find(as.meta.Value().name)
	if fam == nil || fam.meta != as.meta || !slices.Equal(fam.series, as.series) {
		return nil
	}
	return fam
}

// leave gives up on what is left of a file.
func (r *reader) leave(f *file, err error) {
	r.replaced[f] = nil
	reason := ReasonChanged
	if fail, ok := errors.AsType[*failure](err); ok {
		reason = fail.reason
	}
	fail := failf(reason, "%s: what came in the last exposition is not all of it: %w", f.path, err)
	r.collector.mu.Lock()
	r.collector.late[f.path] = fail
	r.collector.mu.Unlock()
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
		slices.SortStableFunc(metrics, gateway.CompareSeries)
		byName[name].Metric = metrics
	}
	return families, dropped
}
