package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/culvert-io/culvert/protocol"
)

const (
	// pushBuffer is how much of a response is read before its push begins. A shorter one is
	// sent with its length, and can be replaced by an error if it breaks off.
	pushBuffer = 64 << 10
	// pollTimeout is the time for a scrape that names none, PushProx's default.
	pollTimeout = 15 * time.Second
	// maxPollTimeout is the longest time for a scrape.
	maxPollTimeout = time.Hour
	// pushAhead is how long before the scraper's deadline the agent gives a target up, so
	// that the reason still arrives; a quarter of the whole time where that is less.
	pushAhead = 250 * time.Millisecond
	// pushLate is how long a push may go on after the scraper's deadline.
	pushLate = 5 * time.Second

	headerID      = "Id"
	headerTimeout = "X-Prometheus-Scrape-Timeout-Seconds"
)

// brokenOff ends a response of unknown length that broke off half way. PushProx's proxy
// passes such a response on as if it were whole; this makes it one that no parser of
// an exposition format takes.
const brokenOff = "\n}{ broken off\n"

// polledScrape is a scrape that a poll brought.
type polledScrape struct {
	*http.Request
	client   *http.Client // that polled
	received time.Time
	tooLong  bool // there is more of it
}

// scrape makes a scrape, and pushes the response.
func (p *poller) scrape(r *polledScrape) {
	// A scraper's own Id stands in front of the proxy's.
	ids := r.Header[headerID]
	answer := &pushed{id: ids[len(ids)-1], deadline: r.received.Add(timeoutOf(r.Header))}
	left := time.Until(answer.deadline)
	ctx, cancel := context.WithDeadline(p.scraping, answer.deadline.Add(-min(pushAhead, left/4)))
	defer cancel()
	resp, refusal := p.ownAnswer(ctx, r)
	if refusal == nil {
		defer resp.Body.Close()
		// A response that ends here is pushed with its length. If it breaks off here, there
		// is still a way to say so.
		var begin bytes.Buffer
		_, err := io.CopyN(&begin, resp.Body, pushBuffer)
		answer.resp, answer.begin, answer.whole = resp, begin.Bytes(), err == io.EOF
		if err != nil && err != io.EOF {
			refusal = p.broken(ctx, err)
		}
	}
	if refusal != nil {
		answer.refuse(refusal)
		if r.Method == http.MethodHead {
			answer.begin = nil
		}
	}
	p.push(r.client, answer)
}

// ownAnswer asks the agent as the tunnel would.
func (p *poller) ownAnswer(ctx context.Context, r *polledScrape) (*http.Response, *protocol.Refusal) {
	switch {
	case r.Method == http.MethodConnect:
		return nil, protocol.Refusef(http.StatusBadRequest, protocol.CodeBadRequest,
			"CONNECT can't go through a pushprox-proxy; scrape %q with scheme http and the parameter _scheme=https", r.RequestURI)
	case !r.URL.IsAbs():
		return nil, protocol.Refusef(http.StatusBadRequest, protocol.CodeBadRequest, "%q is no URL with scheme and host", r.RequestURI)
	case r.tooLong:
		return nil, protocol.Refusef(http.StatusRequestEntityTooLarge, protocol.CodeBadRequest, "the scrape request has more than %d bytes", maxPollAnswer)
	}
	out := r.Clone(ctx)
	out.URL, out.RequestURI, out.Close = &url.URL{Scheme: "http", Host: "agent", Opaque: r.RequestURI}, "", false
	for _, value := range r.Header["Connection"] {
		for name := range strings.SplitSeq(value, ",") {
			out.Header.Del(strings.TrimSpace(name))
		}
	}
	for _, name := range []string{headerID, "Connection", "Keep-Alive", "Expect", "Te", "Trailer", "Upgrade"} {
		out.Header.Del(name)
	}
	resp, err := p.local.RoundTrip(out)
	if err != nil {
		return nil, p.broken(ctx, err)
	}
	return resp, nil
}

// broken is the refusal for a scrape that brought no whole response.
func (p *poller) broken(ctx context.Context, err error) *protocol.Refusal {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return protocol.Refusef(http.StatusGatewayTimeout, protocol.CodeTimeout, "agent %q: the target did not answer within the scrape's timeout", p.name)
	}
	if ctx.Err() != nil {
		return protocol.Refusef(http.StatusServiceUnavailable, protocol.CodeDraining, "agent %q goes away", p.name)
	}
	return protocol.Refusef(http.StatusBadGateway, protocol.CodeBadResponse, "agent %q: the target's response broke off: %v", p.name, err)
}

// timeoutOf returns the time that a scrape may take. PushProx's proxy relays the number,
// and adds none.
func timeoutOf(h http.Header) time.Duration {
	seconds, err := strconv.ParseFloat(strings.TrimSpace(h.Get(headerTimeout)), 64)
	switch {
	case err != nil && !errors.Is(err, strconv.ErrRange), math.IsNaN(seconds):
		return pollTimeout
	case seconds >= maxPollTimeout.Seconds():
		return maxPollTimeout
	}
	return max(0, time.Duration(seconds*float64(time.Second)))
}

// pushed is a response on its way to the scraper.
type pushed struct {
	id       string
	deadline time.Time // of the scraper
	resp     *http.Response
	begin    []byte // of the body
	whole    bool   // begin is all of it
}

// refuse makes the response the agent's own.
func (a *pushed) refuse(refusal *protocol.Refusal) {
	h := http.Header{}
	refusal.SetHeader(h)
	a.begin, a.whole = []byte(refusal.Message+"\n"), true
	a.resp = &http.Response{StatusCode: refusal.Status, Header: h, ContentLength: int64(len(a.begin))}
}

// head returns the response's head as it stands in the push, and whether its body is
// chunked there.
func (a *pushed) head() (head []byte, chunked bool) {
	h := a.resp.Header.Clone()
	for _, name := range []string{"Connection", "Content-Length", "Transfer-Encoding", "Trailer"} {
		h.Del(name)
	}
	h.Set(headerID, a.id)
	// How long the proxy holds a push that no scrape waits for any more.
	h.Set(headerTimeout, strconv.FormatFloat(max(time.Until(a.deadline).Seconds(), 0.001), 'f', 6, 64))
	status, length := a.resp.StatusCode, a.resp.ContentLength
	if length < 0 && a.whole {
		length = int64(len(a.begin))
	}
	bodiless := status == http.StatusNoContent || status == http.StatusNotModified
	switch {
	case bodiless:
	case length >= 0:
		h.Set("Content-Length", strconv.FormatInt(length, 10))
	default:
		chunked = true
		h.Set("Transfer-Encoding", "chunked")
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, "HTTP/1.1 %d %s\r\n", status, http.StatusText(status))
	h.Write(&b)
	b.WriteString("\r\n")
	return b.Bytes(), chunked
}

// push sends a response to the proxy.
func (p *poller) push(client *http.Client, a *pushed) {
	ctx, cancel := context.WithDeadline(p.scraping, time.Now().Add(max(time.Until(a.deadline), 0)+pushLate))
	defer cancel()
	head, chunked := a.head()
	var body io.Reader = bytes.NewReader(append(head, a.begin...))
	if !a.whole {
		// Where its length is known, a body that breaks off is short in a push that is
		// whole: the proxy cuts the scraper's connection then.
		body = io.MultiReader(bytes.NewReader(head), bytes.NewReader(a.begin), untilBreak{a.resp.Body})
		if chunked {
			from, to := io.Pipe()
			written := make(chan struct{})
			go func() {
				defer close(written)
				to.Write(head)
				w := httputil.NewChunkedWriter(to)
				w.Write(a.begin)
				buffer := protocol.Buffers.Get()
				_, err := io.CopyBuffer(w, struct{ io.Reader }{a.resp.Body}, buffer)
				protocol.Buffers.Put(buffer)
				if err == nil {
					w.Close()
					io.WriteString(to, "\r\n")
				} else {
					io.WriteString(w, brokenOff)
				}
				to.Close()
			}()
			defer func() {
				from.Close()
				a.resp.Body.Close()
				<-written
			}()
			body = from
		}
	}
	result := "ok"
	r, err := p.request(ctx, "push", body)
	if err == nil {
		var resp *http.Response
		if resp, err = client.Do(r); err == nil {
			text, _ := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
			resp.Body.Close()
			if resp.StatusCode/100 != 2 {
				result, err = "refused", fmt.Errorf("the proxy answered %s: %.200s", resp.Status, bytes.TrimSpace(text))
			}
		} else {
			result = "failed"
		}
	}
	if err != nil {
		p.link.agent.lostPush.log("The proxy did not take the answer to a scrape", "proxy", p.link.label, "status", a.resp.StatusCode, "err", err)
	}
	p.link.agent.metrics.polled.WithLabelValues(p.link.label, result).Inc()
}

// untilBreak ends in good order where what it reads breaks off.
type untilBreak struct{ io.Reader }

func (r untilBreak) Read(b []byte) (int, error) {
	n, err := r.Reader.Read(b)
	if err != nil {
		err = io.EOF
	}
	return n, err
}
