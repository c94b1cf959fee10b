package gateway

import (
	"bufio"
	"bytes"
	"fmt"
	"iter"
	"log/slog"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"

	"github.com/munnerz/goautoneg"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
)

// view is a family as a scrape sees it: entries of all groups, taken at one moment.
type view struct {
	name, help string
	kind       dto.MetricType
	own        *dto.MetricFamily // the server's own series of that name, if any
	entries    []entry
	images     []*image // by slot, as they were at that moment
}

// views takes all families at one moment, so that no scrape sees half a push.
// Images are immutable, so the lock is held for as long as it takes to copy
// pointers.
func (s *Store) views() map[string]*view {
	s.mu.RLock()
	defer s.mu.RUnlock()
	views := make(map[string]*view, len(s.families))
	images := slices.Clone(s.images)
	for name, f := range s.families {
		f.shared.Store(true)
		views[name] = &view{name: name, help: f.help, kind: f.kind, entries: f.entries, images: images}
	}
	return views
}

// expose answers a scrape with families of the groups and the server's own, which
// determine HELP.
func expose(w http.ResponseWriter, r *http.Request, views map[string]*view, own []*dto.MetricFamily, zip *Gzip, logger *slog.Logger) {
	for _, f := range own {
		v := views[f.GetName()]
		if v == nil {
			v = &view{name: f.GetName()}
			views[v.name] = v
		}
		v.own, v.kind, v.help = f, f.GetType(), f.GetHelp()
	}
	format, buffered, done := startExposition(w, r, zip)
	defer done()
	for _, name := range slices.Sorted(maps.Keys(views)) {
		if err := views[name].write(buffered, format); err != nil {
			// The status is out: what is written must not pass for the whole.
			logger.Error("A scrape broke off", "metric", name, "err", err)
			panic(http.ErrAbortHandler)
		}
	}
	if format.FormatType() == expfmt.TypeOpenMetrics {
		expfmt.FinalizeOpenMetrics(buffered)
	}
	buffered.Flush()
}

// ServeFamilies answers a scrape with families that come sorted by name, in the
// format and encoding that the request asks for: protobuf or text 0.0.4, and
// OpenMetrics for a client that accepts neither. It holds one of them at a time.
//
// Families of one name that come in a row are parts of one, and must agree in what
// describes it. In protobuf each part is a message of its own, which Prometheus
// takes for the same. A family that can't be encoded is left out and logged.
func ServeFamilies(w http.ResponseWriter, r *http.Request, families iter.Seq[*dto.MetricFamily], logger *slog.Logger) {
	format, out, done := startExposition(w, r, standardGzip)
	defer done()
	var encoded bytes.Buffer
	last := ""
	for f := range families {
		encoded.Reset()
		if err := expfmt.NewEncoder(&encoded, format).Encode(f); err != nil {
			logger.Error("A family can't be written", "metric", f.GetName(), "err", err)
			continue
		}
		text := encoded.Bytes()
		if last == f.GetName() && format.FormatType() != expfmt.TypeProtoDelim {
			for bytes.HasPrefix(text, []byte("# ")) { // HELP, TYPE, UNIT
				_, text, _ = bytes.Cut(text, []byte("\n"))
			}
		}
		last = f.GetName()
		if _, err := out.Write(text); err != nil {
			return // the scraper went away
		}
	}
	if format.FormatType() == expfmt.TypeOpenMetrics {
		expfmt.FinalizeOpenMetrics(out)
	}
	out.Flush()
}

// startExposition negotiates how a scrape is answered, and writes the header. done
// ends the compression, and must be called after the writer was flushed.
func startExposition(w http.ResponseWriter, r *http.Request, zip *Gzip) (format expfmt.Format, out *bufio.Writer, done func()) {
	format = negotiate(r.Header)
	w.Header().Set("Content-Type", string(format))
	w.Header().Add("Vary", "Accept, Accept-Encoding")
	if !AcceptsGzip(r.Header) {
		return format, bufio.NewWriterSize(w, 64<<10), func() {}
	}
	w.Header().Set("Content-Encoding", "gzip")
	zw, done := zip.writer(w)
	return format, bufio.NewWriterSize(zw, 64<<10), done
}

// negotiate chooses protobuf or text by the Accept header; OpenMetrics for a
// client that takes neither: its names and le values differ, and series that were
// scraped from a Pushgateway must not change.
func negotiate(h http.Header) expfmt.Format {
	openMetrics, other := false, false
	accept := goautoneg.ParseAccept(h.Get("Accept"))
	for _, a := range accept {
		switch a.Type + "/" + a.SubType {
		case "application/openmetrics-text":
			openMetrics = true
		case "text/plain", "text/*", "*/*", "application/vnd.google.protobuf":
			other = true
		}
	}
	if openMetrics && !other {
		return expfmt.NegotiateAccept(h, expfmt.DefaultOpenMetricsAcceptedFormats()...)
	}
	format := expfmt.NegotiateAccept(h, expfmt.DefaultAcceptedFormats()...)
	if format.ToEscapingScheme() != model.UnderscoreEscaping {
		return format
	}
	// Prometheus 3 names the escaping with the formats that it likes better than text
	// 0.0.4: it is meant for this one too.
	for _, a := range accept {
		if scheme, err := model.ToEscapingScheme(a.Params[model.EscapingKey]); err == nil {
			return format.WithEscapingScheme(scheme)
		}
	}
	return format
}

// AcceptsGzip reports whether an Accept-Encoding names gzip, with a weight that is
// not 0.
func AcceptsGzip(h http.Header) bool {
	for _, line := range h.Values("Accept-Encoding") {
		for part := range strings.SplitSeq(line, ",") {
			coding, params, _ := strings.Cut(part, ";")
			if !strings.EqualFold(strings.TrimSpace(coding), "gzip") {
				continue
			}
			weight, ok := strings.CutPrefix(strings.ToLower(strings.ReplaceAll(params, " ", "")), "q=")
			q, err := strconv.ParseFloat(weight, 64)
			return !ok || err != nil || q > 0
		}
	}
	return false
}

// write writes the family in the given format. Text and protobuf are put together
// from what was encoded when it was pushed.
func (v *view) write(w *bufio.Writer, format expfmt.Format) error {
	escaping := format.ToEscapingScheme()
	switch format.FormatType() {
	case expfmt.TypeTextPlain:
		return v.writeText(w, escaping)
	case expfmt.TypeProtoDelim:
		if !v.foreign() {
			return v.writeProto(w)
		}
	}
	f, err := v.decode()
	if err != nil {
		return err
	}
	if len(f.Metric) == 0 {
		return nil
	}
	return expfmt.NewEncoder(w, format).Encode(f)
}

// foreign reports whether what is written depends on the escaping scheme.
func (v *view) foreign() bool {
	return slices.ContainsFunc(v.entries, func(e entry) bool { return e.block(v.images).meta.Value().foreign })
}

func (v *view) writeText(w *bufio.Writer, escaping model.EscapingScheme) error {
	name := v.name
	if !model.LegacyValidation.IsValidMetricName(name) {
		if name = model.EscapeName(name, escaping); escaping == model.NoEscaping {
			name = `"` + labelEscaper.Replace(name) + `"`
		}
	}
	if v.help != "" {
		fmt.Fprintf(w, "# HELP %s %s\n", name, helpEscaper.Replace(v.help))
	}
	kind := typeName(v.kind)
	if v.kind == dto.MetricType_GAUGE_HISTOGRAM {
		kind = "histogram"
	}
	fmt.Fprintf(w, "# TYPE %s %s\n", name, kind)
	if v.own != nil {
		text, err := encodeText(v.name, v.kind, v.own.Metric, escaping, false)
		if err != nil {
			return err
		}
		w.Write(text)
	}
	for _, e := range v.entries {
		im, b := v.images[e.slot], e.block(v.images)
		text := im.textOf(b)
		if escaping != model.UnderscoreEscaping && b.meta.Value().foreign {
			f, err := im.decode(b)
			if err == nil {
				text, err = encodeText(v.name, v.kind, f.Metric, escaping, true)
			}
			if err != nil {
				return err
			}
		}
		if _, err := w.Write(text); err != nil {
			return nil // the scraper went away
		}
	}
	return nil
}

var helpEscaper = strings.NewReplacer(`\`, `\\`, "\n", `\n`)

func (v *view) writeProto(w *bufio.Writer) error {
	series := make([][]byte, 0, len(v.entries)+1)
	unit := ""
	if v.own != nil {
		own, err := encodeProto(v.own.Metric)
		if err != nil {
			return err
		}
		series = append(series, own)
		unit = v.own.GetUnit()
	}
	size := 0
	for _, e := range v.entries {
		series = append(series, v.images[e.slot].protoOf(e.block(v.images)))
	}
	head := appendFamilyHead(nil, v.name, v.help, unit, v.kind)
	for _, s := range series {
		size += len(s)
	}
	w.Write(appendLength(nil, len(head)+size))
	w.Write(head)
	for _, s := range series {
		if _, err := w.Write(s); err != nil {
			return nil // the scraper went away
		}
	}
	return nil
}

// decode returns the whole family, for the formats that are made anew.
func (v *view) decode() (*dto.MetricFamily, error) {
	f := &dto.MetricFamily{Name: &v.name, Type: &v.kind}
	if v.help != "" {
		f.Help = &v.help
	}
	if v.own != nil {
		f.Metric = append(f.Metric, v.own.Metric...)
	}
	for _, e := range v.entries {
		part, err := v.images[e.slot].decode(e.block(v.images))
		if err != nil {
			return nil, err
		}
		f.Metric = append(f.Metric, part.Metric...)
	}
	return f, nil
}
