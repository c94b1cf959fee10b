package gateway

import (
	"bytes"
	"io"
	"testing"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/s2"
	"github.com/klauspost/compress/zstd"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/textparse"
)

// FuzzBody sends bytes the way of a body: decompressed, parsed, checked and encoded.
// What is accepted has to be an exposition that Prometheus reads, in text and in
// protobuf.
func FuzzBody(f *testing.F) {
	encodings := []string{"", "gzip", "snappy", "zstd"}
	text := []byte("# HELP h help\n# TYPE h histogram\nh_bucket{le=\"1\"} 1\nh_sum 1\nh_count 2\n{\"m.a\",\"l.b\"=\"c\"} 1\n{\"s\",quantile=\"0.5\"} 2\nm{a=\"b\"} 1 5\n")
	families, err := formatText.parse(text)
	if err != nil {
		f.Fatal(err)
	}
	var message bytes.Buffer
	encoder := expfmt.NewEncoder(&message, expfmt.NewFormat(expfmt.TypeProtoDelim))
	for _, family := range families {
		if err := encoder.Encode(family); err != nil {
			f.Fatal(err)
		}
	}
	bodies := [][]byte{formatText: text, formatProtobuf: message.Bytes(), formatOpenMetrics: []byte("# TYPE m counter\n# UNIT m bytes\nm_total{a=\"b\"} 1 # {x=\"y\"} 2 3\n# EOF\n")}
	for format, body := range bodies {
		for encoding, name := range encodings {
			var packed bytes.Buffer
			var w io.WriteCloser
			switch name {
			case "gzip":
				w = gzip.NewWriter(&packed)
			case "snappy":
				w = s2.NewWriter(&packed, s2.WriterSnappyCompat())
			case "zstd":
				if w, err = zstd.NewWriter(&packed); err != nil {
					f.Fatal(err)
				}
			default:
				packed.Write(body)
			}
			if w != nil {
				w.Write(body)
				w.Close()
			}
			f.Add(byte(format), byte(encoding), packed.Bytes())
		}
	}
	f.Fuzz(func(t *testing.T, formatByte, encoding byte, body []byte) {
		const limit = 1 << 16
		r, done, err := decompress(&limitedReader{r: bytes.NewReader(body), left: limit}, encodings[int(encoding)%len(encodings)], limit, standardGzip)
		if err != nil {
			return
		}
		defer done()
		content, err := io.ReadAll(r)
		if len(content) > limit+1 {
			t.Fatalf("%d bytes came out, %d are allowed", len(content), limit)
		}
		if err != nil {
			return
		}
		families, err := format(formatByte % 3).parse(content)
		if err != nil {
			return
		}
		pushed, reasons := prepare(testKey, families, 1)
		if len(reasons) > 0 {
			return
		}
		for _, p := range pushed.families {
			if p.meta.Value().foreign {
				continue
			}
			name, kind := p.meta.Value().name, typeName(p.meta.Value().kind)
			if kind == "gauge_histogram" {
				kind = "histogram"
			}
			exposition := append([]byte("# TYPE "+name+" "+kind+"\n"), p.appendText(nil)...)
			if err := readAll(exposition, "text/plain; version=0.0.4"); err != nil {
				t.Fatalf("Prometheus can't read\n%s\n%v", exposition, err)
			}
			head := appendFamilyHead(nil, name, "", "", p.meta.Value().kind)
			series := p.appendProto(nil)
			message := append(append(appendLength(nil, len(head)+len(series)), head...), series...)
			if err := readAll(message, string(expfmt.NewFormat(expfmt.TypeProtoDelim))); err != nil {
				family, _ := p.decode()
				t.Fatalf("Prometheus can't read %v: %v", family, err)
			}
		}
	})
}

// readAll reads an exposition with Prometheus's parser.
func readAll(exposition []byte, contentType string) error {
	p, err := textparse.New(exposition, contentType, labels.NewSymbolTable(), textparse.ParserOptions{})
	if err != nil {
		return err
	}
	for {
		entry, err := p.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		var l labels.Labels
		switch entry {
		case textparse.EntrySeries, textparse.EntryHistogram:
			p.Labels(&l)
		}
		if entry == textparse.EntryHistogram {
			if _, _, integer, float := p.Histogram(); integer != nil {
				err = integer.Validate()
			} else {
				err = float.Validate()
			}
			if err != nil {
				return err
			}
		}
	}
}
