package protocol

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coder/websocket"
	"github.com/hashicorp/yamux"
)

// frameConn is the connection below yamux. yamux writes the header of a frame
// and its body in two calls; frameConn holds a data frame's header back and
// sends both in one system call, one TLS record run or one WebSocket message.
// In a profile, system calls are half of all CPU time of a scrape.
type frameConn struct {
	rw  io.ReadWriteCloser
	tcp *net.TCPConn // rw's writes may go here directly, vectored; nil where they can't

	socket *net.TCPConn // below all of it; nil where it is not known

	stats    *Stats
	failed   func()       // called when a read or write fails
	closed   func()       // called when yamux, which has ended then, closes the connection
	lastRead atomic.Int64 // Unix nanoseconds
	writing  atomic.Int64 // Unix nanoseconds since when a write runs, 0: none

	// Used by yamux's one sending goroutine only.
	header        [frameHeaderSize]byte
	held          bool
	unsent        int           // the limit that limitUnsent was told
	largeBytes    int           // in large frames, since the limit was looked at
	largeDuration time.Duration // of their writes

	write sync.Mutex // held while a frame is written

	// Used by yamux's one receiving goroutine only.
	incoming frameWatch

	mu    sync.Mutex // protects what follows
	cause error      // first error of a read or write
	last  error      // latest one: yamux may report either
}

// What the kernel holds and has not sent goes before every other frame, and it would
// take megabytes. It is kept to what the connection sends in a few milliseconds:
// less on a slow link, where a small frame would wait, and more on a fast one, where
// each wait of a write costs processor time. The rate is measured once writes have
// taken rateTime, which is when they wait.
const (
	unsentTime             = 5 * time.Millisecond
	rateTime               = 50 * time.Millisecond
	firstUnsent            = 512 << 10
	leastUnsent, maxUnsent = 64 << 10, 4 << 20
)

// limit sets how much the kernel may hold that it has not sent.
func (c *frameConn) limit(n int) {
	if c.socket != nil {
		c.unsent = n
		limitUnsent(c.socket, n)
	}
}

// measure notes how long the write of a frame took, and adapts the limit.
func (c *frameConn) measure(n int, d time.Duration) {
	if c.socket == nil || n < copySize/4 {
		return
	}
	c.largeBytes += n
	c.largeDuration += d
	if c.largeDuration < rateTime {
		return
	}
	n = int(float64(c.largeBytes) / c.largeDuration.Seconds() * unsentTime.Seconds())
	n = max(leastUnsent, min(n, maxUnsent))
	if n < c.unsent*2/3 || n > c.unsent*3/2 {
		c.limit(n)
	}
	c.largeBytes, c.largeDuration = 0, 0
}

// The frame header of yamux (its spec.md): version, type, flags, stream, length.
const (
	frameHeaderSize = 12
	frameTypeData   = 0

	frameTypeWindowUpdate = 1
	frameTypePing         = 2
	frameFlagSYN          = 1
	frameFlagRST          = 8
)

// smallBody is the size of a body up to which a frame is copied together. That is
// cheaper than a vectored write, which also goes so deep that it doubles the stack of
// yamux's sending goroutine: the proxy has one for each agent, and sends it little but
// small frames.
const smallBody = 4 << 10

var joinBuffers, smallJoinBuffers = framePool(frameHeaderSize + copySize), framePool(frameHeaderSize + smallBody)

func framePool(size int) *sync.Pool {
	return &sync.Pool{New: func() any {
		b := make([]byte, 0, size)
		return &b
	}}
}

func (c *frameConn) Read(p []byte) (int, error) {
	n, err := c.rw.Read(p)
	if n > 0 {
		c.lastRead.Store(time.Now().UnixNano())
		c.stats.BytesRead.Add(int64(n))
		if flood := c.incoming.see(p[:n]); flood != nil {
			return 0, c.note(flood)
		}
	}
	return n, c.note(err)
}

func (c *frameConn) Write(p []byte) (int, error) {
	if !c.held && len(p) == frameHeaderSize && p[1] == frameTypeData && p[8]|p[9]|p[10]|p[11] != 0 {
		copy(c.header[:], p)
		c.held = true
		return len(p), nil
	}
	c.write.Lock()
	defer c.write.Unlock()
	start := time.Now()
	c.writing.Store(start.UnixNano())
	defer c.writing.Store(0)
	if !c.held {
		n, err := c.rw.Write(p)
		c.stats.BytesWritten.Add(int64(n))
		return n, c.note(err)
	}
	c.held = false
	var n int
	var err error
	if c.tcp != nil && len(p) > smallBody {
		parts := net.Buffers{c.header[:], p}
		var n64 int64
		n64, err = parts.WriteTo(c.tcp)
		n = int(n64)
	} else {
		pool := joinBuffers
		if len(p) <= smallBody {
			pool = smallJoinBuffers
		}
		buf := pool.Get().(*[]byte)
		joined := append(append((*buf)[:0], c.header[:]...), p...)
		n, err = c.rw.Write(joined)
		if cap(joined) == cap(*buf) {
			pool.Put(buf)
		}
	}
	c.stats.BytesWritten.Add(int64(n))
	c.measure(n, time.Since(start))
	return max(n-frameHeaderSize, 0), c.note(err)
}

// writeReset writes a frame that resets a stream.
func (c *frameConn) writeReset(stream uint32) {
	frame := [frameHeaderSize]byte{1: frameTypeWindowUpdate, 3: frameFlagRST}
	binary.BigEndian.PutUint32(frame[4:], stream)
	c.write.Lock()
	defer c.write.Unlock()
	n, err := c.rw.Write(frame[:])
	c.stats.BytesWritten.Add(int64(n))
	c.note(err)
}

func (c *frameConn) Close() error {
	err := c.rw.Close()
	c.closed()
	return err
}

// frameWatch follows the frames that come in. yamux answers each ping in a
// goroutine of its own, which waits for the connection: whoever sends many pings
// and reads nothing would fill the memory.
type frameWatch struct {
	header [frameHeaderSize]byte
	have   int    // bytes of header
	body   uint32 // bytes of the frame's body that are still to come
	pings  int    // since second
	second time.Time
	opened func() // called when the other side opens a stream
}

// maxPings bounds the pings that a side may send in a second.
const maxPings = 100

func (w *frameWatch) see(p []byte) error {
	for len(p) > 0 {
		if w.body > 0 {
			n := min(uint64(w.body), uint64(len(p)))
			w.body -= uint32(n)
			p = p[n:]
			continue
		}
		n := copy(w.header[w.have:], p)
		p = p[n:]
		if w.have += n; w.have < frameHeaderSize {
			return nil
		}
		w.have = 0
		if w.header[3]&frameFlagSYN != 0 && w.header[1] <= frameTypeWindowUpdate {
			w.opened()
		}
		switch w.header[1] {
		case frameTypeData:
			w.body = binary.BigEndian.Uint32(w.header[8:])
		case frameTypePing:
			if now := time.Now(); now.Sub(w.second) > time.Second {
				w.second, w.pings = now, 0
			}
			if w.pings++; w.pings > maxPings {
				return fmt.Errorf("%w: more than %d pings in a second", ErrProtocol, maxPings)
			}
		}
	}
	return nil
}

func (c *frameConn) note(err error) error {
	if err != nil {
		c.mu.Lock()
		if c.cause == nil {
			c.cause = err
		}
		c.last = err
		c.mu.Unlock()
		c.failed()
	}
	return err
}

// writingFor returns how long the write that runs now has been running.
func (c *frameConn) writingFor() time.Duration {
	if since := c.writing.Load(); since != 0 {
		return time.Since(time.Unix(0, since))
	}
	return 0
}

// endCause returns why the session ended, given why yamux did.
func (c *frameConn) endCause(muxError error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case errors.Is(c.cause, ErrProtocol):
		return c.cause
	case errors.Is(muxError, io.EOF), errors.Is(muxError, io.ErrUnexpectedEOF), errors.Is(muxError, yamux.ErrSessionShutdown):
		return ErrPeerClosed
	case c.cause != nil && (errors.Is(muxError, c.cause) || errors.Is(muxError, c.last)):
		return fmt.Errorf("%w: %w", ErrPeerClosed, c.cause)
	}
	return fmt.Errorf("%w: %w", ErrProtocol, muxError)
}

// messageConn carries bytes in binary WebSocket messages, one for each Write.
// It has no deadlines: the session above closes it when it is dead.
type messageConn struct {
	ws      *websocket.Conn
	message io.Reader // the rest of the message that is being read
}

func newMessageConn(ws *websocket.Conn) *messageConn {
	ws.SetReadLimit(-1) // frames are bounded by yamux's windows
	return &messageConn{ws: ws}
}

func (c *messageConn) Read(p []byte) (int, error) {
	for {
		if c.message == nil {
			kind, r, err := c.ws.Reader(context.Background())
			if err != nil {
				if websocket.CloseStatus(err) != -1 {
					err = io.EOF
				}
				return 0, err
			}
			if kind != websocket.MessageBinary {
				return 0, errors.New("a WebSocket message is not binary")
			}
			c.message = r
		}
		n, err := c.message.Read(p)
		if err == io.EOF {
			c.message, err = nil, nil
		}
		if n > 0 || err != nil {
			return n, err
		}
	}
}

func (c *messageConn) Write(p []byte) (int, error) {
	if err := c.ws.Write(context.Background(), websocket.MessageBinary, p); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Close skips the closing handshake, which would wait for the other side.
func (c *messageConn) Close() error { return c.ws.CloseNow() }
