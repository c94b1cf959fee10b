package gateway

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// ErrBodyTooLarge is returned where the body of a push, as sent or decompressed,
// is larger than allowed.
var ErrBodyTooLarge = errors.New("the body is too large")

const (
	// smallBody is up to which size in bytes bodies are read without asking for
	// memory, and in which steps larger ones ask.
	smallBody = 1 << 20
	// tinyBody is up to which size in bytes pushes may wait for the store without a
	// place for parsing: as many as the store lets wait.
	tinyBody = 64 << 10
	// readPause is how long a client may send nothing.
	readPause = 30 * time.Second
	// maxRead is how long a whole body may take.
	maxRead = 10 * time.Minute
)

// pushBody is the body of a push, with what that holds until release.
type pushBody struct {
	gateway *Gateway
	content []byte
	buf     *bytes.Buffer
	close   func()        // of the decompressor
	memory  int64         // taken of Gateway.memory
	place   chan struct{} // for parsing, nil: none
}

// enter takes a place for parsing, if the body has none. It waits for one as long as a
// change would wait.
func (b *pushBody) enter(r *http.Request) error {
	if b.place != nil {
		return nil
	}
	places := b.gateway.parsing
	if len(b.content) > smallBody {
		places = b.gateway.parsingLarge
	}
	select {
	case places <- struct{}{}:
		b.place = places
		return nil
	default:
	}
	timer := time.NewTimer(queueWait)
	defer timer.Stop()
	select {
	case places <- struct{}{}:
		b.place = places
		return nil
	case <-timer.C:
		return fmt.Errorf("%w: other pushes are being read; try again later", ErrBusy)
	case <-r.Context().Done():
		return r.Context().Err()
	}
}

// parsed gives the place for parsing back, if what was made of the body is small enough
// to wait in a crowd.
func (b *pushBody) parsed() {
	if len(b.content) <= tinyBody {
		b.leave()
	}
}

func (b *pushBody) leave() {
	if b.place != nil {
		<-b.place
		b.place = nil
	}
}

// release gives back what the body holds, its content too.
func (b *pushBody) release() {
	b.leave()
	if b.memory > 0 {
		b.gateway.memory.Release(b.memory)
	}
	if b.buf != nil && b.buf.Cap() <= smallBody {
		buffers.Put(b.buf)
	}
	if b.close != nil {
		b.close()
	}
	b.content, b.buf, b.memory, b.close = nil, nil, 0, nil
}

// readBody reads the body of a push, which what names, and takes a place for parsing it.
// It is to be released if there is no error.
func (g *Gateway) readBody(w http.ResponseWriter, r *http.Request, what func() string) (b pushBody, err error) {
	b.gateway = g
	defer func() {
		if err != nil {
			b.release()
		}
		if errors.Is(err, ErrBodyTooLarge) {
			err = fmt.Errorf("%w: %s may have %d bytes, decompressed too (--push.max-body-size)", ErrBodyTooLarge, what(), g.config.MaxBodySize)
		}
	}()
	if r.ContentLength > g.config.MaxBodySize {
		return b, ErrBodyTooLarge
	}
	sent := &patientReader{body: r.Body, conn: http.NewResponseController(w), end: time.Now().Add(maxRead)}
	defer sent.stop()
	body, closeBody, err := decompress(&limitedReader{r: sent, left: g.config.MaxBodySize}, r.Header.Get("Content-Encoding"), g.config.MaxBodySize, g.config.Gzip)
	if err != nil {
		return b, bodyError(what, sent, err)
	}
	b.close = closeBody
	b.buf = buffers.Get().(*bytes.Buffer)
	b.buf.Reset()
	if n := r.ContentLength; n > 0 && n <= smallBody {
		b.buf.Grow(int(n) + bytes.MinRead) // what ReadFrom wants to have left at the end
	}
	// Who sends slowly holds no more memory than what has come.
	for size := int64(0); int64(b.buf.Len()) == size; size += smallBody {
		if size > 0 {
			if err := g.takeMemory(r); err != nil {
				return b, err
			}
			b.memory += smallBody
		}
		if _, err := b.buf.ReadFrom(io.LimitReader(body, smallBody)); err != nil {
			return b, bodyError(what, sent, err)
		}
	}
	b.content = b.buf.Bytes()
	g.metrics.size.Observe(float64(len(b.content)))
	return b, b.enter(r)
}

// takeMemory takes smallBody bytes of what the bodies of large pushes may have.
func (g *Gateway) takeMemory(r *http.Request) error {
	ctx, cancel := context.WithTimeout(r.Context(), queueWait)
	defer cancel()
	if g.memory.Acquire(ctx, smallBody) != nil {
		return fmt.Errorf("%w: other large pushes are being read; try again later", ErrBusy)
	}
	return nil
}

var buffers = sync.Pool{New: func() any { return new(bytes.Buffer) }}

// bodyError tells a client that sends too slowly from one that sends nonsense.
func bodyError(what func() string, sent *patientReader, err error) error {
	switch {
	case errors.Is(err, ErrBodyTooLarge):
		return err
	case sent.timeout != nil:
		return fmt.Errorf("the body of %s did not come in time: %w", what(), sent.timeout)
	}
	return badRequest{fmt.Errorf("the body of %s: %w", what(), err)}
}

// patientReader reads a body whose sender may pause, but not for ever.
type patientReader struct {
	body    io.Reader
	conn    *http.ResponseController
	end     time.Time
	timeout error
}

func (p *patientReader) Read(b []byte) (int, error) {
	deadline := time.Now().Add(readPause)
	if deadline.After(p.end) {
		deadline = p.end
	}
	_ = p.conn.SetReadDeadline(deadline) // a connection without deadlines has its server's
	n, err := p.body.Read(b)
	if timeout, ok := errors.AsType[interface {
		error
		Timeout() bool
	}](err); ok && timeout.Timeout() {
		p.timeout = err
	}
	return n, err
}

func (p *patientReader) stop() {
	if p.timeout == nil {
		_ = p.conn.SetReadDeadline(time.Time{})
	}
}

// decompress returns the content of a body, of at most limit bytes. An encoding
// that it doesn't know is ignored, as the Pushgateway does.
func decompress(body io.Reader, encoding string, limit int64, zip *Gzip) (io.Reader, func(), error) {
	done := func() {}
	switch strings.ToLower(encoding) {
	case "gzip":
		zr, err := zip.NewReader(body)
		if err != nil {
			return nil, nil, fmt.Errorf("it is not gzip, as its Content-Encoding says: %w", err)
		}
		body = zr
	case "snappy": // framed
		body = readFunc(s2.NewReader(body, s2.ReaderMaxBlockSize(64<<10)).Read)
	case "zstd":
		zr, err := zstd.NewReader(body, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(64<<20))
		if err != nil {
			return nil, nil, fmt.Errorf("it is not zstd, as its Content-Encoding says: %w", err)
		}
		body, done = readFunc(zr.Read), zr.Close
	default:
		return body, done, nil
	}
	return &limitedReader{r: body, left: limit}, done, nil
}

// readFunc is an io.Reader of one method. Where a program uses text/template, the linker
// keeps all methods of a type whose values become interfaces, and those decoders have
// many.
type readFunc func(b []byte) (int, error)

func (f readFunc) Read(b []byte) (int, error) { return f(b) }

// limitedReader fails beyond its limit, where io.LimitReader would just end: a
// body that is cut there may still parse.
type limitedReader struct {
	r    io.Reader
	left int64
}

func (l *limitedReader) Read(p []byte) (int, error) {
	if l.left < 0 {
		return 0, ErrBodyTooLarge
	}
	if int64(len(p)) > l.left+1 {
		p = p[:l.left+1]
	}
	n, err := l.r.Read(p)
	if l.left -= int64(n); l.left < 0 {
		return n, ErrBodyTooLarge
	}
	return n, err
}

// format is one of those in which a body may be.
type format int

const (
	formatText format = iota
	formatProtobuf
	formatOpenMetrics
)

// formatOf chooses the format by the Content-Type: delimited protobuf, OpenMetrics
// 1.0, else text 0.0.4.
func formatOf(contentType string) format {
	if strings.HasPrefix(contentType, "text/plain") { // of nearly all pushes; there is no need to parse it
		return formatText
	}
	mediaType, params, _ := mime.ParseMediaType(contentType)
	switch {
	case mediaType == "application/vnd.google.protobuf" && params["proto"] == "io.prometheus.client.MetricFamily" && params["encoding"] == "delimited":
		return formatProtobuf
	case mediaType == "application/openmetrics-text":
		return formatOpenMetrics
	}
	return formatText
}

// parse reads the families of a body, sorted by name.
func (f format) parse(body []byte) ([]*dto.MetricFamily, error) {
	parse := parseText
	switch f {
	case formatProtobuf:
		parse = parseProtobuf
	case formatOpenMetrics:
		parse = parseOpenMetrics
	}
	families, err := parse(body)
	if err != nil {
		return nil, err
	}
	return sortFamilies(families), nil
}

func sortFamilies(families map[string]*dto.MetricFamily) []*dto.MetricFamily {
	sorted := make([]*dto.MetricFamily, 0, len(families))
	for _, family := range families {
		sorted = append(sorted, family)
	}
	slices.SortFunc(sorted, func(a, b *dto.MetricFamily) int { return strings.Compare(a.GetName(), b.GetName()) })
	return sorted
}

// ParseText reads text format 0.0.4 as a push in that format is read, and returns
// the families sorted by name. Nothing of them refers to body. Timestamps are kept,
// and labels are not checked: see CheckSeries.
func ParseText(body []byte) ([]*dto.MetricFamily, error) {
	families, err := parseText(body)
	if err != nil {
		return nil, err
	}
	return sortFamilies(families), nil
}

// parseText reads text format 0.0.4.
//
// A sample with its name between the braces, as UTF-8 names need it, is read by the
// parser as if it were one of the metric above it: summaries and histograms get
// mixed up so, and a sample without a name is taken for that metric's. A HELP line
// that has no text behind the name does nothing but tell the parser which metric
// comes now, so each such sample gets one.
func parseText(body []byte) (families map[string]*dto.MetricFamily, err error) {
	text, added, err := nameBraceLines(body)
	if err != nil {
		return nil, err
	}
	defer func() {
		if p := recover(); p != nil {
			families, err = nil, fmt.Errorf("text format parsing error: the parser failed: %v", p)
		}
	}()
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err = parser.TextToMetricFamilies(bytes.NewReader(text))
	if parseErr, ok := errors.AsType[expfmt.ParseError](err); ok {
		before, _ := slices.BinarySearch(added, parseErr.Line)
		parseErr.Line -= before
		err = parseErr
	}
	return families, err
}

// nameBraceLines puts a HELP line in front of every line that starts with a brace.
// It returns the numbers of the lines that it put in. It returns an error where
// such a line has no metric name.
func nameBraceLines(body []byte) (text []byte, added []int, err error) {
	if !bytes.HasPrefix(body, []byte("{")) && !bytes.Contains(body, []byte("\n{")) && !bytes.Contains(body, []byte(" {")) && !bytes.Contains(body, []byte("\t{")) {
		return body, nil, nil
	}
	n := 0
	for line := range bytes.Lines(body) {
		n++
		if trimmed := bytes.TrimLeft(line, " \t"); len(trimmed) > 0 && trimmed[0] == '{' {
			name := nameInBraces(trimmed[1:])
			if name == nil {
				return nil, nil, expfmt.ParseError{Line: n - len(added), Msg: "there is no metric name in front of or between the braces"}
			}
			text = append(append(append(text, "# HELP "...), name...), " \n"...)
			added = append(added, n)
			n++
		}
		text = append(text, line...)
	}
	return text, added, nil
}

// nameInBraces returns the first name of a label set that no "=" follows, as it is
// written, nil where there is none. The opening brace is cut off.
func nameInBraces(s []byte) []byte {
	blank := func() { s = bytes.TrimLeft(s, " \t") }
	for {
		blank()
		name, ok := cutToken(&s)
		if !ok {
			return nil
		}
		blank()
		if len(s) == 0 || s[0] != '=' {
			return name
		}
		s = s[1:]
		blank()
		if _, ok := cutToken(&s); !ok {
			return nil
		}
		blank()
		if len(s) == 0 || s[0] != ',' {
			return nil
		}
		s = s[1:]
	}
}

// cutToken cuts a quoted string, or what goes up to the next mark or blank.
func cutToken(s *[]byte) (token []byte, ok bool) {
	all := *s
	end := bytes.IndexAny(all, "=,{} \t\"\n")
	if len(all) > 0 && all[0] == '"' {
		end = 1
		for end < len(all) && all[end] != '"' && all[end] != '\n' {
			if all[end] == '\\' {
				end++
			}
			end++
		}
		if end >= len(all) || all[end] == '\n' {
			return nil, false
		}
		end++
	}
	if end <= 0 {
		return nil, false
	}
	*s = all[end:]
	return all[:end], true
}

// parseProtobuf reads messages with their length as a varint in front. Of two
// messages with one name the later counts.
func parseProtobuf(body []byte) (map[string]*dto.MetricFamily, error) {
	families := map[string]*dto.MetricFamily{}
	for n := 1; len(body) > 0; n++ {
		message, size := protowire.ConsumeBytes(body)
		if size < 0 {
			return nil, fmt.Errorf("protobuf message %d is cut off, or no delimited io.prometheus.client.MetricFamily", n)
		}
		f := new(dto.MetricFamily)
		if err := (proto.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(message, f); err != nil {
			return nil, fmt.Errorf("protobuf message %d: %w", n, err)
		}
		families[f.GetName()] = f
		body = body[size:]
	}
	return families, nil
}
