package gateway

import (
	"cmp"
	"encoding/base64"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/common/model"
)

// maxRemoved bounds the groups that are remembered as removed.
const maxRemoved = 1024

// removals are the groups that were removed last, the oldest first.
type removals struct {
	last  []removal
	until uint64 // what was removed before that change is not known any more
}

type removal struct {
	key    Key
	change uint64
}

func (r *removals) note(key Key, change uint64) {
	if len(r.last) == maxRemoved {
		r.until = r.last[0].change
		copy(r.last, r.last[1:])
		r.last = r.last[:maxRemoved-1]
	}
	r.last = append(r.last, removal{key, change})
}

// GroupUpdate is what became of the groups since some time before.
type GroupUpdate struct {
	// Change is to be given to Since the next time: see Store.Changes.
	Change uint64
	// Whole: Groups are all there are.
	Whole  bool
	Groups []GroupInfo // that changed, as Groups sorts them
	Gone   []Key       // of groups that are there no more
	// Count is how many groups there are now. Late is how many of them declared an
	// interval and have push_up 0, and Failed that of groups whose last push was refused.
	Count, Late, Failed int
}

// Since returns what changed since the update of that Change; or all groups, where change
// is 0 or too long ago. It returns false, and nothing else, where nothing changed.
//
// It is a function, as PathOf and ServeGroup are: where text/template is linked, as in the
// agent, linkers keep all methods of what becomes an interface.
func Since(s *Store, change uint64) (GroupUpdate, bool) {
	s.mu.RLock()
	u := GroupUpdate{Change: s.changes, Whole: change == 0 || change < s.removed.until || change > s.changes, Count: len(s.groups)}
	if change == s.changes && !u.Whole {
		s.mu.RUnlock()
		return GroupUpdate{}, false
	}
	var changed []group // copies: to count their series takes longer than others should wait
	var at []uint64
	for slot, g := range s.slots {
		if g == nil {
			continue
		}
		if g.life.Interval > 0 && !g.up {
			u.Late++
		}
		if g.failed > g.pushed {
			u.Failed++
		}
		if u.Whole || s.changed[slot] > change {
			changed, at = append(changed, *g), append(at, s.changed[slot])
		}
	}
	if !u.Whole {
		for _, r := range slices.Backward(s.removed.last) {
			if r.change <= change {
				break
			}
			if s.get(r.key) == nil {
				u.Gone = append(u.Gone, r.key)
			}
		}
	}
	s.mu.RUnlock()
	for i := range changed {
		u.Groups = append(u.Groups, changed[i].info(at[i]))
	}
	slices.SortFunc(u.Groups, func(a, b GroupInfo) int {
		jobA, _ := a.Key.Get("job")
		jobB, _ := b.Key.Get("job")
		return cmp.Or(strings.Compare(jobA, jobB), compareKeys(a.Key, b.Key))
	})
	slices.SortFunc(u.Gone, compareKeys)
	u.Gone = slices.CompactFunc(u.Gone, func(a, b Key) bool { return slices.Equal(a, b) })
	return u, true
}

// NotLoaded returns why the groups are not known yet, nil where they are.
func (s *Store) NotLoaded() error { return s.isLoaded() }

// compareKeys sorts like the IDs of keys.
func compareKeys(a, b Key) int {
	return slices.CompareFunc(a, b, func(a, b Label) int {
		return cmp.Or(strings.Compare(a.Name, b.Name), strings.Compare(a.Value, b.Value))
	})
}

// info tells of a copy of a group.
func (g *group) info(change uint64) GroupInfo {
	info := GroupInfo{Key: g.key, Lifetime: g.life, Up: g.up, Expired: g.expired, Change: change}
	if g.pushed > 0 {
		info.Pushed = time.Unix(0, g.pushed)
	}
	if g.failed > 0 {
		info.Failed = time.Unix(0, g.failed)
	}
	if g.life.TTL > 0 && !g.expired {
		info.Expires = g.expires()
	}
	if g.image != nil {
		info.Series = len(g.image.hashes)
		for _, name := range []string{pushTimeName, failureTimeName, pushUpName} {
			if _, ok := g.image.find(name); ok { // it has one series
				info.Series--
			}
		}
	}
	return info
}

// PathOf returns what follows /metrics/ in the path of the group's pushes, percent-encoded:
// "job/NAME/LABEL/VALUE". Values that can't stand in a path are in base64.
func PathOf(k Key) string {
	var b strings.Builder
	part := func(name, value string) {
		if b.Len() > 0 {
			b.WriteByte('/')
		}
		escaped := model.EscapeName(name, model.ValueEncodingEscaping)
		if model.UnescapeName(escaped, model.ValueEncodingEscaping) != name { // it looks like one that is escaped
			escaped = "U__"
			for _, c := range name {
				escaped += fmt.Sprintf("_%X_", c)
			}
		}
		b.WriteString(url.PathEscape(escaped))
		// A router drops empty parts and dots, and takes an encoded slash for a slash.
		if value == "" || value == "." || value == ".." || strings.Contains(value, "/") {
			b.WriteString(base64Suffix)
			value = base64.RawURLEncoding.EncodeToString([]byte(value))
			value = cmp.Or(value, "=")
		}
		b.WriteByte('/')
		b.WriteString(url.PathEscape(value))
	}
	job, _ := k.Get("job")
	part("job", job)
	for _, l := range k {
		if l.Name != "job" {
			part(l.Name, l.Value)
		}
	}
	return b.String()
}

// ServeGroup answers with the series of one group, those that every group has included, in
// text format 0.0.4, as /metrics has them. rest is as for ServePush.
func ServeGroup(g *Gateway, w http.ResponseWriter, r *http.Request, rest string) {
	key, err := ParsePath(rest)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	if err := g.store.isLoaded(); err != nil {
		w.Header().Set("Retry-After", strconv.Itoa(retryAfter))
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
		return
	}
	at, ok := g.store.momentOf(key)
	if !ok {
		http.Error(w, fmt.Sprintf("there is no group %s; it was deleted, or its TTL has passed: see /api/v1/groups", key), http.StatusNotFound)
		return
	}
	text := r.Clone(r.Context())
	text.Header.Set("Accept", "text/plain;version=0.0.4")
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	expose(w, text, at, nil, newExpositions(g.config.Gzip, g.config.UseAllProcessors), g.store.config.Logger)
}

// momentOf returns what a scrape of one group alone would see, with the HELP that /metrics
// shows.
func (s *Store) momentOf(key Key) (*moment, bool) {
	s.rLockChosen()
	defer s.mu.RUnlock()
	g := s.get(key)
	if g == nil {
		return nil, false
	}
	at := &moment{store: s, change: s.changes, heads: map[string]*head{}, slots: []int32{0}, images: []*image{g.image}, changed: []uint64{0}, opens: []bool{true}}
	for _, b := range g.image.blocks() {
		f := s.families[b.name()]
		at.heads[b.name()] = &head{name: b.name(), help: f.help, kind: f.kind}
	}
	return at, true
}
