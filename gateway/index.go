package gateway

import (
	"fmt"
	"log/slog"
	"math"
	"slices"
	"strings"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/model"
)

// index is what checks and scrapes look things up in. Its cost does not depend on
// how many groups there are, but for the place of a new group in its families.
//
// Whatever tells two series apart has to tell them apart in text format 0.0.4 too,
// where names outside the legacy rules are escaped. So groups are found by the
// canonical form of their keys, and families of such names by their escaped form.
type index struct {
	groups map[string]*group // by the ID of the canonical key
	slots  []*group          // every group has a place here, nil: free
	images []*image          // of the group in the same slot
	free   []int32           // free slots
	// changed tells of each slot when its group last changed: the number of that change, of
	// all since the start.
	changed  []uint64
	opens    []bool // of each slot whether its group opensSection
	changes  uint64
	removed  removals
	families map[string]*family
	foreign  map[string]map[string]struct{} // names outside the legacy rules, by their escaped form
	shapes   map[string]*shape
	// differing is how many families have more than one HELP.
	differing int
	// unchosen are families whose most recent push is gone: which HELP counts now is found
	// when it is asked for, since many groups may go together. See Store.rLockChosen.
	unchosen map[string]struct{}
	logger   *slog.Logger
}

// family is all blocks of one metric name.
type family struct {
	kind    dto.MetricType
	slots   []int32        // of its groups, sorted by their IDs
	help    string         // of the most recent push
	helpAt  int64          // when that was, where there is more than one HELP
	helps   map[string]int // blocks by HELP
	differs bool           // there is more than one HELP
}

// shape is a set of label names that are the key of some groups. Series of two
// groups can be equal only where the labels of one contain the key of the other:
// so what a series may clash with is found by its labels, one lookup a shape.
type shape struct {
	names  []string // sorted
	groups int
}

func newIndex(logger *slog.Logger) index {
	return index{logger: logger, groups: map[string]*group{}, families: map[string]*family{}, unchosen: map[string]struct{}{}, foreign: map[string]map[string]struct{}{}, shapes: map[string]*shape{}}
}

// install gives a group a new state, and brings the index up to date.
func (x *index) install(g *group, next state) {
	if !x.has(g) {
		x.groups[g.canonical.ID()] = g
		x.shapeOf(g.canonical).groups++
		if n := len(x.free); n > 0 {
			g.slot, x.free = x.free[n-1], x.free[:n-1]
			x.slots[g.slot] = g
		} else {
			g.slot = int32(len(x.slots))
			x.slots, x.images = append(x.slots, g), append(x.images, nil)
			x.changed, x.opens = append(x.changed, 0), append(x.opens, false)
		}
		x.opens[g.slot] = opensSection(g.id)
	}
	x.noteChange(g)
	old := g.image
	if x.differing == 0 && old.sameFamilies(next.image) {
		g.state, x.images[g.slot] = next, next.image
		return // what jobs do again and again: the families have it already
	}
	for _, b := range old.blocks() {
		if _, stays := next.image.find(b.name()); !stays {
			x.dropEntry(g, b)
		}
	}
	g.state, x.images[g.slot] = next, next.image
	for _, b := range next.image.blocks() {
		x.putEntry(g, b, old)
	}
}

// remove takes a group out.
func (x *index) remove(g *group) {
	for _, b := range g.image.blocks() {
		x.dropEntry(g, b)
	}
	delete(x.groups, g.canonical.ID())
	x.noteChange(g)
	x.removed.note(g.key, x.changes)
	x.slots[g.slot], x.images[g.slot] = nil, nil
	x.free = append(x.free, g.slot)
	sh := x.shapeOf(g.canonical)
	if sh.groups--; sh.groups == 0 {
		delete(x.shapes, shapeID(g.canonical))
	}
	g.image = nil // install begins anew where the removal is undone
}

func (x *index) noteChange(g *group) {
	x.changes++
	x.changed[g.slot] = x.changes
}

// get returns the group of exactly that key.
func (x *index) get(key Key) *group {
	var buf [128]byte
	if g := x.groups[string(key.canonical().appendID(buf[:0]))]; g != nil && slices.Equal(g.key, key) {
		return g
	}
	return nil
}

// has reports whether the group is in the index.
func (x *index) has(g *group) bool { return int(g.slot) < len(x.slots) && x.slots[g.slot] == g }

func (x *index) shapeOf(key Key) *shape {
	id := shapeID(key)
	sh := x.shapes[id]
	if sh == nil {
		sh = new(shape)
		for _, l := range key {
			sh.names = append(sh.names, l.Name)
		}
		x.shapes[id] = sh
	}
	return sh
}

func shapeID(key Key) string {
	names := make([]string, len(key))
	for i, l := range key {
		names[i] = l.Name
	}
	return strings.Join(names, "\xff")
}

// appendID appends the ID of the group of this shape that the labels, canonical and
// sorted by name, belong to. It returns false where they lack a name of the shape.
func (sh *shape) appendID(id []byte, labels []plainLabel) ([]byte, bool) {
	for i, name := range sh.names {
		for len(labels) > 0 && string(labels[0].name) < name {
			labels = labels[1:]
		}
		if len(labels) == 0 || string(labels[0].name) != name {
			return nil, false
		}
		id = appendLabelID(id, i, name, string(labels[0].value))
	}
	return id, true
}

// shapesBut returns the shapes of which another group may have a series of the group with that
// canonical key. A series has its group's key: so of the key's own shape there is but the
// group itself, and of one whose names the key has all, the group that has their values.
func (x *index) shapesBut(canonical Key) []*shape {
	var others []*shape
	labels := make([]plainLabel, len(canonical))
	for i, l := range canonical {
		labels[i] = plainLabel{[]byte(l.Name), []byte(l.Value)}
	}
	own, buf := shapeID(canonical), make([]byte, 0, 128)
	for name, sh := range x.shapes {
		if id, within := sh.appendID(buf, labels); name != own && (!within || x.groups[string(id)] != nil) {
			others = append(others, sh)
		}
	}
	return others
}

// groupOf returns the group of one of the shapes whose key is among the labels and
// for which has is true.
func (x *index) groupOf(shapes []*shape, labels []plainLabel, has func(*group) bool) *group {
	buf := make([]byte, 0, 128)
	for _, sh := range shapes {
		if id, ok := sh.appendID(buf, labels); ok {
			if g := x.groups[string(id)]; g != nil && has(g) {
				return g
			}
		}
	}
	return nil
}

// twin returns another group whose generated series have the same labels as those of
// a group of that key.
func (x *index) twin(key Key) *group {
	canonical := key.canonical()
	if g := x.groups[canonical.ID()]; g != nil && g.id != key.ID() {
		return g
	}
	m := new(dto.Metric)
	forceLabels(canonical, canonical.forced(), m)
	return x.groupOf(x.shapesBut(canonical), plainLabels(m.Label), func(g *group) bool {
		twin := new(dto.Metric)
		forceLabels(g.canonical, g.canonical.forced(), twin)
		return slices.EqualFunc(m.Label, twin.Label, sameLabel)
	})
}

// find returns the place of a group in a family.
func (x *index) find(f *family, g *group) (int, bool) {
	return slices.BinarySearchFunc(f.slots, g.id, func(slot int32, id string) int { return strings.Compare(x.slots[slot].id, id) })
}

// putEntry notes a block of the group's image in its family, in place of that of the
// image before.
func (x *index) putEntry(g *group, b prepared, before *image) {
	m := b.meta.Value()
	f := x.families[m.name]
	if f == nil {
		f = &family{helps: map[string]int{}}
		x.families[m.name] = f
		if !model.LegacyValidation.IsValidMetricName(m.name) {
			escaped := model.EscapeName(m.name, model.UnderscoreEscaping)
			if x.foreign[escaped] == nil {
				x.foreign[escaped] = map[string]struct{}{}
			}
			x.foreign[escaped][m.name] = struct{}{}
		}
	}
	if i, found := x.find(f, g); !found {
		f.slots = slices.Insert(f.slots, i, g.slot)
	}
	f.kind = m.kind
	f.helps[m.help]++
	old, replaces := before.find(m.name)
	if replaces {
		f.lostHelp(old)
	}
	x.countDiffering(m.name, f)
	switch {
	case !f.differs:
		f.help = m.help
	case f.helpAt != 0 && b.pushed > f.helpAt: // whichever the most recent one was
		f.help, f.helpAt = m.help, b.pushed
	case f.helpAt == 0 || replaces && old.pushed == f.helpAt || b.pushed == f.helpAt:
		x.chooseHelp(m.name, f)
	}
}

// countDiffering keeps count of the families that have more than one HELP.
func (x *index) countDiffering(name string, f *family) {
	switch differs := len(f.helps) > 1; {
	case differs && !f.differs:
		x.differing++
		x.logger.Info("Groups have different HELP texts for one metric; that of the most recent push is shown", "metric", name)
	case !differs && f.differs:
		x.differing--
		f.helpAt = 0
	}
	f.differs = len(f.helps) > 1
}

func (f *family) lostHelp(b prepared) {
	help := b.meta.Value().help
	if f.helps[help]--; f.helps[help] == 0 {
		delete(f.helps, help)
	}
}

func (x *index) dropEntry(g *group, b prepared) {
	name := b.name()
	f := x.families[name]
	i, _ := x.find(f, g)
	f.slots = slices.Delete(f.slots, i, i+1)
	f.lostHelp(b)
	x.countDiffering(name, f)
	switch {
	case len(f.slots) == 0:
		delete(x.families, name)
		delete(x.unchosen, name)
		escaped := model.EscapeName(name, model.UnderscoreEscaping)
		if names := x.foreign[escaped]; names != nil {
			if delete(names, name); len(names) == 0 {
				delete(x.foreign, escaped)
			}
		}
	case !f.differs:
		x.chooseHelp(name, f)
	case f.helpAt == b.pushed:
		f.helpAt = 0
		x.unchosen[name] = struct{}{}
	}
}

// chooseHelp finds the HELP of the most recent push; of those of one time, that of the
// first group, so that stores that share their groups choose the same.
func (x *index) chooseHelp(name string, f *family) {
	delete(x.unchosen, name)
	if !f.differs {
		for f.help = range f.helps { // there is but one
		}
		return
	}
	f.helpAt = math.MinInt64
	for _, slot := range f.slots {
		if b, _ := x.images[slot].find(name); b.pushed > f.helpAt {
			f.help, f.helpAt = b.meta.Value().help, b.pushed
		}
	}
}

// rLockChosen locks mu for reading, with the HELP of all families chosen.
func (s *Store) rLockChosen() {
	for s.mu.RLock(); len(s.unchosen) > 0; s.mu.RLock() {
		s.mu.RUnlock()
		s.mu.Lock()
		for name := range s.unchosen {
			s.chooseHelp(name, s.families[name])
		}
		s.mu.Unlock()
	}
}

// inconsistencies tells what speaks against the families that a group would have
// after a push, looking only at the names that the push touches.
func (s *Store) inconsistencies(g *group, after, pushed []prepared) []string {
	var reasons []string
	var foreign map[string][]string // of those after the push, by their escaped form
	for _, p := range after {
		if name := p.name(); p.meta.Value().foreign && !model.LegacyValidation.IsValidMetricName(name) {
			if foreign == nil {
				foreign = map[string][]string{}
			}
			escaped := model.EscapeName(name, model.UnderscoreEscaping)
			foreign[escaped] = append(foreign[escaped], name)
		}
	}
	kindOf := func(name string) (dto.MetricType, bool) {
		if i, ok := slices.BinarySearchFunc(after, name, func(p prepared, name string) int { return strings.Compare(p.name(), name) }); ok {
			return after[i].meta.Value().kind, true
		}
		if f := s.families[name]; f != nil && s.sharedBeside(f, g) {
			return f.kind, true
		}
		return s.config.Reserved(name)
	}
	// exists looks for a family, other than but, whose escaped name is that.
	exists := func(escaped, but string) (string, dto.MetricType, bool) {
		names := append([]string{escaped}, foreign[escaped]...)
		for name := range s.foreign[escaped] {
			names = append(names, name)
		}
		for _, name := range names {
			if kind, ok := kindOf(name); ok && name != but {
				return name, kind, true
			}
		}
		return "", 0, false
	}
	known := g.image.same(pushed)
	shapes := s.shapesBut(g.canonical)
	for i, p := range pushed {
		if known[i] == sameSeries {
			continue // all that it could clash with would have been refused
		}
		m := p.meta.Value()
		if kind, own := s.config.Reserved(m.name); own && kind != m.kind {
			reasons = append(reasons, fmt.Sprintf("metric %q has type %s, should have %s as the server's own", m.name, typeName(m.kind), typeName(kind)))
			continue
		}
		if f := s.families[m.name]; f != nil && f.kind != m.kind && s.sharedBeside(f, g) {
			reasons = append(reasons, fmt.Sprintf("metric %q has type %s, should have %s as in other groups", m.name, typeName(m.kind), typeName(f.kind)))
			continue
		}
		if reason := s.duplicate(shapes, p); reason != "" {
			reasons = append(reasons, reason)
			continue
		}
		if known[i] == sameMeta {
			continue // its name has its place already
		}
		escaped := model.EscapeName(m.name, model.UnderscoreEscaping)
		if other, _, ok := exists(escaped, m.name); ok {
			reasons = append(reasons, fmt.Sprintf("metric %q has the same name as %q where UTF-8 names are escaped", m.name, other))
		}
		if other, kind := suffixCollision(escaped, m.kind, exists); other != "" {
			reasons = append(reasons, fmt.Sprintf("metric %q collides with the %s %q", m.name, typeName(kind), other))
		}
	}
	return reasons
}

// sharedBeside reports whether a group other than g has the family.
func (x *index) sharedBeside(f *family, g *group) bool {
	if len(f.slots) != 1 {
		return len(f.slots) > 1
	}
	return x.slots[f.slots[0]].id != g.id
}

func typeName(kind dto.MetricType) string { return strings.ToLower(kind.String()) }

// duplicate tells of the first series that another group, of one of the shapes, has
// already.
func (s *Store) duplicate(shapes []*shape, p prepared) string {
	if len(shapes) == 0 {
		return ""
	}
	var f *dto.MetricFamily // decoded where it has to be
	var err error
	labels, text := make([]plainLabel, 0, 16), p.text
	for i, series := range p.series {
		if p.proto == nil {
			labels, text = cutLine(labels[:0], text)
		} else {
			if f == nil {
				if f, err = p.decode(); err != nil {
					return err.Error()
				}
			}
			labels = plainLabels(canonicalLabels(f.Metric[i].Label))
		}
		owner := s.groupOf(shapes, labels, func(g *group) bool {
			b, ok := g.image.find(p.name())
			return ok && slices.Contains(b.series, series)
		})
		if owner != nil {
			return fmt.Sprintf("metric %q: the labels %s were already seen in the group %s", p.name(), plainString(labels), owner.key)
		}
	}
	return ""
}

// plainString returns labels as they are written in a message.
func plainString(labels []plainLabel) string {
	k := make(Key, len(labels))
	for i, l := range labels {
		k[i] = Label{string(l.name), string(l.value)}
	}
	return k.String()
}

var histogramSuffixes = [...]string{"_count", "_sum", "_bucket"}

// suffixesOf returns what a type's series have behind the family's name.
func suffixesOf(kind dto.MetricType) []string {
	switch kind {
	case dto.MetricType_SUMMARY:
		return histogramSuffixes[:2]
	case dto.MetricType_HISTOGRAM, dto.MetricType_GAUGE_HISTOGRAM:
		return histogramSuffixes[:]
	}
	return nil
}

// suffixCollision looks for a family whose series would have the names that name's
// summary or histogram has, or the other way round.
func suffixCollision(name string, kind dto.MetricType, exists func(escaped, but string) (string, dto.MetricType, bool)) (other string, is dto.MetricType) {
	for _, suffix := range suffixesOf(kind) {
		if other, is, ok := exists(name+suffix, ""); ok {
			return other, is
		}
	}
	for _, suffix := range histogramSuffixes {
		base, ok := strings.CutSuffix(name, suffix)
		if !ok {
			continue
		}
		if other, is, ok := exists(base, ""); ok && slices.Contains(suffixesOf(is), suffix) {
			return other, is
		}
	}
	return "", 0
}
