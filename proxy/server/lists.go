package server

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"unicode/utf8"

	"github.com/klauspost/compress/gzip"

	"github.com/culvert-io/culvert/proxy/fleet"
)

// lists are discovery's lists as they were asked for last. Prometheus asks for the
// whole list again and again, and it changes little: thousands of entries would be
// encoded for nothing.
type lists struct {
	clients, targets keptList
	paths            keptList // ?mode=path, for the address of the last request
	made             atomic.Uint64
}

// keptList keeps a list until an agent, the settings or the listing change.
type keptList struct {
	mu   sync.Mutex // held while the list is brought up to date; protects last
	last *encodedList
}

// encodedList is a list in Prometheus's HTTP service discovery format
// (prometheus.io/docs/prometheus/latest/http_sd). It is immutable.
type encodedList struct {
	key      string // listing.key
	settings *Settings
	changes  uint64 // fleet.Changes before it was made, at the latest
	parts    []listPart
	body     []byte
	zipped   func() []byte // body by gzip; made once, when it is first asked for
	tag      string        // ETag: a weak one, since it stands for both encodings
}

// listPart is where the entries of an agent end in a list. They begin where those
// of the agent before end.
type listPart struct {
	agent  string
	change uint64 // fleet.Info.Change
	end    int
}

// current returns the list as it is now. Of an older one it takes the entries of
// agents that have not changed. Many who ask at once share one that is new.
func (k *keptList) current(s *Server, list listing) *encodedList {
	k.mu.Lock()
	defer k.mu.Unlock()
	next := &encodedList{key: list.key, settings: s.settings.Load(), changes: s.fleet.Changes()}
	last := k.last
	if last == nil || last.key != next.key || last.settings != next.settings {
		last = new(encodedList)
	} else if last.changes == next.changes {
		return last
	}
	infos := s.fleet.Agents()
	next.parts = make([]listPart, 0, len(infos))
	enc := newListEncoder(list, next.settings, len(last.body))
	begin, old := 1, 0 // of the parts that are left in last
	for _, info := range infos {
		for old < len(last.parts) && last.parts[old].agent < info.Name {
			begin = last.parts[old].end
			old++
		}
		if old < len(last.parts) && last.parts[old].agent == info.Name && last.parts[old].change == info.Change {
			enc.body = append(enc.body, last.body[begin:last.parts[old].end]...)
			enc.body[len(enc.body)-1] = ',' // which was the end of the list, perhaps
		} else {
			enc.agent(info, nil)
		}
		next.parts = append(next.parts, listPart{info.Name, info.Change, len(enc.body)})
	}
	next.body = enc.end()
	next.zipped = sync.OnceValue(func() []byte { return zipped(next.body) })
	next.tag = fmt.Sprintf("W/\"%.8s-%d\"", s.id, s.lists.made.Add(1))
	k.last = next
	return next
}

// encodeSelected returns the list of the entries of some agents that the selectors want.
func (s *Server) encodeSelected(infos []fleet.Info, list listing, wanted selectors) []byte {
	enc := newListEncoder(list, s.settings.Load(), 0)
	for _, info := range infos {
		enc.agent(info, wanted)
	}
	return enc.end()
}

// listEncoder encodes entries, each with a comma behind it.
type listEncoder struct {
	list     listing
	settings *Settings
	body     []byte
	labels   map[string]string // of an entry
	names    []string          // its label names
}

func newListEncoder(list listing, settings *Settings, size int) *listEncoder {
	return &listEncoder{list: list, settings: settings, labels: map[string]string{}, body: append(make([]byte, 0, size+size/64+2), '[')}
}

// agent adds the entries of an agent that wanted selects, or all where it is empty.
func (e *listEncoder) agent(info fleet.Info, wanted selectors) {
	e.list.entries(info, e.labels, func(address string) {
		defer clear(e.labels)
		for _, name := range e.settings.Discovery.PromoteLabels {
			if value, ok := e.labels[metaLabel+name]; ok {
				e.labels[name] = value
			}
		}
		// An agent's own labels go by their plain names too.
		if len(wanted) > 0 && !wanted.match(func(name string) string {
			if value, ok := e.labels[name]; ok {
				return value
			}
			return e.labels[metaLabel+name]
		}) {
			return
		}
		e.names = slices.AppendSeq(e.names[:0], maps.Keys(e.labels))
		slices.Sort(e.names)
		e.body = append(appendString(append(e.body, `{"targets":[`...), address), `],"labels":{`...)
		for i, name := range e.names {
			if i > 0 {
				e.body = append(e.body, ',')
			}
			e.body = appendString(append(appendString(e.body, name), ':'), e.labels[name])
		}
		e.body = append(e.body, "}},"...)
	})
}

// end returns the list. The last comma makes place for the bracket, so that the
// parts stay where they are.
func (e *listEncoder) end() []byte {
	if len(e.body) == 1 {
		return append(e.body, ']')
	}
	e.body[len(e.body)-1] = ']'
	return e.body
}

// appendString appends a JSON string. Few need more than quotes.
func appendString(to []byte, s string) []byte {
	for i := range len(s) {
		if c := s[i]; c < ' ' || c == '"' || c == '\\' || c >= utf8.RuneSelf {
			quoted, _ := json.Marshal(s) // a string always can be
			return append(to, quoted...)
		}
	}
	return append(append(append(to, '"'), s...), '"')
}

// zipped compresses at the least cost: a list of thousands of entries shrinks to a
// twentieth all the same.
func zipped(body []byte) []byte {
	var out bytes.Buffer
	zw, _ := gzip.NewWriterLevel(&out, gzip.BestSpeed) // the level is a good one
	zw.Write(body)
	zw.Close()
	return out.Bytes()
}
