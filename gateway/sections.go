package gateway

import (
	"bytes"
	"errors"
	"maps"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"
	"unique"

	"github.com/cespare/xxhash/v2"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

// expositions keep what scrapes were answered with, in each format that was asked for
// lately: between two scrapes few groups are pushed, and what has not changed is neither
// encoded nor compressed anew. What is kept is compressed where a family has many series: it
// takes a tenth of the exposition then.
//
// The groups, in the order in which they are exposed, are cut into sections; of each
// section the series of each family are kept. Which groups begin a section depends on the
// groups alone, and not on what stands before them: so a group that comes or goes changes no
// section but its own.
type expositions struct {
	zip              *Gzip
	useAllProcessors func() // see Config

	mu       sync.Mutex // protects byFormat, and used of each
	byFormat map[expfmt.Format]*kept
}

func newExpositions(zip *Gzip, useAllProcessors func()) *expositions {
	return &expositions{zip: zip, useAllProcessors: useAllProcessors, byFormat: map[expfmt.Format]*kept{}}
}

// kept is what is kept in one format.
type kept struct {
	used time.Time

	mu       sync.Mutex         // held while sections are brought up to date; protects what follows
	sections map[int32]*section // by the slot of the first group
	change   uint64             // of the store, at the latest moment that they were made for
}

// keptFor is how long a format is kept that nobody asks for.
const keptFor = 10 * time.Minute

// section is some groups that follow each other. It is immutable.
type section struct {
	slots    []int32
	change   uint64 // the last one of these groups
	families []sectionFamily
}

// shows reports whether these groups, and no others, are in the section as they are at the
// moment. One that has the same groups after the same last change is the same, whether it
// was made for an earlier moment or for a later one: scrapes may overtake each other.
func (sec *section) shows(at *moment, slots []int32) bool {
	return sec != nil && sec.change == at.lastChange(slots) && slices.Equal(sec.slots, slots)
}

// sectionFamily is the series of a family in a section: compressed, or as they are where
// they are few. Those are compressed together with what stands beside them.
type sectionFamily struct {
	name  string
	plain bool
	deflated
}

const (
	// sectionGroups is how many groups a section has on the average: with few of them,
	// little is made anew for one that changes; with many, they compress better.
	sectionGroups = 128
	// sectionSeries bounds the series of a section that has more than one group.
	sectionSeries = 16 << 10
	// sectionBytes is from how many bytes on series are compressed by themselves.
	sectionBytes = 1 << 10
	// manySections take some ten milliseconds to make.
	manySections = 8
	// pauses is for how many times as long as it took to make a section a scrape rests
	// where something was pushed meanwhile, and maxPauses bounds that.
	pauses    = 7
	maxPauses = time.Second
)

// opensSection reports whether the group begins a section.
func opensSection(id string) bool { return xxhash.Sum64String(id)%sectionGroups == 0 }

// moment is the groups and families as they are at one moment.
type moment struct {
	store  *Store
	change uint64
	heads  map[string]*head
	slots  []int32 // of the groups, in the order of the exposition
	// By slot: the group's image, its last change, and whether it begins a section.
	images  []*image
	changed []uint64
	opens   []bool
}

// head is what an exposition has of a family beside the groups' series.
type head struct {
	name, help, unit string
	kind             dto.MetricType
	own              []*dto.Metric // the server's own series
}

// moment returns what a scrape sees, so that none sees half a push. Images are immutable,
// so the lock is held for as long as it takes to copy pointers.
func (s *Store) moment() *moment {
	s.rLockChosen()
	defer s.mu.RUnlock()
	at := &moment{
		store: s, change: s.changes, heads: make(map[string]*head, len(s.families)),
		images: slices.Clone(s.images), changed: slices.Clone(s.changed), opens: slices.Clone(s.opens),
	}
	for name, f := range s.families {
		at.heads[name] = &head{name: name, help: f.help, kind: f.kind}
	}
	if f := s.families[pushTimeName]; f != nil { // which every group has
		at.slots = slices.Clone(f.slots)
	}
	return at
}

// refresh returns the sections of a moment in text or protobuf.
func (x *expositions) refresh(at *moment, format expfmt.Format) ([]*section, error) {
	k := x.of(format)
	k.mu.Lock()
	defer k.mu.Unlock()
	type job struct {
		place int // in sections
		slots []int32
	}
	var sections []*section
	var outdated []job
	for rest := at.slots; len(rest) > 0; {
		n := at.sectionOf(rest)
		sec := k.sections[rest[0]]
		if !sec.shows(at, rest[:n]) {
			outdated = append(outdated, job{len(sections), rest[:n]})
		}
		sections, rest = append(sections, sec), rest[n:]
	}
	if len(outdated) >= manySections {
		x.useAllProcessors()
	}
	errs := make([]error, len(outdated))
	var taken atomic.Int64
	var workers sync.WaitGroup
	for worker := range min(runtime.GOMAXPROCS(0), len(outdated)) {
		workers.Go(func() {
			zw := x.zip.deflater()
			defer x.zip.idle.Put(zw)
			// While nothing is pushed all processors are free for this. Else one will do, and not
			// for most of the time: what is pushed would wait for a processor at each of its
			// steps.
			left := maxPauses
			for worker == 0 || at.store.Changes() == at.change {
				i := int(taken.Add(1)) - 1
				if i >= len(outdated) {
					break
				}
				start, change := time.Now(), at.store.Changes()
				sections[outdated[i].place], errs[i] = at.encode(outdated[i].slots, format, zw)
				if at.store.Changes() != change {
					pause := min(pauses*time.Since(start), left)
					left -= pause
					time.Sleep(pause)
				}
			}
		})
	}
	workers.Wait()
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	if at.change < k.change {
		return sections, nil // it was overtaken, and the next scrape sees more
	}
	k.change, k.sections = at.change, make(map[int32]*section, len(sections))
	for _, sec := range sections {
		k.sections[sec.slots[0]] = sec
	}
	return sections, nil
}

// of returns what is kept in a format, and drops what nobody has asked for lately.
func (x *expositions) of(format expfmt.Format) *kept {
	x.mu.Lock()
	defer x.mu.Unlock()
	now := time.Now()
	maps.DeleteFunc(x.byFormat, func(f expfmt.Format, k *kept) bool { return f != format && now.Sub(k.used) > keptFor })
	k := x.byFormat[format]
	if k == nil {
		k = new(kept)
		x.byFormat[format] = k
	}
	k.used = now
	return k
}

// sectionOf returns how many of the groups are the first section.
func (at *moment) sectionOf(slots []int32) int {
	series := 0
	for n, slot := range slots {
		series += len(at.images[slot].hashes)
		if n > 0 && (at.opens[slot] || series > sectionSeries) {
			return n
		}
	}
	return len(slots)
}

// lastChange returns the last change of some groups.
func (at *moment) lastChange(slots []int32) (last uint64) {
	for _, slot := range slots {
		last = max(last, at.changed[slot])
	}
	return last
}

// encode makes a section of some groups.
func (at *moment) encode(slots []int32, format expfmt.Format, zw Deflater) (*section, error) {
	sec := &section{slots: slices.Clone(slots), change: at.lastChange(slots)} // the moment, and all its slots, go
	var all, series = bytes.Buffer{}, []byte(nil)
	var ends []int
	images, cursors := make([]*image, len(slots)), make([]int, len(slots))
	for i, slot := range slots {
		images[i] = at.images[slot]
	}
	kind, escaping := format.FormatType(), format.ToEscapingScheme()
	for {
		// Nearly always all groups have the same family next, by the same meta.
		var next unique.Handle[meta]
		name, found := "", false
		for i, im := range images {
			if cursors[i] == len(im.metas) || found && im.metas[cursors[i]] == next {
				continue
			}
			if m := im.metas[cursors[i]]; !found || m.Value().name < name {
				name, next, found = m.Value().name, m, true
			}
		}
		if !found {
			break
		}
		runtime.Gosched() // a push needs a processor for a moment, and others after it
		series = series[:0]
		for i, im := range images {
			if cursors[i] == len(im.metas) || im.metas[cursors[i]] != next && im.name(cursors[i]) != name {
				continue
			}
			var err error
			if series, err = im.block(cursors[i]).appendTo(series, kind, escaping); err != nil {
				return nil, err
			}
			cursors[i]++
		}
		f := sectionFamily{name: name, plain: len(series) < sectionBytes, deflated: deflated{size: uint32(len(series))}}
		if f.plain {
			all.Write(series)
		} else {
			f.deflated = deflate(&all, zw, series)
		}
		sec.families, ends = append(sec.families, f), append(ends, all.Len())
	}
	data, from := bytes.Clone(all.Bytes()), 0
	for i, end := range ends {
		sec.families[i].data = data[from:end:end]
		from = end
	}
	return sec, nil
}

// appendTo appends the series in text or protobuf.
func (p prepared) appendTo(out []byte, kind expfmt.FormatType, escaping model.EscapingScheme) ([]byte, error) {
	text := kind == expfmt.TypeTextPlain
	if !p.meta.Value().foreign || text && escaping == model.UnderscoreEscaping {
		if text {
			return p.appendText(out), nil
		}
		return p.appendProto(out), nil
	}
	f, err := p.decode()
	if err != nil {
		return nil, err
	}
	var series []byte
	if text {
		series, err = encodeText(f.GetName(), f.GetType(), f.Metric, escaping, true)
	} else {
		series, err = encodeProto(model.EscapeMetricFamily(f, escaping).Metric)
	}
	return append(out, series...), err
}
