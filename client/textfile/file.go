package textfile

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"
	"unicode/utf8"
	"unique"

	"github.com/cespare/xxhash/v2"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/model"
	"google.golang.org/protobuf/proto"

	"github.com/culvert-io/culvert/gateway"
)

const textSuffix, openMetricsSuffix = ".prom", ".om"

// maxFilled is how many labels may be filled in for all series of one family of a file.
const maxFilled = 1 << 20

// file is what is known of a file: its index, and its series if it is small. It is
// immutable.
type file struct {
	path     string
	info     os.FileInfo // of what was read
	readAt   time.Time
	fail     *failure // of the content; there are no families then
	families []family // sorted by name
	kept     int64    // bytes of text that are kept parsed
}

// family is one family of a file.
type family struct {
	meta     unique.Handle[meta]
	segments []segment // its lines in the file
	sum      uint64    // hash of its lines
	series   []uint64  // hashes of its series, ascending
	// duplicates is how many more the file has of series that are there already.
	duplicates int
	metrics    []*dto.Metric // nil where they are not kept
}

// meta describes a family. Files often have the same ones, so it is shared.
type meta struct {
	name, help, unit string
	kind             dto.MetricType
}

// segment is where lines start and end in a file.
type segment struct{ start, end uint32 }

// errChanged is returned where a file is not what the index says.
var errChanged = errors.New("it was changed while the exposition was written")

// unchanged reports whether the file need not be read again.
func (f *file) unchanged(info os.FileInfo) bool {
	return sameFile(f.info, info) && f.readAt.Sub(info.ModTime()) > settled
}

func sameFile(a, b os.FileInfo) bool {
	return os.SameFile(a, b) && a.ModTime().Equal(b.ModTime()) && a.Size() == b.Size() && a.Mode() == b.Mode()
}

// read reads a file into buffer and makes its index. Its series are kept where it has no
// more than keep bytes. What is wrong with the content is in the result; the failure is
// what may be gone the next time though the file is the same.
func (c *Collector) read(path string, buffer *[]byte, keep int64) (*file, *failure) {
	f, body, fail := c.readBytes(path, buffer)
	if fail != nil && fail.reason == ReasonChanged {
		f, body, fail = c.readBytes(path, buffer) // a quick writer is done by now
	}
	if fail != nil {
		if fail.reason == ReasonTooLarge {
			f.fail = fail
			return f, nil
		}
		return nil, fail
	}
	if f.fail = f.index(body, int64(len(body)) <= keep); f.fail != nil {
		f.families = nil
		const most = 500
		if text := f.fail.Error(); len(text) > most { // it may repeat a line
			f.fail.err = errors.New(strings.ToValidUTF8(text[:most], "") + "…")
		}
	} else if int64(len(body)) <= keep {
		f.kept = int64(len(body))
	}
	return f, nil
}

func (c *Collector) readBytes(path string, buffer *[]byte) (f *file, body []byte, fail *failure) {
	in, info, fail := open(path)
	if fail != nil {
		return nil, nil, fail
	}
	defer in.Close()
	f = &file{path: path, info: info, readAt: time.Now()}
	limit := c.config.MaxFileSize
	// What the size says can be wrong, as in /proc.
	b := bytes.NewBuffer((*buffer)[:0])
	if info.Size() <= limit {
		b.Grow(int(info.Size()) + bytes.MinRead)
		_, err := b.ReadFrom(io.LimitReader(in, limit+1))
		*buffer = b.Bytes()
		if err != nil {
			return nil, nil, ioFailure(err)
		}
	}
	if info.Size() > limit || int64(b.Len()) > limit {
		return f, nil, failf(ReasonTooLarge, "%s has more than %d bytes (--textfile.max-file-size)", path, limit)
	}
	after, err := in.Stat()
	if err != nil {
		return nil, nil, ioFailure(err)
	}
	if !sameFile(info, after) {
		return nil, nil, failf(ReasonChanged, "%s changes while it is read; write to another name and rename", path)
	}
	return f, b.Bytes(), nil
}

// open opens a regular file, and waits for nobody.
func open(path string) (*os.File, os.FileInfo, *failure) {
	in, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		fail := ioFailure(err)
		if fail.reason == ReasonPermission {
			fail.err = fmt.Errorf("%w; let the agent's user read it, as with chmod o+r %s", err, path)
		}
		return nil, nil, fail
	}
	info, err := in.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is no regular file (%s)", path, info.Mode())
	}
	if err != nil {
		in.Close()
		return nil, nil, ioFailure(err)
	}
	return in, info, nil
}

// index fills in the families.
func (f *file) index(body []byte, keep bool) *failure {
	if strings.HasSuffix(f.path, openMetricsSuffix) && !ended(body) {
		return failf(ReasonParse, "%s: there is no # EOF at its end, so it may be cut off", f.path)
	}
	parsed, places, err := parse(f.path, body)
	if err != nil {
		return failf(ReasonParse, "%s: %w", f.path, err)
	}
	for _, p := range parsed {
		for _, m := range p.Metric {
			if m.TimestampMs != nil {
				return failf(ReasonTimestamp, "%s: metric %q: timestamps are not allowed; the time of the file is in %s", f.path, p.GetName(), mtimeName)
			}
		}
	}
	for _, p := range parsed {
		segments := places[p.GetName()]
		count := len(p.Metric)
		if fail := complete(p); fail != nil {
			return failf(fail.reason, "%s: metric %q: %w", f.path, p.GetName(), fail.err)
		}
		out := family{
			meta:       unique.Make(meta{p.GetName(), p.GetHelp(), p.GetUnit(), p.GetType()}),
			segments:   segments,
			series:     make([]uint64, len(p.Metric)),
			duplicates: count - len(p.Metric),
		}
		for i, m := range p.Metric {
			out.series[i] = hashSeries(m.Label)
		}
		slices.Sort(out.series)
		var d xxhash.Digest
		d.Reset()
		for _, s := range segments {
			d.Write(body[s.start:s.end])
		}
		out.sum = d.Sum64()
		if keep {
			out.metrics = p.Metric
		}
		f.families = append(f.families, out)
	}
	return nil
}

// load returns the series of a family, complete and in order. They must not be changed.
// It returns errChanged where the file is not what it was.
func (f *file) load(fam *family, buffer *[]byte) ([]*dto.Metric, error) {
	if fam.metrics != nil {
		return fam.metrics, nil
	}
	in, info, fail := open(f.path)
	if fail != nil {
		return nil, fail
	}
	defer in.Close()
	if !sameFile(f.info, info) {
		return nil, errChanged
	}
	text := (*buffer)[:0]
	for _, s := range fam.segments {
		at := len(text)
		text = slices.Grow(text, int(s.end-s.start))[:at+int(s.end-s.start)]
		if _, err := in.ReadAt(text[at:], int64(s.start)); err != nil {
			return nil, errChanged
		}
	}
	*buffer = text
	if xxhash.Sum64(text) != fam.sum {
		return nil, errChanged
	}
	// It parses as it did in the file.
	parsed, _, err := parse(f.path, text)
	if err != nil {
		return nil, err
	}
	if len(parsed) != 1 || parsed[0].GetName() != fam.meta.Value().name {
		return nil, fmt.Errorf("its lines read as %d families", len(parsed))
	}
	if fail := complete(parsed[0]); fail != nil {
		return nil, fail
	}
	return parsed[0].Metric, nil
}

// find returns the family of that name.
func (f *file) find(name string) *family {
	i, ok := slices.BinarySearchFunc(f.families, name, func(fam family, name string) int { return strings.Compare(fam.meta.Value().name, name) })
	if !ok {
		return nil
	}
	return &f.families[i]
}

// parse reads a whole file, or lines of it, and tells for each family where its lines
// are.
func parse(path string, body []byte) ([]*dto.MetricFamily, map[string][]segment, error) {
	if !strings.HasSuffix(path, openMetricsSuffix) {
		families, err := gateway.ParseText(body)
		if err != nil {
			return nil, nil, err
		}
		places, err := splitText(body)
		return families, places, err
	}
	found, err := gateway.ParseOpenMetrics(body)
	if err != nil {
		return nil, nil, err
	}
	families, places := make([]*dto.MetricFamily, len(found)), make(map[string][]segment, len(found))
	for i, f := range found {
		families[i] = f.MetricFamily
		places[f.GetName()] = []segment{{uint32(f.Start), uint32(f.End)}}
	}
	return families, places, nil
}

// ended reports whether OpenMetrics text has its end mark. What has none may be cut off.
func ended(body []byte) bool {
	text := bytes.TrimSuffix(body, []byte("\n"))
	return string(text) == "# EOF" || bytes.HasSuffix(text, []byte("\n# EOF"))
}

// complete makes the series of a family what is written out: their labels sorted, with
// an empty value for each label that only others have; the series sorted, each once. It
// returns a failure where the family can't be served.
func complete(f *dto.MetricFamily) *failure {
	if !model.LegacyValidation.IsValidMetricName(f.GetName()) {
		return failf(ReasonLabel, "the name does not follow the rules: letters, digits, _ and :, no digit in front")
	}
	if !utf8.ValidString(f.GetHelp()) || !utf8.ValidString(f.GetUnit()) {
		return failf(ReasonParse, "the HELP text or the unit is not UTF-8")
	}
	if strings.TrimSpace(f.GetHelp()) == "" {
		f.Help = nil
	}
	seen := map[string]bool{}
	var before []*dto.LabelPair // of the series in front
	for _, m := range f.Metric {
		slices.SortFunc(m.Label, func(a, b *dto.LabelPair) int { return strings.Compare(a.GetName(), b.GetName()) })
		if err := gateway.CheckSeries(m, f.GetType()); err != nil {
			return failf(ReasonLabel, "%w", err)
		}
		if !slices.EqualFunc(m.Label, before, func(a, b *dto.LabelPair) bool { return a.GetName() == b.GetName() }) {
			for _, l := range m.Label {
				if !seen[l.GetName()] && !model.LegacyValidation.IsValidLabelName(l.GetName()) {
					return failf(ReasonLabel, "label name %q does not follow the rules: letters, digits and _, no digit in front", l.GetName())
				}
				seen[l.GetName()] = true
			}
		}
		before = m.Label
	}
	names := slices.Sorted(maps.Keys(seen))
	missing := 0
	for _, m := range f.Metric {
		missing += len(names) - len(m.Label)
	}
	if missing > maxFilled {
		return failf(ReasonLabel, "its series have %d label names between them; with all of them on each series it would have %d labels more", len(names), missing)
	}
	if missing > 0 {
		empty := make([]*dto.LabelPair, len(names))
		for i := range names {
			empty[i] = &dto.LabelPair{Name: &names[i], Value: proto.String("")}
		}
		for _, m := range f.Metric {
			if len(m.Label) == len(names) {
				continue
			}
			own := m.Label
			m.Label = make([]*dto.LabelPair, 0, len(names))
			for i, name := range names {
				if len(own) > 0 && own[0].GetName() == name {
					m.Label = append(m.Label, own[0])
					own = own[1:]
				} else {
					m.Label = append(m.Label, empty[i])
				}
			}
		}
	}
	slices.SortStableFunc(f.Metric, gateway.CompareSeries)
	f.Metric = slices.CompactFunc(f.Metric, func(a, b *dto.Metric) bool { return gateway.CompareSeries(a, b) == 0 })
	return nil
}

// hashSeries tells series of one family apart. Prometheus takes an empty label for
// none.
func hashSeries(labels []*dto.LabelPair) uint64 {
	var d xxhash.Digest
	d.Reset()
	for _, l := range labels {
		if l.GetValue() != "" {
			d.WriteString(l.GetName())
			d.WriteString("\xff") // which UTF-8 doesn't have
			d.WriteString(l.GetValue())
			d.WriteString("\xff")
		}
	}
	return d.Sum64()
}

// splitText tells which lines of text format 0.0.4 are about which family, the way in
// which the parser decides it. The text must have been parsed.
func splitText(body []byte) (map[string][]segment, error) {
	places := map[string][]segment{}
	kinds := map[string]string{} // by family, TYPE in upper case
	// of returns the family that a line with this name is about.
	of := func(name string) string {
		if _, ok := kinds[name]; ok {
			return name
		}
		for _, suffix := range []string{"_count", "_sum", "_bucket"} {
			base, ok := strings.CutSuffix(name, suffix)
			if !ok {
				continue
			}
			switch kind := kinds[base]; {
			case kind == "SUMMARY" && suffix != "_bucket", kind == "HISTOGRAM":
				return base
			}
		}
		kinds[name] = ""
		return name
	}
	start, n := 0, 0
	for line := range bytes.Lines(body) {
		end := start + len(line)
		n++
		name, keyword, rest := lineName(line)
		word := strings.TrimLeft(rest, " \t")
		switch {
		case name == "" && (strings.HasPrefix(word, "{") || strings.HasPrefix(word, `"`)):
			return nil, fmt.Errorf("line %d: quoted metric names are not allowed here", n)
		case name == "" || keyword != "" && rest == "": // a comment, or nothing
		default:
			name = of(name)
			if keyword == "TYPE" && word != "" {
				if kinds[name] = strings.ToUpper(word); strings.HasPrefix(kinds[name], "GAUGE") && kinds[name] != "GAUGE" {
					return nil, fmt.Errorf("line %d: type %s is not one of this format; write OpenMetrics to a file *%s", n, word, openMetricsSuffix)
				}
			}
			segments := places[name]
			if last := len(segments) - 1; last >= 0 && segments[last].end == uint32(start) {
				segments[last].end = uint32(end)
			} else {
				places[name] = append(segments, segment{uint32(start), uint32(end)})
			}
		}
		start = end
	}
	return places, nil
}

// lineName returns the metric name in a line of text format, "" where there is none; the
// keyword, where it is HELP or TYPE; and what follows the name, up to the end of the
// line.
func lineName(line []byte) (name, keyword, rest string) {
	line = bytes.TrimLeft(bytes.TrimSuffix(line, []byte("\n")), " \t")
	if len(line) > 0 && line[0] == '#' {
		line = bytes.TrimLeft(line[1:], " \t")
		end := bytes.IndexAny(line, " \t")
		if end < 0 {
			return "", "", ""
		}
		keyword = string(line[:end])
		if keyword != "HELP" && keyword != "TYPE" {
			return "", "", ""
		}
		line = bytes.TrimLeft(line[end:], " \t")
	}
	end := 0
	for end < len(line) && isNameByte(line[end]) {
		end++
	}
	return string(line[:end]), keyword, string(line[end:])
}

func isNameByte(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '_' || c == ':'
}
