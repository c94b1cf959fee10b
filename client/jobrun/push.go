package jobrun

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/common/model"

	"github.com/culvert-io/culvert/gateway"
)

// DefaultURL is where an agent takes the pushes of its host.
const DefaultURL = "http://127.0.0.1:9091"

// ErrRefused is returned where trying again would be of no use: the endpoint answered
// that it will not take the push, or its certificate is not to be trusted.
var ErrRefused = errors.New("refused")

const (
	// The bounds of the first wait between two tries and of all of them; a wait is a
	// random part of its bound, at least half of it, because cron starts the jobs of
	// many hosts in the same second.
	firstWait = 500 * time.Millisecond
	maxWait   = 5 * time.Second
	// A try may take this part of the time for all of them.
	triesInTime = 3
	// How many bytes of an answer are read for its reason.
	maxAnswer = 4 << 10
)

// Target says where pushes go, and to which group.
type Target struct {
	// URL is the base URL of a push endpoint, http or https, with a user and a
	// password where it wants them; HOST:PORT; or unix:PATH of a socket.
	URL string
	// Authorize, if not nil, adds the credentials to the header of each try, in place of
	// the user in URL. Where it fails, so does the try.
	Authorize func(http.Header) error
	// TLS is used towards https. Nil means the defaults of crypto/tls.
	TLS *tls.Config
	// Group is the grouping key.
	Group gateway.Key
	// Interval and TTL are those of the group, as the push store reads them: "24h",
	// "7d", "0" for none. An empty one keeps what the store has.
	Interval, TTL string
}

// Pusher pushes to a group by the Pushgateway's API.
type Pusher struct {
	client *http.Client
	url    url.URL // of the group
	shown  string  // the endpoint, without credentials
	// authorize adds credentials to a header. Nil means that there are none.
	authorize func(http.Header) error
	group     gateway.Key
}

// NewPusher returns an error that names what is wrong with the target.
func NewPusher(t Target) (*Pusher, error) {
	transport := &http.Transport{Proxy: http.ProxyFromEnvironment, TLSClientConfig: t.TLS, DisableKeepAlives: true}
	p := &Pusher{group: t.Group, authorize: t.Authorize}
	if path, ok := strings.CutPrefix(t.URL, "unix:"); ok {
		if path == "" {
			return nil, fmt.Errorf("push URL %q: the path is missing; it looks like unix:/run/culvert/push.sock", t.URL)
		}
		p.url, p.shown = url.URL{Scheme: "http", Host: "localhost"}, t.URL
		transport.Proxy = nil
		transport.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", path)
		}
	} else {
		raw := t.URL
		if !strings.Contains(raw, "://") {
			raw = "http://" + raw
		}
		u, err := url.Parse(raw)
		switch {
		case err != nil:
			if reason, ok := errors.AsType[*url.Error](err); ok {
				err = reason.Err
			}
			if strings.Contains(raw, "@") { // the reason may repeat a part of the password
				err = errors.New("it can't be read; write what is special in the user and the password as in %2F")
			}
			return nil, fmt.Errorf("push URL: %w; it looks like %s or unix:/run/culvert/push.sock", err, DefaultURL)
		case u.Scheme != "http" && u.Scheme != "https":
			return nil, fmt.Errorf("push URL %q: scheme %q is not http, https or unix", u.Redacted(), u.Scheme)
		case strings.Contains(u.Path, "@"): // what comes would show it
			return nil, errors.New("push URL: there is an @ behind the host; write what is special in the user and the password as in %2F")
		case u.Hostname() == "":
			return nil, fmt.Errorf("push URL %q: the host is missing", u.Redacted())
		case u.RawQuery != "" || u.Fragment != "":
			return nil, fmt.Errorf("push URL %q: a query or fragment has no meaning here", u.Redacted())
		}
		p.url, p.shown = *u, u.Redacted()
		p.url.User = nil
		if u.User != nil && p.authorize == nil {
			p.authorize = func(h http.Header) error {
				password, _ := u.User.Password()
				(&http.Request{Header: h}).SetBasicAuth(u.User.Username(), password)
				return nil
			}
		}
	}
	path := strings.TrimRight(p.url.EscapedPath(), "/") + groupPath(t.Group)
	var err error
	if p.url.Path, err = url.PathUnescape(path); err != nil {
		return nil, fmt.Errorf("push URL %q: %w", p.shown, err)
	}
	p.url.RawPath = path
	query := url.Values{}
	for name, text := range map[string]string{"interval": t.Interval, "ttl": t.TTL} {
		if text == "" {
			continue
		}
		if _, err := model.ParseDuration(text); err != nil {
			return nil, fmt.Errorf("%s %q is not a duration; write it as in 30m, 24h or 7d, or 0 for none", name, text)
		}
		query.Set(name, text)
	}
	p.url.RawQuery = query.Encode()
	p.client = &http.Client{Transport: transport, CheckRedirect: func(r *http.Request, via []*http.Request) error {
		// After a 301 or 302 the client would GET, and take the answer to that for success.
		// Credentials that were meant for https stay there.
		if r.Method != via[0].Method || len(via) > 5 || via[0].URL.Scheme == "https" && r.URL.Scheme != "https" {
			return http.ErrUseLastResponse
		}
		return nil
	}}
	return p, nil
}

// plainValue matches what can stand in a path as it is. A dot alone would be taken
// for a directory.
var plainValue = regexp.MustCompile(`^[A-Za-z0-9_:-][A-Za-z0-9_.:-]*$`)

// groupPath returns the path of a group, escaped: values with other characters
// than the usual are in base64.
func groupPath(key gateway.Key) string {
	var b strings.Builder
	add := func(name, value string) {
		b.WriteByte('/')
		b.WriteString(name)
		if !plainValue.MatchString(value) {
			b.WriteString("@base64")
			value = base64.RawURLEncoding.EncodeToString([]byte(value))
			if value == "" {
				value = "=" // there must be something between two slashes
			}
		}
		b.WriteByte('/')
		b.WriteString(value)
	}
	job, _ := key.Get("job")
	b.WriteString("/metrics")
	add("job", job)
	for _, l := range key {
		if l.Name != "job" {
			add(model.EscapeName(l.Name, model.ValueEncodingEscaping), l.Value)
		}
	}
	return b.String()
}

// Push is a push.
type Push struct {
	// Method is PUT, which replaces the group, or POST, which replaces the families
	// that Body names.
	Method string
	// ContentType is that of Body.
	ContentType string
	Body        []byte
	// Instead, if not nil, has what of Body may be pushed twice: counters in Body are
	// added to the group's, and its other families replaced. Instead is pushed once it
	// is not known whether Body has arrived.
	Instead []byte
}

// NewPush checks a body, and returns the push of it: see CheckBody.
func (p *Pusher) NewPush(method string, body []byte) (Push, error) {
	contentType, _, err := CheckBody(p.group, body)
	return Push{Method: method, ContentType: contentType, Body: body}, err
}

// Push pushes, and tries again until ctx ends, which has a deadline, where the
// endpoint can't be reached, does not answer, or answers with 408, 429 or 5xx. It
// waits as Retry-After asks; where that is longer than the time that is left, it
// gives up at once. uncertain tells that Instead was taken, and Body may have been.
//
// It returns ErrRefused for any other answer that is no success, and for a certificate
// that can't be verified.
func (p *Pusher) Push(ctx context.Context, push Push) (uncertain bool, err error) {
	deadline, ok := ctx.Deadline()
	if !ok {
		return false, errors.New("jobrun: Push needs a deadline")
	}
	patience := time.Until(deadline)
	start := time.Now()
	body, add := push.Body, push.Instead != nil
	var last error // of the last try that was not cut short by ctx
	for tries, bound := 1, firstWait; ; tries++ {
		try, cancel := context.WithTimeout(ctx, max(patience/triesInTime, time.Millisecond))
		arrived, wait, err := p.try(try, push, body, add)
		cancel()
		if err == nil {
			return uncertain, nil
		}
		if last == nil || ctx.Err() == nil {
			last = err
		}
		if errors.Is(err, ErrRefused) {
			return false, fmt.Errorf("push to %s: %w", p.shown, err)
		}
		if add && arrived {
			body, add, uncertain = push.Instead, false, true
		}
		if wait == 0 {
			wait = bound/2 + rand.N(bound/2)
			bound = min(2*bound, maxWait)
		}
		gone := context.Cause(ctx)
		if gone == nil && time.Now().Add(wait).Before(deadline) {
			timer := time.NewTimer(wait)
			select {
			case <-timer.C:
				continue
			case <-ctx.Done():
				timer.Stop()
				gone = context.Cause(ctx)
			}
		}
		err = fmt.Errorf("push to %s: %w (tried %s in %s)", p.shown, last, times(tries), time.Since(start).Round(100*time.Millisecond))
		if gone != nil && !errors.Is(gone, context.DeadlineExceeded) {
			err = fmt.Errorf("%w; given up: %w", err, gone)
		}
		return false, err
	}
}

func times(n int) string {
	if n == 1 {
		return "once"
	}
	return fmt.Sprintf("%d times", n)
}

// try pushes once. arrived tells, where it fails, that the endpoint may have taken
// the push all the same; wait is what it asked for with Retry-After, else 0.
func (p *Pusher) try(ctx context.Context, push Push, body []byte, add bool) (arrived bool, wait time.Duration, err error) {
	var connected atomic.Bool // the transport's goroutines call
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotConn: func(httptrace.GotConnInfo) { connected.Store(true) }})
	u := p.url
	if add {
		query := u.Query()
		query.Set("aggregate", "sum")
		query.Set("gauge", "last")
		u.RawQuery = query.Encode()
	}
	req, err := http.NewRequestWithContext(ctx, push.Method, u.String(), bytes.NewReader(body))
	if err != nil {
		return false, 0, fmt.Errorf("%w: %w", ErrRefused, err)
	}
	req.Header.Set("Content-Type", push.ContentType)
	if p.authorize != nil {
		if err := p.authorize(req.Header); err != nil {
			return false, 0, err
		}
	}
	resp, err := p.client.Do(req)
	if err != nil {
		if reason, ok := errors.AsType[*url.Error](err); ok {
			err = reason.Err
		}
		if _, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
			err = fmt.Errorf("%w: %w; name the CA with --tls.cacert", ErrRefused, err)
		}
		if errors.Is(err, context.DeadlineExceeded) {
			err = errors.New("no answer in time")
		}
		return connected.Load(), 0, err
	}
	defer resp.Body.Close()
	answer, _ := io.ReadAll(io.LimitReader(resp.Body, maxAnswer)) // what there is of it
	if resp.StatusCode/100 == 2 {
		return true, 0, nil
	}
	reason := strings.Join(strings.Fields(strings.ToValidUTF8(string(answer), "?")), " ")
	if location := resp.Header.Get("Location"); resp.StatusCode/100 == 3 {
		reason = "it points to " + location + "; name that address"
	}
	if resp.StatusCode == http.StatusNotFound {
		reason += "; is that the address of a push endpoint?"
	}
	if resp.StatusCode == http.StatusUnauthorized && p.authorize == nil {
		reason += "; give it a token with --token-file, a user with --basic-auth.username and --basic-auth.password-file, or a certificate with --tls.cert"
	}
	err = fmt.Errorf("it answered %s: %.500s", resp.Status, reason)
	switch status := resp.StatusCode; {
	case status == http.StatusTooManyRequests, status == http.StatusServiceUnavailable, status == http.StatusRequestTimeout, status == http.StatusInsufficientStorage:
		// These say that the push was not made.
		return false, retryAfter(resp.Header), err
	case status/100 == 5:
		// These may be of something in between, which lost sight of the push.
		return true, retryAfter(resp.Header), err
	}
	return false, 0, fmt.Errorf("%w: %w", ErrRefused, err)
}

// retryAfter reads Retry-After, seconds or a date (RFC 9110, 10.2.3).
func retryAfter(h http.Header) time.Duration {
	text := h.Get("Retry-After")
	if seconds, err := strconv.ParseUint(text, 10, 31); err == nil {
		return time.Duration(seconds) * time.Second
	}
	if at, err := http.ParseTime(text); err == nil {
		return max(0, time.Until(at))
	}
	return 0
}
