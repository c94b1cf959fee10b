package protocol

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/yamux"
)

// Errors that end a session, as Session.Err returns them.
var (
	// ErrClosed: this side closed the session.
	ErrClosed = errors.New("closed here")
	// ErrPeerClosed: the other side, or something between, closed the connection.
	ErrPeerClosed = errors.New("connection closed by the other side")
	// ErrSilent: no frame came for SessionConfig.DeadAfter.
	ErrSilent = errors.New("nothing was heard from the other side")
	// ErrStuck: a frame could not be written for SessionConfig.DeadAfter.
	ErrStuck = errors.New("the connection takes no data")
	// ErrProtocol: what came are no frames of ours.
	ErrProtocol = errors.New("the other side breaks the protocol")
)

// EndReason returns one word for the reason that ended a session: "closed",
// "lost", "silent", "stuck", else "error". It suits a metric's label.
func EndReason(err error) string {
	for word, end := range map[string]error{"closed": ErrClosed, "lost": ErrPeerClosed, "silent": ErrSilent, "stuck": ErrStuck} {
		if errors.Is(err, end) {
			return word
		}
	}
	return "error"
}

// ErrTooManyStreams is returned by Session.Open at SessionConfig.MaxStreams.
var ErrTooManyStreams = errors.New("too many open streams")

// SessionConfig tunes a session. Zero values mean the defaults.
type SessionConfig struct {
	// PingInterval is the mean distance of pings, ±20 %. The agent pings, by
	// default every 20 s; a proxy leaves it negative, which is: never.
	PingInterval time.Duration
	// DeadAfter ends a session that brought no frame, or took none, for so long.
	// 60 s by default.
	DeadAfter time.Duration
	// MaxStreams bounds the streams of the session: Open fails when there are so
	// many, of both sides together, and Accept takes no more of the other side's. As
	// many again, at most 256, may wait for Accept. 1024 by default.
	MaxStreams int
	// MaxAccepted bounds the accepted streams by themselves: a side that expects
	// few of them need not buffer for many. MaxStreams by default.
	MaxAccepted int
	// StreamWindow is the receive window of a stream in bytes, and so bounds the
	// throughput of one response to StreamWindow per round trip, and the memory
	// that a slow reader can hold to about twice of it. 6 MiB by default at the proxy, which
	// is what responses come to; 1 MiB at the agent.
	StreamWindow uint32
	// Stats, where given, counts the bytes and streams of all sessions that share it.
	Stats *Stats
	// Logger gets what yamux has to say, at debug level.
	Logger *slog.Logger
}

// Stats counts over the sessions that share it.
type Stats struct {
	BytesRead    atomic.Int64 // from the connection, frame headers included
	BytesWritten atomic.Int64
	Streams      atomic.Int64 // open now
}

const (
	defaultPingInterval = 20 * time.Second
	defaultDeadAfter    = 60 * time.Second
	defaultMaxStreams   = 1024

	// One round trip of 100 ms at 480 Mbit/s; and a response of a few megabytes goes through
	// without any wait for the window. Requests are small.
	acceptedStreamWindow = 6 << 20
	dialledStreamWindow  = 1 << 20

	// streamCloseTimeout is how long a closed stream waits for the other side's
	// FIN before it is reset. A half-closed stream keeps its buffers until then.
	streamCloseTimeout = 10 * time.Second
	// shrinkAfter is how long a stream has to be idle before its receive buffer
	// is given back: yamux would keep the largest size it ever had.
	shrinkAfter = 2 * time.Second
)

func (c SessionConfig) withDefaults(dialled bool) SessionConfig {
	if c.PingInterval == 0 {
		c.PingInterval = defaultPingInterval
	}
	if c.DeadAfter == 0 {
		c.DeadAfter = defaultDeadAfter
	}
	if c.MaxStreams == 0 {
		c.MaxStreams = defaultMaxStreams
	}
	if c.MaxAccepted == 0 {
		c.MaxAccepted = c.MaxStreams
	}
	if c.StreamWindow == 0 {
		c.StreamWindow = acceptedStreamWindow
		if dialled {
			c.StreamWindow = dialledStreamWindow
		}
	}
	if c.Stats == nil {
		c.Stats = new(Stats)
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c
}

// Session multiplexes streams over one connection. All methods may be called at
// the same time. It ends by Close, by the other side, by silence or by a write
// that gets stuck; Done is closed then, and Err says why.
type Session struct {
	// Agent and Instance are who dialled, Proxy is who answered: as the handshake
	// told. Transport is "upgrade" or "websocket".
	Agent, Instance, Proxy, Transport string
	// RemoteAddr is the address of the other side where it is known.
	RemoteAddr string

	config SessionConfig
	conn   *frameConn
	mux    *yamux.Session
	tasks  sync.WaitGroup // goroutines of this session
	rtt    atomic.Int64   // nanoseconds, of the last ping
	taken  chan struct{}  // a token for each accepted stream that is open
	ending atomic.Bool    // the connection has failed, or is about to be closed

	opening atomic.Int64 // calls of OpenStream that have not returned

	mu      sync.Mutex // protects what follows
	err     error
	closed  bool
	streams *Stream     // the first of those that are open: see Stream.next
	dead    *time.Timer // fires when the session may have been silent for DeadAfter
	shrink  *time.Timer // runs shrinkIdle; nil: there is nothing to shrink

	// See handle.go.
	handler      func(*Stream)
	unaccepted   int    // streams that the other side opened and Handle has not passed on
	accepting    bool   // a goroutine accepts for handler
	afterEnd     func() // nil: none, or called
	disconnected bool   // yamux has closed the connection
}

// newSession starts a session on conn, which it owns from now on.
func newSession(conn *frameConn, config SessionConfig, dialled bool) (*Session, error) {
	config = config.withDefaults(dialled)
	s := &Session{config: config, conn: conn}
	conn.stats = config.Stats
	conn.failed, conn.closed, conn.incoming.opened = s.wakeStreams, s.connClosed, s.opened
	conn.lastRead.Store(time.Now().UnixNano())
	conn.limit(firstUnsent)
	s.taken = make(chan struct{}, config.MaxAccepted)
	yc := yamux.DefaultConfig()
	yc.AcceptBacklog = min(256, config.MaxStreams) // yamux resets what goes beyond
	yc.EnableKeepAlive = false                     // ours has jitter, and counts any frame as a sign of life
	yc.ConnectionWriteTimeout = config.DeadAfter
	yc.StreamOpenTimeout = 0 // it would close the whole session
	yc.StreamCloseTimeout = streamCloseTimeout
	yc.MaxStreamWindowSize = config.StreamWindow
	yc.LogOutput = nil
	yc.Logger = muxLogger{config.Logger}
	var err error
	if dialled {
		s.mux, err = yamux.Client(conn, yc)
	} else {
		s.mux, err = yamux.Server(conn, yc)
	}
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("start session: %w", err)
	}
	s.mu.Lock()
	s.dead = time.AfterFunc(config.DeadAfter, s.checkSilence)
	s.mu.Unlock()
	if config.PingInterval > 0 {
		s.tasks.Go(s.pingLoop)
	}
	return s, nil
}

// Open opens a stream. It gives up when ctx ends, returns ErrTooManyStreams at
// the limit, and an error that wraps Err once the session has ended.
func (s *Session) Open(ctx context.Context) (net.Conn, error) {
	// No lock of ours is held while yamux takes one of its own: its sending
	// goroutine calls wakeStreams.
	if n := int(s.opening.Add(1)) + s.mux.NumStreams(); n > s.config.MaxStreams {
		s.opening.Add(-1)
		return nil, fmt.Errorf("%w: %d", ErrTooManyStreams, n-1)
	}
	type result struct {
		stream *yamux.Stream
		err    error
	}
	opened := make(chan result)
	// OpenStream waits without a context for the connection to take the frame.
	if !s.start(func() {
		stream, err := s.mux.OpenStream()
		s.opening.Add(-1)
		if err != nil {
			err = s.streamError(err) // whether somebody still waits or not
		}
		select {
		case opened <- result{stream, err}:
		case <-ctx.Done():
			if err == nil {
				stream.Close()
			}
		}
	}) {
		s.opening.Add(-1)
		return nil, s.endError()
	}
	select {
	case r := <-opened:
		if r.err != nil {
			return nil, r.err
		}
		return s.wrap(r.stream, false), nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// Accept returns the next stream that the other side opened; at the limit it
// waits until one is closed. It returns an error that wraps Err once the session
// has ended, ctx's cause when that ends.
func (s *Session) Accept(ctx context.Context) (net.Conn, error) {
	select {
	case s.taken <- struct{}{}:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	case <-s.Done():
		return nil, s.endError()
	}
	stream, err := s.mux.AcceptStreamWithContext(ctx)
	if err != nil {
		<-s.taken
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		return nil, s.streamError(err)
	}
	return s.wrap(stream, true), nil
}

// Ping measures the round trip. It waits until ctx ends.
func (s *Session) Ping(ctx context.Context) (time.Duration, error) {
	type result struct {
		rtt time.Duration
		err error
	}
	pinged := make(chan result, 1)
	if !s.start(func() {
		rtt, err := s.mux.Ping()
		switch {
		case errors.Is(err, yamux.ErrTimeout): // DeadAfter has passed
			reason := ErrStuck // the other side is heard, and doesn't hear
			if time.Since(s.LastHeard()) >= s.config.DeadAfter*9/10 {
				reason = ErrSilent
			}
			err = s.fail(reason)
		case err != nil:
			err = s.streamError(err)
		}
		pinged <- result{rtt, err}
	}) {
		return 0, s.endError()
	}
	select {
	case r := <-pinged:
		if r.err != nil {
			return 0, r.err
		}
		s.rtt.Store(int64(r.rtt))
		return r.rtt, nil
	case <-ctx.Done():
		return 0, context.Cause(ctx)
	}
}

// RTT returns the round trip of the last ping from this side, 0 before the first.
func (s *Session) RTT() time.Duration { return time.Duration(s.rtt.Load()) }

// LastHeard returns when the last bytes came from the other side.
func (s *Session) LastHeard() time.Time { return time.Unix(0, s.conn.lastRead.Load()) }

// NumStreams returns the number of open streams, of both sides.
func (s *Session) NumStreams() int { return s.mux.NumStreams() }

// Done is closed when the session has ended.
func (s *Session) Done() <-chan struct{} { return s.mux.CloseChan() }

// Err returns why the session ended, nil while it lives.
func (s *Session) Err() error {
	select {
	case <-s.mux.CloseChan():
	default:
		return nil
	}
	s.mu.Lock()
	err := s.err
	s.mu.Unlock()
	if err != nil {
		return err
	}
	err = s.conn.endCause(s.muxError())
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil {
		s.err = err
	}
	return s.err
}

// muxError returns why yamux ended. It must have.
func (s *Session) muxError() error {
	// Streams that nobody accepted may come first: at most the backlog, with
	// ErrSessionShutdown.
	for range 1024 {
		if _, err := s.mux.AcceptStream(); err != nil && !errors.Is(err, yamux.ErrSessionShutdown) {
			return err
		}
	}
	return yamux.ErrSessionShutdown
}

// Close ends the session and all its streams, and waits until its goroutines
// have gone.
func (s *Session) Close() error {
	s.end(ErrClosed)
	s.tasks.Wait()
	return nil
}

// end closes the session for the given reason; the first reason stays.
func (s *Session) end(reason error) {
	s.mu.Lock()
	if s.err == nil && !s.mux.IsClosed() {
		s.err = reason
	}
	s.closed = true
	s.dead.Stop()
	if s.shrink != nil {
		s.shrink.Stop()
	}
	s.mu.Unlock()
	s.wakeStreams()
	s.mux.Close()
}

// wakeStreams ends what waits in the streams. Once a session ends, yamux's readers
// and writers would turn in a busy loop until it has closed each stream, and keep
// the processor from the goroutine that does.
func (s *Session) wakeStreams() {
	if s.ending.Swap(true) {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for st := s.streams; st != nil; st = st.next {
		st.mux.SetDeadline(longAgo)
	}
}

var longAgo = time.Unix(1, 0)

// start runs f in a goroutine that Close waits for. It returns false when the
// session has ended.
func (s *Session) start(f func()) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || s.mux.IsClosed() {
		return false
	}
	s.tasks.Go(f)
	return true
}

// endError is what a call returns that met the end of the session, or came just
// before it.
func (s *Session) endError() error {
	err := s.Err()
	if err == nil {
		s.mu.Lock()
		err = s.err
		s.mu.Unlock()
	}
	if err == nil {
		err = ErrPeerClosed // the connection has failed, and yamux is about to see it
	}
	return fmt.Errorf("session ended: %w", err)
}

// streamError translates an error of yamux. A write timeout leaves yamux's
// session half alive, with the other side's reads hanging (GHSA-29qp-crvh-w22m),
// so it ends the session here.
func (s *Session) streamError(err error) error {
	switch {
	case errors.Is(err, yamux.ErrConnectionWriteTimeout):
		return s.fail(ErrStuck)
	case errors.Is(err, yamux.ErrRemoteGoAway):
		return s.fail(fmt.Errorf("%w: it takes no more streams", ErrPeerClosed))
	case errors.Is(err, yamux.ErrSessionShutdown), s.mux.IsClosed():
		return s.endError()
	case errors.Is(err, yamux.ErrStreamClosed), errors.Is(err, yamux.ErrConnectionReset), errors.Is(err, yamux.ErrStreamsExhausted):
		return err
	}
	// What is left comes from the connection, and yamux is about to end.
	return fmt.Errorf("session ended: %w: %w", ErrPeerClosed, err)
}

// fail ends the session from within.
func (s *Session) fail(reason error) error {
	go s.end(reason) // it waits for the goroutine that may have called
	return fmt.Errorf("session ended: %w", reason)
}

// checkSilence runs when DeadAfter has passed since the last frame, or the last
// start of a write, that was known when the timer was set.
func (s *Session) checkSilence() {
	silent := time.Since(s.LastHeard())
	if stuck := s.conn.writingFor(); stuck >= s.config.DeadAfter {
		// Those who wrote may have given up long ago.
		s.end(ErrStuck)
		return
	} else if silent >= s.config.DeadAfter {
		s.end(ErrSilent)
		return
	} else {
		silent = max(silent, stuck)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed && !s.mux.IsClosed() {
		s.dead.Reset(s.config.DeadAfter - silent)
	}
}

func (s *Session) pingLoop() {
	for {
		jitter := 0.8 + 0.4*rand.Float64()
		timer := time.NewTimer(time.Duration(float64(s.config.PingInterval) * jitter))
		select {
		case <-s.Done():
			timer.Stop()
			return
		case <-timer.C:
		}
		// A lost answer is checkSilence's business.
		ctx, cancel := context.WithTimeout(context.Background(), s.config.PingInterval)
		s.Ping(ctx)
		cancel()
	}
}

// wrap registers a stream.
func (s *Session) wrap(y *yamux.Stream, accepted bool) *Stream {
	st := &Stream{mux: y, session: s, accepted: accepted}
	st.lastUse.Store(time.Now().UnixNano())
	s.config.Stats.Streams.Add(1)
	s.mu.Lock()
	defer s.mu.Unlock()
	if st.next = s.streams; st.next != nil {
		st.next.previous = st
	}
	s.streams = st
	s.armShrink()
	return st
}

// unwrap takes out what wrap registered.
func (s *Session) unwrap(st *Stream) {
	s.config.Stats.Streams.Add(-1)
	s.mu.Lock()
	defer s.mu.Unlock()
	if st.next != nil {
		st.next.previous = st.previous
	}
	if st.previous != nil {
		st.previous.next = st.next
	} else {
		s.streams = st.next
	}
	st.previous, st.next = nil, nil
}

// awaitIdle has a stream that was shrunk shrunk again when it is idle again.
func (s *Session) awaitIdle(st *Stream) {
	s.mu.Lock()
	defer s.mu.Unlock()
	st.shrunk.Store(false)
	s.armShrink()
}

// armShrink is called with mu held, when there is a stream that isn't shrunk.
func (s *Session) armShrink() {
	if s.shrink == nil && !s.closed {
		s.shrink = time.AfterFunc(shrinkAfter, s.shrinkIdle)
	}
}

// shrinkIdle gives back the receive buffers of streams that wait in a pool. It
// runs again as long as there are others: of thousands of sessions, nearly all have
// none at any time.
func (s *Session) shrinkIdle() {
	s.mu.Lock()
	s.shrink = nil
	var idle []*Stream
	now := time.Now().UnixNano()
	for st := s.streams; st != nil; st = st.next {
		switch {
		case st.shrunk.Load():
		case now-st.lastUse.Load() >= int64(shrinkAfter):
			st.shrunk.Store(true)
			idle = append(idle, st)
		default:
			s.armShrink()
		}
	}
	s.mu.Unlock()
	for _, st := range idle {
		st.mux.Shrink() // may wait for a frame that is just being read
	}
}

// Listener returns a net.Listener of the streams that the other side opens, for
// http.Server. Closing it ends Accept and leaves the session as it is.
func (s *Session) Listener() net.Listener {
	ctx, cancel := context.WithCancelCause(context.Background())
	return &listener{session: s, ctx: ctx, cancel: cancel}
}

type listener struct {
	session *Session
	ctx     context.Context
	cancel  context.CancelCauseFunc
}

func (l *listener) Accept() (net.Conn, error) { return l.session.Accept(l.ctx) }
func (l *listener) Close() error              { l.cancel(net.ErrClosed); return nil }
func (l *listener) Addr() net.Addr            { return streamAddr(l.session.RemoteAddr) }

// muxLogger passes yamux's remarks on, at debug level: what matters of them
// comes back as an error. They are many, and most are dropped.
type muxLogger struct{ logger *slog.Logger }

func (l muxLogger) Print(v ...any) {
	if l.logger.Enabled(context.Background(), slog.LevelDebug) {
		l.logger.Debug(fmt.Sprint(v...))
	}
}

func (l muxLogger) Printf(format string, v ...any) {
	if l.logger.Enabled(context.Background(), slog.LevelDebug) {
		l.logger.Debug(fmt.Sprintf(format, v...))
	}
}

func (l muxLogger) Println(v ...any) { l.Print(v...) }
