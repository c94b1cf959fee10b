package gateway

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"slices"
	"strings"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"google.golang.org/protobuf/encoding/protodelim"
)

// ErrBodyTooLarge is returned by readBody where the body, as sent or
// decompressed, is larger than allowed.
var ErrBodyTooLarge = errors.New("the body is too large")

// readBody returns the decompressed body of a push, of at most limit bytes. An
// encoding that it doesn't know is ignored, as the Pushgateway does.
func readBody(r *http.Request, limit int64) (io.Reader, func(), error) {
	var body io.Reader = &limitedReader{r: r.Body, left: limit}
	done := func() {}
	switch strings.ToLower(r.Header.Get("Content-Encoding")) {
	case "gzip":
		zr, err := gzip.NewReader(body)
		if err != nil {
			return nil, nil, fmt.Errorf("the body is not gzip: %w", err)
		}
		body = zr
	case "snappy": // framed
		body = s2.NewReader(body, s2.ReaderMaxBlockSize(64<<10))
	case "zstd":
		zr, err := zstd.NewReader(body, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(64<<20))
		if err != nil {
			return nil, nil, fmt.Errorf("the body is not zstd: %w", err)
		}
		body, done = zr, zr.Close
	default:
		return body, done, nil
	}
	return &limitedReader{r: body, left: limit}, done, nil
}

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

// parseBody reads the families of a push, sorted by name. The format is chosen by
// the Content-Type: delimited protobuf, else text 0.0.4.
func parseBody(contentType string, body io.Reader) ([]*dto.MetricFamily, error) {
	var families map[string]*dto.MetricFamily
	var err error
	if isProtobuf(contentType) {
		families, err = parseProtobuf(body)
	} else {
		parser := expfmt.NewTextParser(model.UTF8Validation)
		families, err = parser.TextToMetricFamilies(body)
	}
	if err != nil {
		return nil, err
	}
	sorted := make([]*dto.MetricFamily, 0, len(families))
	for _, f := range families {
		sorted = append(sorted, f)
	}
	slices.SortFunc(sorted, func(a, b *dto.MetricFamily) int { return strings.Compare(a.GetName(), b.GetName()) })
	return sorted, nil
}

func isProtobuf(contentType string) bool {
	mediaType, params, err := mime.ParseMediaType(contentType)
	return err == nil && mediaType == "application/vnd.google.protobuf" &&
		params["proto"] == "io.prometheus.client.MetricFamily" && params["encoding"] == "delimited"
}

// parseProtobuf reads messages with their length in front. Of two messages with
// one name the later counts.
func parseProtobuf(body io.Reader) (map[string]*dto.MetricFamily, error) {
	r := bufio.NewReader(body)
	families := map[string]*dto.MetricFamily{}
	for n := 1; ; n++ {
		f := new(dto.MetricFamily)
		// The limit on the body bounds a message too.
		err := protodelim.UnmarshalOptions{MaxSize: -1}.UnmarshalFrom(r, f)
		if err == io.EOF {
			return families, nil
		}
		if err != nil {
			return nil, fmt.Errorf("protobuf message %d: %w", n, err)
		}
		families[f.GetName()] = f
	}
}
