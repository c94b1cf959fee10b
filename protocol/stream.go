package protocol

import (
	"errors"
	"io"
	"net"
	"sync/atomic"
	"time"

	"github.com/hashicorp/yamux"
)

// Stream is one stream of a session, a net.Conn. Close closes the write side at
// once and the read side when the other end has closed too, or after 10 s.
//
// A read that meets the end of the session returns io.ErrUnexpectedEOF, never
// io.EOF: a body that is delimited by the end of the stream must not look
// complete because the tunnel broke.
type Stream struct {
	mux     *yamux.Stream
	session *Session
	lastUse atomic.Int64 // Unix nanoseconds
	closing atomic.Bool
	halved  atomic.Int64 // Unix nanoseconds of CloseWrite, 0: never

	previous, next *Stream // of the session's open ones; protected by session.mu

	accepted bool        // opened by the other side
	shrunk   atomic.Bool // shrunk, and nothing read since; set with session.mu held
}

// copySize is the size of the largest data frame: the price of a frame is two
// context switches at each end, and larger ones make other streams wait.
const copySize = 64 << 10

func (st *Stream) Read(p []byte) (int, error) {
	if st.closing.Load() {
		return 0, net.ErrClosed
	}
	n, err := st.mux.Read(p)
	if n > 0 {
		st.lastUse.Store(time.Now().UnixNano())
		if st.shrunk.Load() {
			st.session.awaitIdle(st)
		}
	}
	switch {
	case st.closing.Load() && err != nil:
		err = net.ErrClosed
	case err == io.EOF && (st.session.mux.IsClosed() || st.givenUp()), st.woken(err):
		err = io.ErrUnexpectedEOF
	}
	if err != nil && err != io.EOF && err != io.ErrUnexpectedEOF && err != net.ErrClosed {
		err = st.error(err)
	}
	return n, err
}

// woken reports whether err is how wakeStreams ended a read or write.
func (st *Stream) woken(err error) bool {
	return errors.Is(err, yamux.ErrTimeout) && st.session.ending.Load()
}

// givenUp reports whether the stream was closed for writing so long ago that yamux
// may have reset it, which reads like the other side's end.
func (st *Stream) givenUp() bool {
	halved := st.halved.Load()
	return halved != 0 && time.Since(time.Unix(0, halved)) >= streamCloseTimeout
}

func (st *Stream) Write(p []byte) (int, error) {
	total := 0
	for {
		if st.closing.Load() {
			return total, net.ErrClosed
		}
		if st.session.ending.Load() {
			return total, st.session.endError()
		}
		n, err := st.mux.Write(p[:min(len(p), copySize)])
		total += n
		if err != nil {
			return total, st.error(err)
		}
		st.lastUse.Store(time.Now().UnixNano())
		if p = p[n:]; len(p) == 0 {
			return total, nil
		}
	}
}

func (st *Stream) error(err error) error {
	if st.closing.Load() {
		return net.ErrClosed
	}
	if st.woken(err) {
		return st.session.endError()
	}
	if errors.Is(err, yamux.ErrTimeout) {
		return err // a net.Error, as net/http wants it
	}
	return st.session.streamError(err)
}

// CloseWrite tells the other side that no more data comes. What it still sends
// can be read for 10 s; a read after that returns io.ErrUnexpectedEOF.
func (st *Stream) CloseWrite() error {
	st.halved.CompareAndSwap(0, time.Now().UnixNano())
	return st.mux.Close()
}

// Close returns at once: where the connection is stuck, the FIN would wait.
func (st *Stream) Close() error {
	if st.closing.Swap(true) {
		return nil
	}
	s := st.session
	s.unwrap(st)
	if st.accepted {
		<-s.taken
	}
	st.mux.SetDeadline(longAgo) // wakes who reads or writes
	if !s.start(func() { st.mux.Close() }) {
		st.mux.Close() // the session has ended, nothing to wait for
	}
	return nil
}

// Reset ends the stream so that the other side's reads fail. It returns at once.
func (st *Stream) Reset() {
	// yamux has no call for this. What it still has to send goes to a stream that
	// the other side has forgotten, and is dropped there.
	if !st.closing.Load() {
		st.session.start(func() { st.session.conn.writeReset(st.mux.StreamID()) })
	}
	st.Close()
}

// Idle returns how long ago data went through the stream.
func (st *Stream) Idle() time.Duration {
	return time.Since(time.Unix(0, st.lastUse.Load()))
}

// Session returns the session that the stream belongs to.
func (st *Stream) Session() *Session { return st.session }

func (st *Stream) LocalAddr() net.Addr  { return streamAddr("tunnel") }
func (st *Stream) RemoteAddr() net.Addr { return streamAddr(st.session.RemoteAddr) }

// SetDeadline sets both deadlines.
func (st *Stream) SetDeadline(t time.Time) error {
	st.SetReadDeadline(t)
	return st.SetWriteDeadline(t)
}

// SetReadDeadline bounds Read.
func (st *Stream) SetReadDeadline(t time.Time) error {
	st.mux.SetReadDeadline(t)
	if st.closing.Load() || st.session.ending.Load() {
		st.mux.SetReadDeadline(longAgo)
	}
	return nil
}

// SetWriteDeadline bounds how long Write waits for the other side to read. How
// long it waits for the connection to take data is bounded by
// SessionConfig.DeadAfter alone.
func (st *Stream) SetWriteDeadline(t time.Time) error {
	st.mux.SetWriteDeadline(t)
	if st.closing.Load() || st.session.ending.Load() {
		st.mux.SetWriteDeadline(longAgo)
	}
	return nil
}

type streamAddr string

func (streamAddr) Network() string  { return "culvert" }
func (a streamAddr) String() string { return string(a) }
