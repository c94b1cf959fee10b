package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// exposition returns a text exposition of exactly n bytes, with the mixture that
// exporters have: families with HELP and TYPE, few or many series, labels of
// different lengths, integers and fractions.
func exposition(n int) string {
	random := rand.New(rand.NewPCG(1, 2)) // the same body in each run
	methods := []string{"GET", "POST", "PUT", "DELETE"}
	var b strings.Builder
	b.Grow(n + 256)
	for family := 0; b.Len() < n; family++ {
		fmt.Fprintf(&b, "# HELP app_requests_%d_seconds_total Time that requests of kind %d took, by handler.\n# TYPE app_requests_%d_seconds_total counter\n", family, family, family)
		for series := range 1 + random.IntN(20) {
			fmt.Fprintf(&b, "app_requests_%d_seconds_total{handler=\"/api/v%d/%x\",method=%q,code=\"%d\"} %v\n",
				family, 1+series%3, random.Uint32(), methods[random.IntN(len(methods))], 200+100*random.IntN(4), float64(random.IntN(1e9))/1000)
		}
	}
	text := b.String()[:n]
	// A line that the end cut becomes a comment, which may be of any length.
	start := strings.LastIndexByte(text[:max(n-1, 0)], '\n') + 1
	return text[:start] + padding(n-start)
}

// padding returns one line of n bytes that means nothing.
func padding(n int) string {
	if n < 2 {
		return strings.Repeat("\n", n)
	}
	return "#" + strings.Repeat(" ", n-2) + "\n"
}

// serveBody answers each request with body.
func serveBody(body string, chunked bool) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		// Plain, although scrapers take gzip: the tunnel is to be measured.
		w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
		if chunked {
			w.(http.Flusher).Flush()
		} else {
			w.Header().Set("Content-Length", strconv.Itoa(len(body)))
		}
		io.WriteString(w, body)
	}
}

// startServer serves HTTP on loopback in this process until the stage is closed,
// with TLS where a configuration is given. It returns the address.
func startServer(st *stage, h http.Handler, config *tls.Config) (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	address := l.Addr().String()
	if config != nil {
		l = tls.NewListener(l, config)
	}
	server := &http.Server{Handler: h, ReadHeaderTimeout: time.Minute}
	done := make(chan struct{})
	go func() { defer close(done); server.Serve(l) }()
	st.onClose(func() error { err := server.Close(); <-done; return err })
	return address, nil
}

// exporterOptions is the command line of an exporter that runs as a process of its
// own, in a network namespace say.
type exporterOptions struct {
	address     string
	body, large size
	chunked     bool
}

func (o *exporterOptions) run(ctx context.Context, stdout io.Writer) error {
	l, err := net.Listen("tcp", o.address)
	if err != nil {
		return err
	}
	fmt.Fprintf(stdout, "msg=Listening address=%s\n", l.Addr())
	mux := http.NewServeMux()
	mux.Handle("/metrics", serveBody(exposition(int(o.body)), o.chunked))
	mux.Handle("/large", serveBody(exposition(int(o.large)), o.chunked))
	server := &http.Server{Handler: mux, ReadHeaderTimeout: time.Minute}
	defer context.AfterFunc(ctx, func() { server.Close() })()
	if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}
