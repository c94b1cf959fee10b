package gateway

import (
	"cmp"
	"container/list"
	"errors"
	"fmt"
	"net/http"
	"sort"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
)

// Header fields of pushes that are made once, however often they are sent.
const (
	// HeaderPushID names a push, its group's deletion or a batch: SPOOL/SEQ. SPOOL is
	// 16 to 64 of A-Z, a-z, 0-9, "_" and "-", random, and made once for each place where
	// pushes wait to be sent. SEQ is a decimal number from 1 on, which grows with each push
	// of the spool.
	//
	// The store notes the highest SEQ of each SPOOL together with what the push
	// changed. A push whose SEQ is not above that is answered as if it had been made, and
	// changes nothing. So a spool's pushes are to be sent in their order, the next one when
	// the one before was answered; one without an answer is sent again under the same ID.
	//
	// A push that was refused, or could not be stored now (503, 507), is not noted: who sends
	// it again, because the answer was lost, is told the reason again.
	//
	// A spool is forgotten when none of its pushes was made for 7 days, or for
	// StoreConfig.ForgetAfter where that is longer, and earlier where there are more than
	// StoreConfig.MaxSpools: whoever can push can make spools too, so what waits for longer
	// than that without an answer may be made twice.
	HeaderPushID = "Culvert-Push-Id"
	// HeaderPushSeq is in each answer of the store to a request with a HeaderPushID that
	// can be read: the highest SEQ of the spool that is noted, 0 for none.
	HeaderPushSeq = "Culvert-Push-Seq"
	// HeaderPushRepeated is "true" in the answer to a push that was there before.
	HeaderPushRepeated = "Culvert-Push-Repeated"
)

const (
	minSpoolName, maxSpoolName = 16, 64
	defaultMaxSpools           = 100_000 // some 20 MB
	minForgetSpools            = 7 * 24 * time.Hour
)

// pushID is a HeaderPushID. The zero pushID is that of a push without one.
type pushID struct {
	spool string
	seq   uint64
}

// readPushID reads HeaderPushID.
func readPushID(h http.Header) (id pushID, err error) {
	values := h.Values(HeaderPushID)
	if len(values) == 0 {
		return id, nil
	}
	bad := func(reason string) (pushID, error) {
		return pushID{}, fmt.Errorf("%s: %q: %s; write SPOOL/SEQ, as in 4fT0cB1x9qZ7mKpW2-aE/17", HeaderPushID, strings.Join(values, ", "), reason)
	}
	if len(values) > 1 {
		return bad("it is given more than once")
	}
	spool, seq, ok := strings.Cut(values[0], "/")
	if !ok {
		return bad("there is no slash")
	}
	if len(spool) < minSpoolName || len(spool) > maxSpoolName {
		return bad(fmt.Sprintf("the spool has %d characters, and must have %d to %d", len(spool), minSpoolName, maxSpoolName))
	}
	if strings.Trim(spool, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-") != "" {
		return bad(`the spool may have letters, digits, "_" and "-"`)
	}
	id.spool = spool
	if id.seq, err = strconv.ParseUint(seq, 10, 63); err != nil || id.seq == 0 {
		return bad("the number is not a decimal number from 1 to 9223372036854775807")
	}
	return id, nil
}

// Mark is how far the pushes of a spool have come: see HeaderPushID. It is a key of its
// own in the backend, beside the groups.
type Mark struct {
	Spool string
	Seq   uint64    // the highest that is noted; 0: the spool is forgotten
	Noted time.Time // when it was
}

// A mark is a protobuf message. What a newer version adds is skipped.
const (
	markSpool = 1
	markSeq   = 2
	markNoted = 3 // Unix nanoseconds
)

// AppendBinary appends the mark. It returns no error.
func (m *Mark) AppendBinary(out []byte) ([]byte, error) {
	out = protowire.AppendString(protowire.AppendTag(out, markSpool, protowire.BytesType), m.Spool)
	out = protowire.AppendVarint(protowire.AppendTag(out, markSeq, protowire.VarintType), m.Seq)
	return protowire.AppendVarint(protowire.AppendTag(out, markNoted, protowire.VarintType), uint64(unixNano(m.Noted))), nil
}

// UnmarshalBinary reads what AppendBinary wrote.
func (m *Mark) UnmarshalBinary(data []byte) error {
	*m = Mark{}
	for len(data) > 0 {
		field, number, content, n := cutField(data)
		if n < 0 {
			return fmt.Errorf("a spool's mark can't be read: %w", protowire.ParseError(n))
		}
		data = data[n:]
		switch field {
		case markSpool:
			m.Spool = string(content)
		case markSeq:
			m.Seq = number
		case markNoted:
			m.Noted = time.Unix(0, int64(number))
		}
	}
	if m.Spool == "" {
		return errors.New("a spool's mark names no spool")
	}
	return nil
}

// spools are the marks that the store knows. They are those that are stored: a change
// that waits for its write is not among them.
type spools struct {
	byName map[string]*list.Element // of Marks
	order  *list.List               // the one that was silent for longest is in front
	max    int
}

func newSpools(limit int) spools {
	return spools{byName: map[string]*list.Element{}, order: list.New(), max: cmp.Or(limit, defaultMaxSpools)}
}

// load fills it with what was stored.
func (s *spools) load(marks []Mark) {
	sort.Slice(marks, func(i, j int) bool { return marks[i].Noted.Before(marks[j].Noted) })
	for _, m := range marks {
		s.note(m)
	}
}

// seq returns the highest number that is noted of a spool, 0 for none.
func (s *spools) seq(spool string) uint64 {
	if e := s.byName[spool]; e != nil {
		return e.Value.(Mark).Seq
	}
	return 0
}

// note replaces the mark of a spool, or forgets it.
func (s *spools) note(m Mark) {
	e := s.byName[m.Spool]
	switch {
	case m.Seq == 0 && e != nil:
		s.order.Remove(e)
		delete(s.byName, m.Spool)
	case m.Seq == 0:
	case e == nil:
		s.byName[m.Spool] = s.order.PushBack(m)
	default:
		e.Value = m
		s.order.MoveToBack(e)
	}
}

// withForgotten returns the marks of a batch of changes, and with them those of the
// spools that are to be forgotten because the batch brings too many.
func (s *spools) withForgotten(batch map[string]Mark) []Mark {
	marks := make([]Mark, 0, len(batch))
	n := len(s.byName)
	for _, m := range batch {
		if s.byName[m.Spool] == nil {
			n++
		}
		marks = append(marks, m)
	}
	for e := s.order.Front(); e != nil && n > s.max; e = e.Next() {
		if spool := e.Value.(Mark).Spool; batch[spool].Seq == 0 {
			marks = append(marks, Mark{Spool: spool})
			n--
		}
	}
	return marks
}

// silentSince forgets the spools that were noted before a time, and returns that.
func (s *spools) silentSince(before time.Time) (forgotten []Mark) {
	for e := s.order.Front(); e != nil && e.Value.(Mark).Noted.Before(before); e = s.order.Front() {
		m := Mark{Spool: e.Value.(Mark).Spool}
		s.note(m)
		forgotten = append(forgotten, m)
	}
	return forgotten
}

// noted returns the highest number that is noted of a spool.
func (s *Store) noted(spool string) uint64 {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.spools.seq(spool)
}

// Spools returns the number of spools that are known: see HeaderPushID.
func (s *Store) Spools() int {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return len(s.spools.byName)
}

// identify reads the ID of a request, and has its answer tell how far the spool is.
func (g *Gateway) identify(w http.ResponseWriter, r *http.Request) (pushID, error) {
	id, err := readPushID(r.Header)
	if err != nil {
		return id, badRequest{err}
	}
	g.tellSeq(w, id)
	return id, nil
}

// TellSeq sets HeaderPushSeq in the answer to a push that the server itself refuses.
func (g *Gateway) TellSeq(w http.ResponseWriter, r *http.Request) {
	if id, err := readPushID(r.Header); err == nil {
		g.tellSeq(w, id)
	}
}

func (g *Gateway) tellSeq(w http.ResponseWriter, id pushID) {
	if id.spool != "" {
		w.Header().Set(HeaderPushSeq, strconv.FormatUint(g.store.noted(id.spool), 10))
	}
}

// do has the store make the change of a request, and sets the header fields of its
// answer.
func (g *Gateway) do(w http.ResponseWriter, r *http.Request, c *change) error {
	err := g.store.do(r.Context(), c)
	g.tellSeq(w, c.id)
	if err == nil && c.repeated {
		w.Header().Set(HeaderPushRepeated, "true")
	}
	return err
}
