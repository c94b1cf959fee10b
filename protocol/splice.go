package protocol

import (
	"bufio"
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// Buffers is a pool of buffers of 64 KiB, the size in which bodies are copied. It
// is an httputil.BufferPool.
var Buffers bufferPool

type bufferPool struct{}

var copyBuffers = sync.Pool{New: func() any {
	b := make([]byte, copySize)
	return &b
}}

// Get returns a buffer of 64 KiB.
func (bufferPool) Get() []byte { return *copyBuffers.Get().(*[]byte) }

// Put takes a buffer back.
func (bufferPool) Put(b []byte) {
	if cap(b) == copySize {
		b = b[:copySize]
		copyBuffers.Put(&b)
	}
}

// ErrIdle is returned by Splice when nothing went either way for the idle timeout.
var ErrIdle = errors.New("nothing went through for the idle timeout")

// halfIdle is the idle timeout once one side has ended.
const halfIdle = streamCloseTimeout

// Splice copies bytes both ways until both sides have ended, one fails, or
// nothing went either way for idle, or for 10 s once one side has ended. It closes
// both connections, with a reset where one failed. It returns how many bytes went
// from b to a, and nil where both ended in good order.
func Splice(a, b net.Conn, idle time.Duration) (int64, error) {
	s := &splicing{}
	s.last.Store(time.Now().UnixNano())
	s.idle.Store(int64(idle))
	var toA int64
	var errA, errB error
	var closing sync.Once
	end := func(err error) {
		closing.Do(func() {
			if err == nil || errors.Is(err, ErrIdle) || errors.Is(err, net.ErrClosed) {
				a.Close()
				b.Close()
				return
			}
			// A clean end would pass for the end of the data.
			Reset(a)
			Reset(b)
		})
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		if toA, errA = s.copy(a, b); errA != nil {
			end(errA)
		}
	})
	wg.Go(func() {
		if _, errB = s.copy(b, a); errB != nil {
			end(errB)
		}
	})
	wg.Wait()
	end(nil)
	// Where one side failed, the other's error is only the echo of closing it.
	for _, err := range []error{errA, errB} {
		if IsSessionEnd(err) || errors.Is(err, ErrIdle) {
			return toA, err
		}
	}
	return toA, errors.Join(errA, errB)
}

// splicing is what both directions share.
type splicing struct {
	last atomic.Int64 // when data went through, either way; Unix nanoseconds
	idle atomic.Int64 // nanoseconds
}

func (s *splicing) deadline() time.Time {
	return time.Unix(0, s.last.Load()+s.idle.Load())
}

// copy copies src to dst until src ends, which it passes on to dst.
func (s *splicing) copy(dst, src net.Conn) (int64, error) {
	buf := Buffers.Get()
	defer Buffers.Put(buf)
	var total int64
	for {
		src.SetReadDeadline(s.deadline())
		n, err := src.Read(buf)
		if n > 0 {
			s.last.Store(time.Now().UnixNano())
			dst.SetWriteDeadline(s.deadline())
			if _, werr := dst.Write(buf[:n]); werr != nil {
				return total, werr
			}
			total += int64(n)
		}
		var timeout net.Error
		switch {
		case err == nil:
		case err == io.EOF:
			half, ok := dst.(interface{ CloseWrite() error })
			if !ok {
				return total, dst.Close()
			}
			err := half.CloseWrite()
			s.last.Store(time.Now().UnixNano()) // an end is news
			s.idle.Store(min(s.idle.Load(), int64(halfIdle)))
			dst.SetReadDeadline(s.deadline()) // of the other direction, which may be waiting
			return total, err
		case errors.As(err, &timeout) && timeout.Timeout():
			if !time.Now().Before(s.deadline()) {
				return total, ErrIdle
			}
		default:
			return total, err
		}
	}
}

// PassAhead writes to dst what r holds beyond the message that was read from it.
func PassAhead(dst io.Writer, r *bufio.Reader) error {
	ahead, err := r.Peek(r.Buffered())
	if err != nil || len(ahead) == 0 {
		return err
	}
	_, err = dst.Write(ahead)
	return err
}
