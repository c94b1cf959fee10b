package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"time"
)

// subject is something that answers requests, and is measured.
type subject struct {
	name         string
	client       *http.Client
	request      func(ctx context.Context, n int) (*http.Request, error) // the n-th of a round
	size         size                                                    // of the body; 0: any
	got          func(resp *http.Response, body int64)                   // is told of good answers, where given
	proxy, agent *process                                                // whose CPU time and memory are shown; nil: nobody's
}

// Headers of a scrape, as Prometheus 3 sends them.
const (
	scrapeAccept = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,application/openmetrics-text;version=0.0.1;q=0.5," +
		"text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
	scrapeTimeoutHeader = "X-Prometheus-Scrape-Timeout-Seconds"
)

// newScrape returns a subject that scrapes as Prometheus does: with keep-alive, its
// headers, and proxy_url where one is given. target gives the URL of the n-th
// scrape of a round.
func newScrape(st *stage, name, proxyURL string, config *tls.Config, body size, target func(n int) string) (*subject, error) {
	transport := &http.Transport{
		MaxIdleConnsPerHost: 1000,
		DisableCompression:  true, // like Prometheus, which asks for gzip by itself
		TLSClientConfig:     config,
		IdleConnTimeout:     5 * time.Minute,
	}
	if proxyURL != "" {
		u, err := url.Parse(proxyURL)
		if err != nil {
			return nil, err
		}
		transport.Proxy = http.ProxyURL(u)
	}
	st.onClose(func() error { transport.CloseIdleConnections(); return nil })
	return &subject{
		name:   name,
		client: &http.Client{Transport: transport, Timeout: requestTimeout},
		size:   body,
		request: func(ctx context.Context, n int) (*http.Request, error) {
			req, err := http.NewRequestWithContext(ctx, http.MethodGet, target(n), nil)
			if err != nil {
				return nil, err
			}
			req.Header.Set("Accept", scrapeAccept)
			req.Header.Set("Accept-Encoding", "gzip")
			req.Header.Set("User-Agent", "Prometheus/3.0.0")
			req.Header.Set(scrapeTimeoutHeader, fmt.Sprint(requestTimeout.Seconds()-1))
			return req, nil
		},
	}, nil
}

// always returns a target that is the same for every scrape.
func always(u string) func(int) string { return func(int) string { return u } }

// ways returns the ways to one exporter with a body of this size, Culvert's last:
// directly, through two nginx hops where nginx is installed, through the proxy
// that was named.
func (b *bench) ways(ctx context.Context, st *stage, body size) ([]*subject, error) {
	if b.ProxyURL != "" {
		return b.runningWays(ctx, st)
	}
	// With TLS to the proxy, the agent's way to the exporter stays plain, as that of
	// nginx's second hop does; the direct scrape is what needs it.
	handler := serveBody(exposition(int(body)), b.Chunked)
	exporter, err := startServer(st, handler, nil)
	if err != nil {
		return nil, err
	}
	directly, scheme := exporter, "http"
	if st.cert != nil {
		scheme = "https"
		if directly, err = startServer(st, handler, st.cert.server); err != nil {
			return nil, err
		}
	}
	_, port, _ := net.SplitHostPort(exporter)

	subjects, err := b.baselines(ctx, st, exporter, scheme+"://"+directly+"/metrics", port, body, st.cert)
	if err != nil {
		return nil, err
	}
	agentArgs := []string{"--scrape.local-host=127.0.0.1"}
	if st.cert != nil {
		agentArgs = append(agentArgs, "--tls.cacert="+st.cert.certFile)
	}
	proxy, err := b.startProxy(ctx, st, "127.0.0.1:0", "--storage.path=")
	if err != nil {
		return nil, err
	}
	agent, err := b.startClient(ctx, st, nil, clientArgs(proxy.url, port, agentArgs...))
	if err != nil {
		return nil, err
	}
	culvert, err := newScrape(st, "culvert", proxy.url, st.cert.clientTLS(), body, always("http://web-1:"+port+"/metrics"))
	if err != nil {
		return nil, err
	}
	culvert.proxy, culvert.agent = proxy.process, agent
	return append(subjects, culvert), nil
}

// runningWays returns the ways to a target by what the command line names.
func (b *bench) runningWays(ctx context.Context, st *stage) (subjects []*subject, err error) {
	if b.DirectURL != "" {
		u, err := url.Parse(b.DirectURL)
		if err != nil {
			return nil, err
		}
		upstream := ""
		if u.Scheme == "http" && u.Path == "/metrics" && u.Port() != "" {
			upstream = u.Host
		}
		if subjects, err = b.baselines(ctx, st, upstream, b.DirectURL, u.Port(), 0, nil); err != nil {
			return nil, err
		}
	}
	culvert, err := newScrape(st, "culvert", b.ProxyURL, nil, 0, always(b.Target))
	return append(subjects, culvert), err
}

// baselines returns the other ways to an exporter. Without an upstream there is no
// nginx; with a certificate its hops speak TLS.
func (b *bench) baselines(ctx context.Context, st *stage, upstream, directURL, port string, body size, cert *certificate) ([]*subject, error) {
	var clientTLS *tls.Config
	scheme := "http"
	if cert != nil {
		clientTLS, scheme = cert.client, "https"
	}
	direct, err := newScrape(st, "direct", "", clientTLS, body, always(directURL))
	if err != nil {
		return nil, err
	}
	subjects := []*subject{direct}
	if _, err := exec.LookPath("nginx"); err == nil && upstream != "" {
		far, err := startNginx(ctx, st, "http", upstream, cert)
		if err != nil {
			return nil, err
		}
		near, err := startNginx(ctx, st, scheme, far, cert)
		if err != nil {
			return nil, err
		}
		nginx, err := newScrape(st, "two nginx hops", "", clientTLS, body, always(scheme+"://"+near+"/metrics"))
		if err != nil {
			return nil, err
		}
		subjects = append(subjects, nginx)
	}
	if b.CompareProxyURL != "" {
		other, err := newScrape(st, b.CompareProxyURL, b.CompareProxyURL, nil, body, always("http://"+net.JoinHostPort(b.CompareHost, port)+"/metrics"))
		if err != nil {
			return nil, err
		}
		subjects = append(subjects, other)
	}
	return subjects, nil
}

// startNginx starts nginx as a reverse proxy that keeps its connections, and
// returns its address. All else is at its defaults, proxy_buffering too.
func startNginx(ctx context.Context, st *stage, scheme, upstream string, cert *certificate) (string, error) {
	address, err := freeAddress()
	if err != nil {
		return "", err
	}
	dir, err := os.MkdirTemp(st.dir, "nginx-")
	if err != nil {
		return "", err
	}
	temp, user, listen := "", "", ""
	for _, kind := range []string{"client_body", "proxy", "fastcgi", "uwsgi", "scgi"} {
		temp += fmt.Sprintf("%s_temp_path %s/%s; ", kind, dir, kind)
	}
	if os.Geteuid() == 0 {
		user = "user root; " // its workers need the directory
	}
	if cert != nil {
		listen = fmt.Sprintf(" ssl; ssl_certificate %s; ssl_certificate_key %s", cert.certFile, cert.keyFile)
	}
	config := fmt.Sprintf(`
daemon off; pid %[1]s/pid; error_log stderr; worker_processes auto; %[2]s
events { worker_connections 4096; }
http {
	access_log off;
	%[3]s
	upstream next { server %[4]s; keepalive 256; }
	server {
		listen %[5]s;
		location / { proxy_pass %[6]s://next; proxy_http_version 1.1; proxy_set_header Connection ""; }
	}
}`, dir, user, temp, upstream, address+listen, scheme)
	file := filepath.Join(dir, "nginx.conf")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		return "", err
	}
	p, err := st.start("nginx", "nginx", "-p", dir, "-e", "stderr", "-c", file)
	if err != nil {
		return "", err
	}
	for deadline := time.Now().Add(10 * time.Second); ; {
		conn, err := net.DialTimeout("tcp", address, time.Second)
		if err == nil {
			return address, conn.Close()
		}
		if p.ended() || time.Now().After(deadline) {
			return "", p.failure("does not listen")
		}
		if err := pause(ctx, 10*time.Millisecond); err != nil {
			return "", err
		}
	}
}
