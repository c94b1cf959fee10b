package server

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"math"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/culvert-io/culvert/protocol"
)

// take returns the scrape of an ID, and that only once: nil where nobody waits for it, or
// it is of a client whose name is not for who asks.
func (p *pushProx) take(id string, may func(name string) bool) *pushProxScrape {
	p.mu.Lock()
	defer p.mu.Unlock()
	scrape := p.scrapes[id]
	if scrape == nil || !may(scrape.client.name) {
		return nil
	}
	delete(p.scrapes, id)
	return scrape
}

// servePushed passes the response that a client pushes to the scraper that waits for it,
// as that reads it, and returns what became of it.
func (s *Server) servePushed(w http.ResponseWriter, r *http.Request) string {
	control := http.NewResponseController(w)
	control.SetReadDeadline(time.Now().Add(headTimeout))
	var mayBe func(name string) bool
	if passed, ok := r.Context().Value(peerKey{}).(peerScrape); ok {
		mayBe = func(name string) bool { return name == passed.agent } // the other proxy has seen to it
	} else {
		identity, refusal := s.identifyPushProx(r, "")
		if refusal != nil {
			return s.refusePushProx(w, r, refusal)
		}
		mayBe = identity.MayBe
	}
	pushed := &pushReader{body: r.Body, left: maxHead}
	if s.cluster != nil && !passedOn(r) {
		pushed.seen = new(bytes.Buffer)
	}
	reader := bufio.NewReader(pushed)
	resp, err := http.ReadResponse(reader, nil)
	for err == nil && resp.StatusCode/100 == 1 && resp.StatusCode != http.StatusSwitchingProtocols {
		next, nextErr := http.ReadResponse(reader, nil)
		if nextErr != nil {
			break // the scraper is told of the interim response that is the last one
		}
		resp = next
	}
	if err != nil {
		return s.refusePushProx(w, r, protocol.Refusef(http.StatusBadRequest, protocol.CodeInvalid, "the body of a push is no HTTP response with a head of at most %d bytes: %v", maxHead, err))
	}
	id := resp.Header.Get("Id")
	if seen := pushed.seen; seen != nil {
		_, holder, _ := strings.Cut(id, ".")
		if proxy, name, ok := strings.Cut(holder, "."); ok && proxy != s.id && mayBe(name) {
			return s.passPush(w, r, proxy, name, io.MultiReader(seen, r.Body))
		}
		pushed.seen = nil
	}
	scrape := s.pushProx.take(id, mayBe)
	if scrape == nil {
		return s.refusePushProx(w, r, protocol.Refusef(http.StatusNotFound, protocol.CodeNotFound, "nobody waits for the response of this Id: its scrape is over, or never was"))
	}
	control.SetReadDeadline(time.Time{})
	control.SetWriteDeadline(time.Time{})
	pushed.left = math.MaxInt
	// The scrape may end before the body has come.
	interrupted := make(chan struct{})
	stop := context.AfterFunc(scrape.req.Context(), func() {
		control.SetReadDeadline(time.Now())
		close(interrupted)
	})
	for name := range resp.Header {
		if strings.HasPrefix(name, "Culvert-") { // which tell of agents that are not this one
			resp.Header.Del(name)
		}
	}
	resp.Header.Del("Id")
	resp.Header.Del(timeoutHeader)
	body := &pushedBody{Reader: resp.Body, stop: stop, read: make(chan struct{})}
	resp.Body, resp.Request = body, scrape.req
	switch {
	case scrape.req.Method == http.MethodHead:
		body.Reader = bytes.NewReader(nil)
	case resp.ContentLength < 0 && len(resp.TransferEncoding) == 0:
		// It ends where the push does, which has a length, or is chunked.
		resp.TransferEncoding = []string{"chunked"}
	}
	scrape.answer <- resp
	<-body.read
	if body.late {
		// net/http takes the end of the time for that of the connection, of which no
		// further request would be served.
		<-interrupted
		w.Header().Set("Connection", "close")
	}
	finish(w)
	w.WriteHeader(http.StatusOK)
	return outcomeOK
}

// passPush passes a push on to the proxy that has the scrape: behind a balancer polls and
// pushes of one client go different ways.
func (s *Server) passPush(w http.ResponseWriter, r *http.Request, proxy, name string, body io.Reader) string {
	control := http.NewResponseController(w)
	control.SetReadDeadline(time.Now().Add(s.config.MaxTimeout))
	control.SetWriteDeadline(time.Time{})
	ctx, cancel := context.WithTimeout(r.Context(), s.config.MaxTimeout)
	defer cancel()
	status, err := s.cluster.Push(ctx, proxy, name, body)
	if err != nil {
		return s.refusePushProx(w, r, protocol.Refusef(http.StatusBadGateway, protocol.CodePeerUnreachable, "the scrape is one of another proxy, and %v", err))
	}
	finish(w)
	w.Header().Set("Connection", "close") // the other proxy may not have read all of it
	w.WriteHeader(status)
	if status != http.StatusOK {
		return string(protocol.CodeNotFound)
	}
	return outcomeOK
}

// pushReader reads the body of a push: so much is left for the response's head.
type pushReader struct {
	body io.Reader
	left int
	seen *bytes.Buffer // not nil: keeps what was read
}

func (r *pushReader) Read(p []byte) (int, error) {
	if r.left == 0 {
		return 0, errors.New("the head is too long")
	}
	n, err := r.body.Read(p[:min(len(p), r.left)])
	r.left -= n
	if r.seen != nil {
		r.seen.Write(p[:n])
	}
	return n, err
}

// pushedBody is the body of a pushed response. One goroutine uses it, and always closes
// it: until then its push is not answered.
type pushedBody struct {
	io.Reader
	stop func() bool // keeps the end of the scrape from interrupting Read
	once sync.Once
	late bool          // that came too late
	read chan struct{} // closed when nobody reads any more
}

// Close comes before the scrape's context ends, where the scrape ends well.
func (b *pushedBody) Close() error {
	b.once.Do(func() {
		b.late = !b.stop()
		close(b.read)
	})
	return nil
}
