package gateway

import (
	"bytes"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"

	dto "github.com/prometheus/client_model/go"
)

// Pass is where requests go that are meant for another store.
type Pass struct {
	// Reserved is a prefix of metric names that the other store refuses. None by
	// default.
	Reserved string
	// Take keeps a request. at is when a push was made; body is as it was sent. An error
	// is answered with 413 where it is ErrBodyTooLarge, else with 503.
	Take func(at time.Time, body []byte) error
}

// ServePass answers a push to a group that is for another store: 202 once it is taken.
// It refuses what no store would take; what depends on what the store has is not
// known here. rest is as for ServePush.
func (g *Gateway) ServePass(w http.ResponseWriter, r *http.Request, rest string, to Pass) {
	g.answer(w, "relay", http.StatusAccepted, func() error {
		key, err := ParsePath(rest)
		if err != nil {
			return badRequest{err}
		}
		return g.pass(w, r, to, func() string { return "the push to " + key.String() }, func(families []*dto.MetricFamily) ([]*part, error) {
			return []*part{{key: key, families: families}}, nil
		})
	})
}

// ServePassBatch is ServePass for a push to many groups: see ServeBatch.
func (g *Gateway) ServePassBatch(w http.ResponseWriter, r *http.Request, to Pass) {
	g.answer(w, "relay_batch", http.StatusAccepted, func() error {
		names, err := groupBy(r.URL.Query().Get("group_by"))
		if err != nil {
			return badRequest{err}
		}
		return g.pass(w, r, to, func() string { return "the push" }, func(families []*dto.MetricFamily) ([]*part, error) {
			return splitByKey(families, names)
		})
	})
}

// ServePassDelete is ServePass for the deletion of a group.
func (g *Gateway) ServePassDelete(w http.ResponseWriter, _ *http.Request, rest string, to Pass) {
	g.answer(w, "relay_delete", http.StatusAccepted, func() error {
		if _, err := ParsePath(rest); err != nil {
			return badRequest{err}
		}
		return to.Take(g.store.config.Now(), nil)
	})
}

func (g *Gateway) pass(w http.ResponseWriter, r *http.Request, to Pass, what func() string, split func([]*dto.MetricFamily) ([]*part, error)) error {
	e, err := g.editOf(r, pushID{})
	if err != nil {
		return badRequest{err}
	}
	var sent bytes.Buffer
	r.Body = struct {
		io.Reader
		io.Closer
	}{io.TeeReader(r.Body, &sent), r.Body}
	body, err := g.readBody(w, r, what)
	if err != nil {
		return err
	}
	defer body.release()
	g.received(&e)
	if err := checkParts(r, body.content, to, what, split); err != nil {
		return err
	}
	return to.Take(e.at, sent.Bytes())
}

// checkParts tells what no store would take of a body.
func checkParts(r *http.Request, body []byte, to Pass, what func() string, split func([]*dto.MetricFamily) ([]*part, error)) error {
	families, err := formatOf(r.Header.Get("Content-Type")).parse(body)
	if err != nil {
		return badRequest{fmt.Errorf("the body of %s: %w", what(), err)}
	}
	parts, err := split(families)
	if err != nil {
		return badRequest{err}
	}
	for _, p := range parts {
		_, reasons := prepare(p.key, p.families, 0)
		for _, f := range p.families {
			if to.Reserved != "" && strings.HasPrefix(f.GetName(), to.Reserved) {
				reasons = append(reasons, fmt.Sprintf("metric %q: names that start with %q are the server's own", f.GetName(), to.Reserved))
			}
		}
		if len(reasons) > 0 {
			return &Rejection{Key: p.key, Reasons: reasons}
		}
	}
	return nil
}

// Gather returns the families of all groups, as a scrape sees them at one moment. It
// implements prometheus.Gatherer. What can't be read is left out, and told in the error.
func (s *Store) Gather() (families []*dto.MetricFamily, err error) {
	anew := s.moment().decoder()
	for _, name := range slices.Sorted(maps.Keys(anew.heads)) {
		f, failed := anew.decode(anew.heads[name])
		if failed != nil {
			err = fmt.Errorf("metric %q: %w", name, failed)
			continue
		}
		families = append(families, f)
	}
	return families, err
}
