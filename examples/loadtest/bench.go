package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"time"
)

// bench is what all scenarios of a run share.
type bench struct {
	*options
	programs string // directory with culvert-proxy and culvert-client
	built    bool   // programs is temporary
	progress *progress
}

// newBench builds the programs, unless there are some or a running proxy is to be
// measured.
func newBench(ctx context.Context, o *options, stderr io.Writer) (*bench, error) {
	b := &bench{options: o, programs: o.Programs, progress: newProgress(stderr)}
	if b.programs != "" || b.ProxyURL != "" {
		return b, nil
	}
	dir, err := os.MkdirTemp("", "culvert-loadtest-programs-")
	if err != nil {
		return nil, err
	}
	b.programs, b.built = dir, true
	for _, name := range []string{"proxy", "client"} {
		b.progress.show("building culvert-%s", name)
		out, err := exec.CommandContext(ctx, "go", "build", "-o", filepath.Join(dir, "culvert-"+name), "github.com/culvert-io/culvert/"+name).CombinedOutput()
		if err != nil {
			return nil, errors.Join(fmt.Errorf("build culvert-%s in this module, or name built ones with --programs: %w\n%s", name, err, out), b.close())
		}
	}
	return b, nil
}

func (b *bench) close() error {
	b.progress.end()
	if !b.built {
		return nil
	}
	return os.RemoveAll(b.programs)
}

// errMissing is what this machine lacks for a scenario, which is then skipped.
type errMissing string

func (e errMissing) Error() string { return string(e) }

// play runs one scenario, and ends what it started.
func (b *bench) play(ctx context.Context, s scenario) (found *result, err error) {
	st, err := newStage()
	if err != nil {
		return nil, err
	}
	defer func() {
		err = errors.Join(err, st.close())
		b.progress.end()
	}()
	b.progress.scenario = s.name
	b.progress.show("starting")
	found = &result{Scenario: s.name, About: s.about}
	if b.Body > 0 {
		found.About += fmt.Sprintf("; with --body=%s", b.Body)
	}
	if b.TLS {
		if st.cert, err = newCertificate(st.dir); err != nil {
			return nil, err
		}
	}
	if b.Scrapers > 0 {
		found.About += fmt.Sprintf("; with --scrapers=%d", b.Scrapers)
	}
	err = s.run(ctx, b, st, found)
	var missing errMissing
	if errors.As(err, &missing) {
		found.Skipped = missing.Error()
		err = nil
	}
	return found, err
}

// proxyProcess is a running culvert-proxy.
type proxyProcess struct {
	*process
	address string
	url     string       // scheme and address
	client  *http.Client // for the proxy's own routes
}

// startProxy starts a proxy on an address, with its state in memory unless args
// say otherwise.
func (b *bench) startProxy(ctx context.Context, st *stage, address string, args ...string) (*proxyProcess, error) {
	args = append([]string{"--web.listen-address=" + address, "--agent.settle-time=0"}, args...)
	scheme := "http"
	if st.cert != nil {
		scheme = "https"
		args = append(args, "--web.config.file="+st.cert.webConfig)
	}
	p, err := st.start("culvert-proxy", filepath.Join(b.programs, "culvert-proxy"), args...)
	if err != nil {
		return nil, err
	}
	line, err := p.awaitLog(ctx, `msg=Listening address=(\S+)`)
	if err != nil {
		return nil, err
	}
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: st.cert.clientTLS()}, Timeout: time.Minute}
	st.onClose(func() error { client.CloseIdleConnections(); return nil })
	return &proxyProcess{process: p, address: line[1], url: scheme + "://" + line[1], client: client}, nil
}

// clientArgs are the arguments of a culvert-client called web-1 that opens one
// port of its host.
func clientArgs(proxyURL, port string, more ...string) []string {
	return append([]string{"--proxy-url=" + proxyURL, "--fqdn=web-1", "--allow=" + port, "--metrics-addr="}, more...)
}

// startClient starts a culvert-client with arguments of clientArgs, and waits until
// the proxy has accepted it. prefix is what runs it, as in "ip netns exec NAME", or
// nothing.
func (b *bench) startClient(ctx context.Context, st *stage, prefix, args []string) (*process, error) {
	command := append(append(prefix[:len(prefix):len(prefix)], filepath.Join(b.programs, "culvert-client")), args...)
	p, err := st.start("culvert-client", command[0], command[1:]...)
	if err != nil {
		return nil, err
	}
	_, err = p.awaitLog(ctx, `msg=Connected`)
	return p, err
}

// freeAddress returns a free address on loopback, for programs that can't choose
// one and tell which.
func freeAddress() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}
