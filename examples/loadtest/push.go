package main

import (
	"context"
	"fmt"
	"net/http"
	"os/exec"
	"path/filepath"
	"strings"
)

// pushedSeries is how many series a push has.
const pushedSeries = 50

// push has pushers replace one group each. The Pushgateway beside it keeps its
// groups in memory; Culvert has each on disk before it answers.
func push(ctx context.Context, b *bench, st *stage, found *result) error {
	if err := b.ours(); err != nil {
		return err
	}
	if b.TLS {
		return errMissing("--tls is not for pushes: the Pushgateway that they are compared with has none")
	}
	proxy, err := b.startProxy(ctx, st, "127.0.0.1:0", "--storage.path="+filepath.Join(st.dir, "data"))
	if err != nil {
		return err
	}
	pushers := b.scrapers(8)
	var subjects []*subject
	if program, err := exec.LookPath("prometheus-pushgateway"); err == nil {
		p, err := st.start("Pushgateway", program, "--web.listen-address=127.0.0.1:0", "--persistence.file=")
		if err != nil {
			return err
		}
		line, err := p.awaitLog(ctx, `msg="?Listening on"? address=(\S+)`)
		if err != nil {
			return err
		}
		gateway := newPusher(st, "Pushgateway", "http://"+line[1], pushers)
		gateway.proxy = p
		subjects = append(subjects, gateway)
	}
	culvert := newPusher(st, "culvert", proxy.url, pushers)
	culvert.proxy = proxy.process
	return b.compare(ctx, found, append(subjects, culvert), pushers)
}

// newPusher returns a subject that takes pushes to so many groups.
func newPusher(st *stage, name, url string, groups int) *subject {
	transport := &http.Transport{MaxIdleConnsPerHost: 1000}
	st.onClose(func() error { transport.CloseIdleConnections(); return nil })
	return &subject{
		name:   name,
		client: &http.Client{Transport: transport, Timeout: requestTimeout},
		request: func(ctx context.Context, n int) (*http.Request, error) {
			var body strings.Builder
			body.WriteString("# HELP batch_items Items by kind.\n# TYPE batch_items gauge\n")
			for i := range pushedSeries {
				fmt.Fprintf(&body, "batch_items{kind=\"kind-%d\",stage=\"load\"} %d\n", i, n+i)
			}
			req, err := http.NewRequestWithContext(ctx, http.MethodPut, fmt.Sprintf("%s/metrics/job/loadtest/instance/%d", url, n%groups), strings.NewReader(body.String()))
			if err != nil {
				return nil, err
			}
			req.Header.Set("Content-Type", "text/plain; version=0.0.4")
			return req, nil
		},
	}
}
