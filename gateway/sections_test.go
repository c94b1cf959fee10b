package gateway_test

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"google.golang.org/protobuf/encoding/protodelim"
	"google.golang.org/protobuf/proto"

	"github.com/culvert-io/culvert/gateway"
	"github.com/culvert-io/culvert/gateway/fastgzip"
)

// TestSections scrapes again and again between changes of groups: what is kept of the
// last scrape must not show. All that scrapes give is compared with what the groups are
// as messages, encoded by the library for expositions.
func TestSections(t *testing.T) {
	for name, zip := range map[string]*gateway.Gzip{"standard": nil, "fast": fastgzip.Gzip} {
		t.Run(name, func(t *testing.T) {
			s := startGateway(t, gateway.Config{Gzip: zip}, gateway.StoreConfig{}, gateway.Memory())
			random := rand.New(rand.NewPCG(1, 2))
			path := func(n int) string { return fmt.Sprintf("/job-%d/instance/host-%d", n%3, n) }
			push := func(n int) {
				var body strings.Builder
				for family := range 1 + random.IntN(5) {
					fmt.Fprintf(&body, "# HELP family_%02d What is counted.\n# TYPE family_%02[1]d gauge\n", family)
					for series := range 1 + random.IntN(2) {
						fmt.Fprintf(&body, "family_%02d{kind=\"%d\",text=\"a \\\"b\\\" \\\\ \\n c\"} %v\n", family, series, []float64{-0.5, 0, 17, 1e6, 123456, 1.5e300, -1e5}[random.IntN(7)])
					}
				}
				if random.IntN(4) == 0 {
					fmt.Fprintf(&body, "# TYPE hist histogram\nhist_bucket{le=\"1\"} 1\nhist_bucket{le=\"+Inf\"} %d\nhist_sum 1\nhist_count %[1]d\n", 1+random.IntN(9))
				}
				if random.IntN(4) == 0 {
					fmt.Fprintf(&body, "{\"named.by.utf8\",\"a.b\"=\"%d\"} %d\nother{\"a.b\"=\"c\"} 1\n", random.IntN(2), n)
				}
				s.want(http.StatusOK, []string{http.MethodPut, http.MethodPost}[random.IntN(2)], path(n), body.String())
			}
			for n := range 250 {
				push(n)
			}
			for round := range 4 {
				switch {
				case round%3 == 1: // a few change
					for range 5 {
						push(random.IntN(300))
					}
				case round%3 == 2: // some go
					for range 20 {
						s.want(http.StatusAccepted, http.MethodDelete, path(random.IntN(300)), "")
					}
				}
				expectAlike(t, s)
			}
		})
	}
}

// expectAlike scrapes in all formats, and compares with what the store gathers.
func expectAlike(t *testing.T, s server) {
	t.Helper()
	families, err := s.store.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, escaping := range []string{"", ";escaping=values", ";escaping=dots", ";escaping=allow-utf-8"} {
		for _, accept := range []string{"text/plain;version=1.0.0", protobufType, "application/openmetrics-text;version=1.0.0"} {
			if escaping != "" && accept[0] == 'a' && accept != protobufType {
				continue // nothing is kept of it
			}
			plain := s.scrape("Accept", accept+escaping)
			var want bytes.Buffer
			format := expfmt.Format(plain.Header().Get("Content-Type"))
			for _, f := range families {
				if err := expfmt.NewEncoder(&want, format).Encode(proto.Clone(f).(*dto.MetricFamily)); err != nil {
					t.Fatal(err)
				}
			}
			if format.FormatType() == expfmt.TypeOpenMetrics {
				expfmt.FinalizeOpenMetrics(&want)
			}
			if format.FormatType() == expfmt.TypeProtoDelim {
				if got, want := readDelimited(t, plain.Body.Bytes()), readDelimited(t, want.Bytes()); !slices.EqualFunc(got, want, func(a, b *dto.MetricFamily) bool { return proto.Equal(a, b) }) {
					t.Fatalf("%s: got %v, want %v", format, got, want)
				}
			} else if plain.Body.String() != want.String() {
				t.Fatalf("%s: got\n%.2000s\nwant\n%.2000s", format, plain.Body, want.String())
			}
			zipped := s.scrape("Accept", accept+escaping, "Accept-Encoding", "gzip")
			zr, err := gzip.NewReader(zipped.Body)
			if err != nil {
				t.Fatal(err)
			}
			zr.Multistream(false) // some clients stop after the first member
			unzipped, err := io.ReadAll(zr)
			if err != nil || !bytes.Equal(unzipped, plain.Body.Bytes()) {
				t.Fatalf("%s: by gzip there are other %d bytes than the %d, %v", format, len(unzipped), plain.Body.Len(), err)
			}
			if rest, err := io.ReadAll(zipped.Body); err != nil || len(rest) > 0 {
				t.Fatalf("%s: %d bytes follow the gzip file, %v", format, len(rest), err)
			}
		}
	}
}

func readDelimited(t *testing.T, message []byte) (families []*dto.MetricFamily) {
	t.Helper()
	for r := bufio.NewReader(bytes.NewReader(message)); ; {
		f := new(dto.MetricFamily)
		err := protodelim.UnmarshalFrom(r, f)
		if errors.Is(err, io.EOF) {
			return families
		} else if err != nil {
			t.Fatal(err)
		}
		families = append(families, f)
	}
}

// TestSectionsAtOnce has many scrape while many push: the race detector looks on.
func TestSectionsAtOnce(t *testing.T) {
	s := startGateway(t, gateway.Config{Gzip: fastgzip.Gzip}, gateway.StoreConfig{}, gateway.Memory())
	var all sync.WaitGroup
	for worker := range 8 {
		all.Go(func() {
			for n := range 200 {
				if worker%2 == 0 {
					s.want(http.StatusOK, http.MethodPut, fmt.Sprintf("/j/instance/%d", (n*worker)%150), fmt.Sprintf("a{worker=\"%d\"} %d\nb 1\n", worker, n))
				} else if text := s.scrape().Body.String(); strings.Count(text, "\na{") != strings.Count(text, "\nb{") {
					t.Errorf("half a push is in\n%s", text)
				}
			}
		})
	}
	all.Wait()
	expectAlike(t, s)
}
