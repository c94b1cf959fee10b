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

// expose answers a scrape with the groups of a moment and the server's own families, which
// determine HELP.
func expose(w http.ResponseWriter, r *http.Request, at *moment, own []*dto.MetricFamily, kept *expositions, logger *slog.Logger) {
	for _, f := range own {
		h := at.heads[f.GetName()]
		if h == nil {
			h = &head{name: f.GetName()}
			at.heads[h.name] = h
		}
		h.kind, h.help, h.unit, h.own = f.GetType(), f.GetHelp(), f.GetUnit(), f.Metric
	}
	format := negotiate(r.Header)
	var err error
	var sections []*section
	if encoded := format.FormatType(); at.store != nil && (encoded == expfmt.TypeTextPlain || encoded == expfmt.TypeProtoDelim) {
		sections, err = kept.refresh(at, format)
	}
	if err != nil {
		logger.Error("A scrape can't be answered", "err", err)
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	out := startExposition(w, r, format, kept.zip)
	if err := at.write(out, format, sections); err != nil {
		// The status is out: what is written must not pass for the whole.
		logger.Error("A scrape broke off", "err", err)
		panic(http.ErrAbortHandler)
	}
	out.end()
}

// ServeFamilies answers a scrape with families that come sorted by name, in the
// format and encoding that the request asks for: protobuf or text 0.0.4, and
// OpenMetrics for a client that accepts neither. It holds one of them at a time.
//
// Families of one name that come in a row are parts of one, and must agree in what
// describes it. In protobuf each part is a message of its own, which Prometheus
// takes for the same. A family that can't be encoded is left out and logged.
func ServeFamilies(w http.ResponseWriter, r *http.Request, families iter.Seq[*dto.MetricFamily], logger *slog.Logger) {
	format := negotiate(r.Header)
	out := startExposition(w, r, format, standardGzip)
	defer out.end()
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
}

// exposition is the body of an answer to a scrape.
type exposition struct {
	out *bufio.Writer
	zip *gzipWriter // to out, nil: nothing is compressed
}

// startExposition writes the header of an answer. The body must be ended.
func startExposition(w http.ResponseWriter, r *http.Request, format expfmt.Format, zip *Gzip) *exposition {
	w.Header().Set("Content-Type", string(format))
	w.Header().Add("Vary", "Accept, Accept-Encoding")
	out := &exposition{out: bufio.NewWriterSize(w, 64<<10)}
	if AcceptsGzip(r.Header) {
		w.Header().Set("Content-Encoding", "gzip")
		out.zip = newGzipWriter(out.out, zip)
	}
	return out
}

func (e *exposition) Write(b []byte) (int, error) {
	if e.zip != nil {
		return e.zip.Write(b)
	}
	return e.out.Write(b)
}

// writeSeries writes series of a section.
func (e *exposition) writeSeries(f *sectionFamily) error {
	var err error
	switch {
	case f.plain:
		_, err = e.Write(f.data)
	case e.zip != nil:
		err = e.zip.writeDeflated(f.deflated)
	default:
		err = f.inflate(e.out)
	}
	return err
}

func (e *exposition) end() {
	if e.zip != nil {
		e.zip.Close()
	}
	e.out.Flush() // an error is the scraper's going away
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

// write writes all families. Text and protobuf are put together from sections, the other
// formats are made anew. It returns nil where the scraper went away.
func (at *moment) write(out *exposition, format expfmt.Format, sections []*section) error {
	kind, escaping := format.FormatType(), format.ToEscapingScheme()
	next := make([]int, len(sections)) // family of each
	anew := at.decoder()
	var series []*sectionFamily
	for _, name := range slices.Sorted(maps.Keys(at.heads)) {
		h := at.heads[name]
		series = series[:0]
		for i, sec := range sections {
			if n := next[i]; n < len(sec.families) && sec.families[n].name == name {
				series = append(series, &sec.families[n])
				next[i]++
			}
		}
		var start []byte
		var err error
		switch kind {
		case expfmt.TypeTextPlain:
			start, err = h.text(escaping)
		case expfmt.TypeProtoDelim:
			start, err = h.proto(escaping, series)
		default:
			var f *dto.MetricFamily
			if f, err = anew.decode(h); err == nil && len(f.Metric) > 0 {
				err = expfmt.NewEncoder(out, format).Encode(f)
			}
		}
		if err != nil {
			return fmt.Errorf("metric %q: %w", name, err)
		}
		if _, err := out.Write(start); err != nil {
			return nil
		}
		for _, f := range series {
			if out.writeSeries(f) != nil {
				return nil
			}
		}
	}
	if kind == expfmt.TypeOpenMetrics {
		expfmt.FinalizeOpenMetrics(out)
	}
	return nil
}

// text returns HELP and TYPE, and the server's own series.
func (h *head) text(escaping model.EscapingScheme) ([]byte, error) {
	name := h.name
	if !model.LegacyValidation.IsValidMetricName(name) {
		if name = model.EscapeName(name, escaping); escaping == model.NoEscaping {
			name = `"` + labelEscaper.Replace(name) + `"`
		}
	}
	var out []byte
	if h.help != "" {
		out = fmt.Appendf(out, "# HELP %s %s\n", name, helpEscaper.Replace(h.help))
	}
	kind := typeName(h.kind)
	if h.kind == dto.MetricType_GAUGE_HISTOGRAM {
		kind = "histogram"
	}
	out = fmt.Appendf(out, "# TYPE %s %s\n", name, kind)
	if h.own == nil {
		return out, nil
	}
	own, err := encodeText(h.name, h.kind, h.own, escaping, false)
	return append(out, own...), err
}

var helpEscaper = strings.NewReplacer(`\`, `\\`, "\n", `\n`)

// proto returns what a delimited message has in front of the series that follow: its size,
// all that describes the family, and the server's own series.
func (h *head) proto(escaping model.EscapingScheme, follow []*sectionFamily) ([]byte, error) {
	own, err := encodeProto(h.own)
	if err != nil {
		return nil, err
	}
	name := h.name
	if !model.LegacyValidation.IsValidMetricName(name) {
		name = model.EscapeName(name, escaping)
	}
	start := append(appendFamilyHead(nil, name, h.help, h.unit, h.kind), own...)
	size := len(start)
	for _, f := range follow {
		size += int(f.size)
	}
	return append(appendLength(nil, size), start...), nil
}

// decoder decodes the families of a moment, in the order of their names.
type decoder struct {
	*moment
	next []int // family of each group
}

func (at *moment) decoder() decoder { return decoder{at, make([]int, len(at.slots))} }

// decode returns a whole family.
func (d decoder) decode(h *head) (*dto.MetricFamily, error) {
	f := &dto.MetricFamily{Name: &h.name, Type: &h.kind, Metric: slices.Clone(h.own)}
	if h.help != "" {
		f.Help = &h.help
	}
	for i, slot := range d.slots {
		im, n := d.images[slot], d.next[i]
		if n == len(im.metas) || im.name(n) != h.name {
			continue
		}
		d.next[i]++
		part, err := im.block(n).decode()
		if err != nil {
			return nil, err
		}
		f.Metric = append(f.Metric, part.Metric...)
	}
	return f, nil
}
