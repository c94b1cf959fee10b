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

	"github.com/cespare/xxhash/v2"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/model"
	"google.golang.org/protobuf/proto"

	"github.com/culvert-io/culvert/gateway"
)

const textSuffix, openMetricsSuffix = ".prom", ".om"

// maxFilled is how many labels may be filled in for all series of one family of a file.
const maxFilled = 1 << 20

// file is what is known of a file. It is immutable.
type file struct {
	path    string
	info    os.FileInfo // of what was read
	readAt  time.Time
	fail    *failure        // of the content; there are no families then
	content blob            // its families, sorted by name, as encodeFamily writes them
	metrics [][]*dto.Metric // the series of each family; nil where they are not kept
	kept    int64           // bytes of text that are kept parsed
	// bases and suffixed tell whether it has families whose samples have suffixes, and
	// families whose names end in one: only then can names clash.
	bases, suffixed bool
}

// meta describes a family.
type meta struct {
	name, help, unit string
	kind             dto.MetricType
}

// unchanged reports whether the file need not be read again.
func (f *file) unchanged(info os.FileInfo) bool {
	return sameFile(f.info, info) && f.readAt.Sub(info.ModTime()) > settled
}

func sameFile(a, b os.FileInfo) bool {
	return os.SameFile(a, b) && a.ModTime().Equal(b.ModTime()) && a.Size() == b.Size() && a.Mode() == b.Mode() && changedAt(a) == changedAt(b)
}

// read reads a file and stores its families. Its series are kept in memory where it has
// no more than keep bytes, and what is stored where that has no more than memory bytes.
// What is wrong with the content is in the result; the failure is what may be gone the
// next time though the file is the same.
func (c *Collector) read(path string, keep, memory int64) (*file, *failure) {
	f, body, fail := c.readBytes(path)
	if fail != nil && fail.reason == ReasonChanged {
		f, body, fail = c.readBytes(path) // a quick writer is done by now
	}
	if fail != nil {
		if fail.reason == ReasonTooLarge {
			f.fail = fail
			return f, nil
		}
		return nil, fail
	}
	encoded, fail := f.parse(body, c.encoded[:0], int64(len(body)) <= keep)
	if f.fail = fail; fail != nil {
		const most = 500
		if text := f.fail.Error(); len(text) > most { // it may repeat a line
			f.fail.err = errors.New(strings.ToValidUTF8(text[:most], "") + "…")
		}
		return f, nil
	}
	c.encoded = encoded
	f.content = c.spill.put(encoded, memory)
	if f.metrics != nil {
		f.kept = int64(len(body))
	}
	return f, nil
}

func (c *Collector) readBytes(path string) (f *file, body []byte, fail *failure) {
	in, info, fail := open(path)
	if fail != nil {
		return nil, nil, fail
	}
	defer in.Close()
	f = &file{path: path, info: info, readAt: time.Now()}
	limit := c.config.MaxFileSize
	// What the size says can be wrong, as in /proc.
	b := bytes.NewBuffer(c.buffer[:0])
	if info.Size() <= limit {
		b.Grow(int(info.Size()) + bytes.MinRead)
		_, err := b.ReadFrom(io.LimitReader(in, limit+1))
		c.buffer = b.Bytes()
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

// parse appends the families of the file to encoded. It keeps their series if keep is set.
func (f *file) parse(body, encoded []byte, keep bool) ([]byte, *failure) {
	families, fail := f.families(body)
	if fail != nil {
		return nil, fail
	}
	for _, p := range families {
		for _, m := range p.Metric {
			if m.TimestampMs != nil {
				return nil, failf(ReasonTimestamp, "%s: metric %q: timestamps are not allowed; the time of the file is in %s", f.path, p.GetName(), mtimeName)
			}
		}
	}
	slices.SortFunc(families, func(a, b *dto.MetricFamily) int { return strings.Compare(a.GetName(), b.GetName()) })
	metrics := make([][]*dto.Metric, len(families))
	for i, p := range families {
		count := len(p.Metric)
		if fail := complete(p); fail != nil {
			return nil, failf(fail.reason, "%s: metric %q: %w", f.path, p.GetName(), fail.err)
		}
		var err error
		if encoded, err = encodeFamily(encoded, p, count-len(p.Metric)); err != nil {
			return nil, failf(ReasonParse, "%s: metric %q: %w", f.path, p.GetName(), err)
		}
		for _, suffix := range suffixes {
			f.bases = f.bases || hasSuffix(p.GetType(), suffix)
			f.suffixed = f.suffixed || strings.HasSuffix(p.GetName(), suffix)
		}
		metrics[i] = p.Metric
	}
	if keep {
		f.metrics = metrics
	}
	return encoded, nil
}

// families reads the text.
func (f *file) families(body []byte) ([]*dto.MetricFamily, *failure) {
	if !strings.HasSuffix(f.path, openMetricsSuffix) {
		families, err := gateway.ParseText(body)
		if err == nil {
			err = checkText(body)
		}
		if err != nil {
			return nil, failf(ReasonParse, "%s: %w", f.path, err)
		}
		return families, nil
	}
	if !ended(body) {
		return nil, failf(ReasonParse, "%s: there is no # EOF at its end, so it may be cut off", f.path)
	}
	found, err := gateway.ParseOpenMetrics(body)
	if err != nil {
		return nil, failf(ReasonParse, "%s: %w", f.path, err)
	}
	families := make([]*dto.MetricFamily, len(found))
	for i, f := range found {
		families[i] = f.MetricFamily
	}
	return families, nil
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
	gateway.SortSeries(f.Metric)
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

// checkText returns an error for what the parser of text format 0.0.4 takes and
// node_exporter does not. The text must have been parsed.
func checkText(body []byte) error {
	n := 0
	for line := range bytes.Lines(body) {
		n++
		name, keyword, rest := lineName(line)
		word := bytes.TrimLeft(rest, " \t")
		if len(name) == 0 && len(word) > 0 && (word[0] == '{' || word[0] == '"') {
			return fmt.Errorf("line %d: quoted metric names are not allowed here", n)
		}
		if keyword != "TYPE" || len(name) == 0 {
			continue
		}
		if kind := strings.ToUpper(string(word)); strings.HasPrefix(kind, "GAUGE") && kind != "GAUGE" {
			return fmt.Errorf("line %d: type %s is not one of this format; write OpenMetrics to a file *%s", n, word, openMetricsSuffix)
		}
	}
	return nil
}

// lineName returns the metric name in a line of text format, "" where there is none; the
// keyword, where it is HELP or TYPE; and what follows the name, up to the end of the
// line.
func lineName(line []byte) (name []byte, keyword string, rest []byte) {
	line = bytes.TrimLeft(bytes.TrimSuffix(line, []byte("\n")), " \t")
	if len(line) > 0 && line[0] == '#' {
		line = bytes.TrimLeft(line[1:], " \t")
		end := bytes.IndexAny(line, " \t")
		if end < 0 {
			return nil, "", nil
		}
		if keyword = string(line[:end]); keyword != "HELP" && keyword != "TYPE" {
			return nil, "", nil
		}
		line = bytes.TrimLeft(line[end:], " \t")
	}
	end := 0
	for end < len(line) && isNameByte(line[end]) {
		end++
	}
	return line[:end], keyword, line[end:]
}

func isNameByte(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || c == '_' || c == ':'
}
