package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/culvert-io/culvert/client/agent"
	"github.com/culvert-io/culvert/protocol"
)

const (
	doctorTimeout = 15 * time.Second // of one step
	mark          = "ok"
	markFailed    = "FAILED"
	markSkipped   = "-"
)

// errUnhealthy ends doctor with exit status 1; the report has said the rest.
var errUnhealthy = errors.New("something needs attention; see above")

// doctor walks the way from here to the proxies and to the targets, in the order
// in which a scrape depends on it. It stops at the first step of a way that
// fails, and says what to do.
func doctor(ctx context.Context, out io.Writer, flags *flags) error {
	settings, err := flags.load()
	if err != nil {
		return err
	}
	a, err := agent.New(settings.Agent)
	if err != nil {
		return err
	}
	r := &report{out: out}
	fmt.Fprintf(out, "agent %q\n", a.Name())
	for _, proxy := range a.ProxyURLs() {
		fmt.Fprintf(out, "\nproxy %s\n", proxy.Redacted())
		r.checkProxy(ctx, a, proxy, settings.Agent)
	}
	fmt.Fprintln(out, "\ntargets")
	r.checkTargets(ctx, a, flags.doctorTarget)
	if r.failed {
		return errUnhealthy
	}
	return nil
}

type report struct {
	out    io.Writer
	failed bool
}

func (r *report) ok(step, format string, args ...any) {
	fmt.Fprintf(r.out, "  %-7s %-13s %s\n", mark, step, fmt.Sprintf(format, args...))
}

func (r *report) skip(step, format string, args ...any) {
	fmt.Fprintf(r.out, "  %-7s %-13s %s\n", markSkipped, step, fmt.Sprintf(format, args...))
}

// fail reports a step that failed and what to do about it.
func (r *report) fail(step string, err error, advice string) {
	r.failed = true
	fmt.Fprintf(r.out, "  %-7s %-13s %v\n", markFailed, step, err)
	if advice != "" {
		fmt.Fprintf(r.out, "  %-7s %-13s → %s\n", "", "", advice)
	}
}

// checkProxy: DNS, proxy, TLS, upgrade or WebSocket, credentials, registration.
func (r *report) checkProxy(ctx context.Context, a *agent.Agent, proxy *agent.ProxyURL, config agent.Config) {
	host, port := proxy.Hostname(), proxy.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[proxy.Scheme]
	}
	forward, err := http.ProxyFromEnvironment(&http.Request{URL: proxy.URL})
	if err != nil {
		r.fail("DNS", fmt.Errorf("HTTPS_PROXY or HTTP_PROXY of the environment: %w", err), "correct or unset the variable")
		return
	}
	dialHost, dialPort := host, port
	if forward != nil {
		dialHost, dialPort = forward.Hostname(), forward.Port()
		if dialPort == "" {
			dialPort = map[string]string{"http": "80", "https": "443"}[forward.Scheme]
		}
		r.ok("environment", "%s goes through the HTTP proxy %s", proxy.Host, forward.Redacted())
	}

	stepCtx, cancel := context.WithTimeout(ctx, doctorTimeout)
	defer cancel()
	addrs, err := net.DefaultResolver.LookupHost(stepCtx, dialHost)
	if err != nil {
		r.fail("DNS", err, "check the host in --proxy-url, and this machine's resolver")
		return
	}
	r.ok("DNS", "%s is %s", dialHost, strings.Join(addrs, ", "))

	conn, err := (&net.Dialer{}).DialContext(stepCtx, "tcp", net.JoinHostPort(dialHost, dialPort))
	if err != nil {
		advice := "is culvert-proxy running there, and does the firewall let this host out to that port? With --agent.listen-address the port for agents differs from the one for scrapers"
		if forward != nil {
			advice = "check HTTPS_PROXY; NO_PROXY names hosts that are reached without it"
		}
		r.fail("proxy", err, advice)
		return
	}
	r.ok("proxy", "%s takes connections", conn.RemoteAddr())
	if proxy.Scheme == "https" {
		if err := checkTLS(stepCtx, conn, forward != nil, net.JoinHostPort(host, port), host, config.TLS, r); err != nil {
			return
		}
	} else {
		conn.Close()
		r.skip("TLS", "the URL says http: nothing on this way is encrypted")
	}
	if config.Protocol == agent.ProtocolPushProx {
		r.checkPolls(ctx, a, proxy)
		return
	}
	r.checkSession(ctx, a, proxy, config.Protocol)
}

// checkPolls looks for a pushprox-proxy. It does not poll: that would end the poll of the
// agent that runs here.
func (r *report) checkPolls(ctx context.Context, a *agent.Agent, proxy *agent.ProxyURL) {
	ctx, cancel := context.WithTimeout(ctx, doctorTimeout)
	defer cancel()
	listed, err := a.ListedByPushProx(ctx, proxy)
	switch {
	case err != nil:
		r.fail("polls", err, "there is no pushprox-proxy at this URL, or something in front of it hides its list of clients: check the URL and its path")
	case listed:
		r.ok("polls", "a pushprox-proxy, which lists this agent: it, or another of its name, polls")
	default:
		r.ok("polls", "a pushprox-proxy, which does not list this agent: none of its name has polled for some minutes")
	}
}

// checkTLS does a handshake of its own, so that its errors can be told apart.
func checkTLS(ctx context.Context, conn net.Conn, forwarded bool, authority, host string, tlsConfig *tls.Config, r *report) error {
	defer conn.Close()
	if deadline, ok := ctx.Deadline(); ok {
		conn.SetDeadline(deadline)
	}
	if forwarded {
		fmt.Fprintf(conn, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n", authority, authority)
		resp, err := http.ReadResponse(bufio.NewReader(conn), &http.Request{Method: http.MethodConnect})
		if err == nil && resp.StatusCode != http.StatusOK {
			err = fmt.Errorf("the HTTP proxy answered CONNECT %s with %s", authority, resp.Status)
		}
		if err != nil {
			r.fail("TLS", err, "have the HTTP proxy allow CONNECT to this host and port")
			return err
		}
	}
	config := tlsConfig.Clone()
	if config.ServerName == "" {
		config.ServerName = host
	}
	t := tls.Client(conn, config)
	if err := t.HandshakeContext(ctx); err != nil {
		advice := "compare the certificate with the host in --proxy-url"
		var verification *tls.CertificateVerificationError
		var record tls.RecordHeaderError
		switch {
		case errors.As(err, &record):
			advice = "the other side doesn't speak TLS there; should the URL say http?"
		case errors.As(err, &verification):
			advice = "name the CA that signed it with --tls.cacert, or renew the certificate"
		}
		r.fail("TLS", err, advice)
		return err
	}
	state := t.ConnectionState()
	leaf := state.PeerCertificates[0]
	r.ok("TLS", "%s, certificate for %s, valid until %s", tls.VersionName(state.Version), strings.Join(leaf.DNSNames, ", "), leaf.NotAfter.Format(time.DateOnly))
	return nil
}

// checkSession: the handshake, then the registration without its effect.
func (r *report) checkSession(ctx context.Context, a *agent.Agent, proxy *agent.ProxyURL, protocols agent.Protocol) {
	ctx, cancel := context.WithTimeout(ctx, 2*doctorTimeout)
	defer cancel()
	session, err := a.Dial(ctx, proxy)
	if err != nil {
		refusal, ok := protocol.AsRefusal(err)
		if protocols == agent.ProtocolAuto && protocol.NoTunnel(err) {
			if listed, noPolls := a.ListedByPushProx(ctx, proxy); noPolls == nil {
				r.skip("upgrade", "the proxy knows no tunnel, as a pushprox-proxy: the agent polls until it does")
				if !listed {
					r.ok("polls", "it does not list this agent: none of its name has polled for some minutes")
				} else {
					r.ok("polls", "it lists this agent: it, or another of its name, polls")
				}
				return
			}
		}
		switch {
		case ok && refusal.Status == http.StatusUnauthorized, ok && refusal.Status == http.StatusForbidden:
			r.ok("upgrade", "the request got through")
			r.fail("credentials", err, "the proxy's configuration names the credentials for this agent")
		case ok && refusal.Code == protocol.CodeNoUpgrade:
			r.fail("upgrade", err, "have the reverse proxy in front pass the upgrade on, raw or as WebSocket")
		case ok && refusal.Code == "":
			r.fail("upgrade", err, "the answer is not culvert-proxy's: check the URL and its path, and what is in front of the proxy")
		default:
			r.fail("upgrade", err, "")
		}
		return
	}
	defer session.Close()
	rtt, err := session.Ping(ctx)
	if err != nil {
		r.fail("upgrade", fmt.Errorf("the tunnel opened, and carried nothing: %w", err), "something on the way cuts or inspects it")
		return
	}
	r.ok("upgrade", "tunnel by %s, round trip %s", session.Transport, rtt.Round(10*time.Microsecond))
	r.ok("credentials", "accepted")
	err = session.CheckRegistration(ctx, a.Registration())
	refusal, refused := protocol.AsRefusal(err)
	switch {
	case refused && refusal.Code == protocol.CodeTaken:
		r.ok("registration", "%s (that is as it should be if it is this host's own agent)", refusal.Message)
	case refused && (refusal.Status == http.StatusForbidden || refusal.Status == http.StatusUnauthorized):
		r.fail("registration", err, "the credentials don't cover this name, a host or a label")
	case err != nil:
		r.fail("registration", err, "")
	default:
		r.ok("registration", "would be accepted")
	}
}

// checkTargets asks the targets as a scrape through the proxy would.
func (r *report) checkTargets(ctx context.Context, a *agent.Agent, asked string) {
	var urls []string
	declared := map[string]string{}
	for _, t := range a.Registration().Targets {
		declared[t.Name] = (&url.URL{Scheme: "http", Host: t.Name + "." + a.Name(), Path: t.ScrapePath(), RawQuery: url.Values(t.Params).Encode()}).String()
		if asked == "" {
			urls = append(urls, declared[t.Name])
		}
	}
	switch {
	case asked == "":
	case declared[asked] != "":
		urls = append(urls, declared[asked])
	case strings.Trim(asked, "0123456789") == "":
		urls = append(urls, "http://"+a.Name()+":"+asked+"/metrics")
	case strings.Contains(asked, ":") && !strings.Contains(asked, "/"):
		urls = append(urls, "http://"+asked+"/metrics")
	default:
		r.fail("target", fmt.Errorf("%q is no target of this agent", asked), "declare it with --target="+asked+"=URL, or ask for a PORT or HOST:PORT")
		return
	}
	if len(urls) == 0 {
		r.skip("target", "none is declared; ask for a port with: culvert-client doctor [FLAGS] 9100")
		return
	}
	for _, u := range urls {
		r.checkTarget(ctx, a, u)
	}
}

func (r *report) checkTarget(ctx context.Context, a *agent.Agent, u string) {
	ctx, cancel := context.WithTimeout(ctx, doctorTimeout)
	defer cancel()
	start := time.Now()
	resp, err := a.Scrape(ctx, u)
	if err != nil {
		r.fail("target", fmt.Errorf("%s: %w", u, err), "")
		return
	}
	defer resp.Body.Close()
	if code := resp.Header.Get(protocol.HeaderError); code != "" {
		message, _ := bufio.NewReader(io.LimitReader(resp.Body, 2048)).ReadString('\n')
		step := "target"
		if protocol.Code(code) == protocol.CodeNotAllowed {
			step = "--allow"
		}
		r.fail(step, fmt.Errorf("%s: %s", u, strings.TrimSpace(message)), "")
		return
	}
	r.ok("--allow", "%s may be scraped", u)
	n, err := io.Copy(io.Discard, resp.Body)
	switch {
	case err != nil:
		r.fail("target", fmt.Errorf("%s broke off after %d bytes: %w", u, n, err), "look at the exporter's log")
	case resp.StatusCode != http.StatusOK:
		r.fail("target", fmt.Errorf("%s answered %s", u, resp.Status), "look at the exporter, its path and its credentials")
	default:
		r.ok("target", "%s answered %s, %d bytes of %s in %s", u, resp.Status, n, resp.Header.Get("Content-Type"), time.Since(start).Round(time.Millisecond))
	}
}
