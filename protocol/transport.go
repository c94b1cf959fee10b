package protocol

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"sync"
	"sync/atomic"
	"time"
)

// Transport sends HTTP/1.1 requests through a session, and keeps the streams for
// further requests. It is an http.RoundTripper; the URL's host plays no part.
//
// It is there for the sake of streams that wait: http.Transport keeps two
// goroutines and two buffers of 4 KiB for each, this one nothing at all. A proxy has
// thousands of them. What it leaves out: it does not notice that the other side has
// closed a waiting stream before it uses that, and then opens another one.
type Transport struct {
	Session *Session

	mu     sync.Mutex // protects what follows
	idle   []*Stream  // the one that was used last comes last
	closed bool       // no stream is kept any more
}

const (
	// maxIdle is how many streams a Transport keeps waiting.
	maxIdle = 64
	// maxHead bounds the head of a response, the interim responses before it
	// included. A scraper's own limit is of that size.
	maxHead = 64 << 10
)

var errLongHead = fmt.Errorf("the head of the response is longer than %d bytes", maxHead)

// RoundTrip implements http.RoundTripper. Errors are those of Session.Open, of the
// stream and of http.ReadResponse; once req's context has ended, its cause.
func (t *Transport) RoundTrip(req *http.Request) (*http.Response, error) {
	x := &exchange{transport: t, request: req}
	if req.Body == nil {
		whole := bytes.NewBuffer(make([]byte, 0, 512))
		if err := req.Write(whole); err != nil {
			return nil, err
		}
		x.whole = whole.Bytes()
		// A stream that waited may have been closed meanwhile, so it is for requests that
		// can be sent again.
		if req.Method == http.MethodGet || req.Method == http.MethodHead {
			if stream := t.take(); stream != nil {
				resp, err := x.run(stream)
				if err == nil || x.answered || req.Context().Err() != nil {
					return resp, err
				}
			}
		}
	}
	stream, err := t.Session.Open(req.Context())
	if err != nil {
		if req.Body != nil {
			req.Body.Close()
		}
		return nil, err
	}
	return x.run(stream.(*Stream))
}

// take returns a stream that waits, nil where there is none.
func (t *Transport) take() *Stream {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := len(t.idle) - 1
	if n < 0 {
		return nil
	}
	stream := t.idle[n]
	t.idle[n] = nil
	t.idle = t.idle[:n]
	return stream
}

// keep has the stream wait for the next request, or closes it.
func (t *Transport) keep(stream *Stream) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed || len(t.idle) >= maxIdle {
		stream.Close() // doesn't wait
		return
	}
	t.idle = append(t.idle, stream)
}

// CloseIdle closes the streams that have been waiting for so long.
func (t *Transport) CloseIdle(after time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := 0 // those that wait longest come first
	for n < len(t.idle) && t.idle[n].Idle() >= after {
		t.idle[n].Close()
		n++
	}
	if n > 0 {
		t.idle = append([]*Stream(nil), t.idle[n:]...)
	}
}

// CloseIdleConnections closes the streams that wait, and has those in use closed
// when their responses end.
func (t *Transport) CloseIdleConnections() {
	t.mu.Lock()
	t.closed = true
	t.mu.Unlock()
	t.CloseIdle(0)
}

// exchange is one request and its response.
type exchange struct {
	transport *Transport
	request   *http.Request
	whole     []byte                // the request as it is sent, where it has no body
	sent      atomic.Bool           // the request is, where it has one
	sendError atomic.Pointer[error] // why it could not be

	stream   *Stream
	stop     func() bool   // keeps the end of the context from closing the stream
	reader   *bufio.Reader // reads from the exchange
	headLeft int           // bytes that the response's head may still have; -1: it is through
	answered bool          // something came
}

var headReaders = sync.Pool{New: func() any { return bufio.NewReader(nil) }}

// run sends the request and returns the response when its head has come.
func (x *exchange) run(stream *Stream) (*http.Response, error) {
	ctx := x.request.Context()
	x.stream, x.headLeft = stream, maxHead
	x.reader = headReaders.Get().(*bufio.Reader)
	x.reader.Reset(x)
	x.stop = context.AfterFunc(ctx, func() { stream.Close() }) // wakes who reads or writes
	// Where the connection is stuck, a write waits for longer than ctx allows.
	switch {
	case x.request.Body != nil:
		// The session's Close must not wait for who sends the body. This goroutine ends
		// with that, and end closes it.
		go x.send(stream)
	case !x.transport.Session.start(func() { x.send(stream) }):
		x.end(false)
		return nil, x.transport.Session.endError()
	}
	for {
		resp, err := http.ReadResponse(x.reader, x.request)
		if err != nil {
			err = x.error(err)
			x.end(false)
			return nil, err
		}
		if resp.StatusCode/100 == 1 && resp.StatusCode != http.StatusSwitchingProtocols {
			continue // an interim response
		}
		x.headLeft = -1
		keep := !resp.Close && !x.request.Close && resp.StatusCode != http.StatusSwitchingProtocols
		if resp.Body == http.NoBody || resp.ContentLength == 0 {
			x.end(keep)
			resp.Body = http.NoBody
		} else {
			resp.Body = &exchangeBody{exchange: x, body: resp.Body, keep: keep}
		}
		return resp, nil
	}
}

// send sends the request.
func (x *exchange) send(stream *Stream) {
	if x.request.Body == nil {
		stream.Write(x.whole) // where that fails, reading does as well
		return
	}
	w := bufio.NewWriter(stream)
	err := x.request.Write(w)
	if err == nil {
		err = w.Flush()
	}
	if err != nil {
		x.sendError.Store(&err)
		stream.Reset() // half a request must not pass for a whole one
		return
	}
	x.sent.Store(true)
}

// Read reads from the stream for reader.
func (x *exchange) Read(p []byte) (int, error) {
	switch {
	case x.headLeft == 0:
		return 0, errLongHead
	case x.headLeft > 0:
		p = p[:min(len(p), x.headLeft)]
	}
	n, err := x.stream.Read(p)
	x.answered = x.answered || n > 0
	if x.headLeft > 0 {
		x.headLeft -= n
	}
	return n, err
}

// error prefers the reason for an error of reading.
func (x *exchange) error(err error) error {
	if cause := context.Cause(x.request.Context()); cause != nil {
		return cause
	}
	if sendError := x.sendError.Load(); sendError != nil {
		return *sendError
	}
	return err
}

// end lets go of stream and reader, when nobody reads any more. The stream is kept
// where keep says so and nothing speaks against it.
func (x *exchange) end(keep bool) {
	if keep && x.reader.Buffered() == 0 && (x.request.Body == nil || x.sent.Load()) && x.stop() {
		x.transport.keep(x.stream)
	} else {
		x.abandon()
	}
	x.reader.Reset(nil)
	headReaders.Put(x.reader)
}

// abandon gives the stream up, and what is still to be sent.
func (x *exchange) abandon() {
	x.stop()
	x.stream.Close()
	if x.request.Body != nil && !x.sent.Load() {
		go x.request.Body.Close() // it waits where send is reading
	}
}

// exchangeBody is the body of a response.
type exchangeBody struct {
	exchange *exchange
	body     io.Reader
	keep     bool // the stream, after the body's end

	mu  sync.Mutex // protects err
	err error      // of all further reads: the exchange has ended
}

func (b *exchangeBody) Read(p []byte) (int, error) {
	b.mu.Lock()
	err := b.err
	b.mu.Unlock()
	if err != nil {
		return 0, err
	}
	n, err := b.body.Read(p)
	if err == nil {
		return n, nil
	}
	if err != io.EOF {
		err = b.exchange.error(err)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.err == nil {
		b.err = err
		b.exchange.end(b.keep && err == io.EOF)
	}
	return n, b.err
}

// Close gives the rest of the body up, and the stream with it. Somebody may be
// reading, who keeps the reader.
func (b *exchangeBody) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.err == nil {
		b.err = http.ErrBodyReadAfterClose
		b.exchange.abandon()
	}
	return nil
}
