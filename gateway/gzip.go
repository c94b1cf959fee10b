package gateway

import (
	"bufio"
	"bytes"
	"compress/flate"
	"compress/gzip"
	"encoding/binary"
	"hash/crc32"
	"io"
	"sync"
)

// Gzip is an implementation of gzip, to answer scrapes and to read pushes. Both functions
// must be set. It must not be copied after first use.
type Gzip struct {
	// NewDeflater returns a writer of the DEFLATE format (RFC 1951) that would rather be
	// fast than compress well. It is used again, after a Reset.
	NewDeflater func() Deflater
	NewReader   func(io.Reader) (io.Reader, error)

	idle sync.Pool // of Deflaters
}

// Deflater compresses what is written.
type Deflater interface {
	io.Writer
	// Flush writes what is pending, up to a byte boundary: RFC 1951, 3.2.4, an empty block
	// that is not the last one.
	Flush() error
	// Reset starts anew, towards w.
	Reset(w io.Writer)
}

// standardGzip is what programs have anyway, by net/http. Package fastgzip has what takes
// about half the time.
var standardGzip = &Gzip{
	NewDeflater: func() Deflater {
		zw, _ := flate.NewWriter(nil, flate.BestSpeed) // the level is a good one
		return zw
	},
	NewReader: func(r io.Reader) (io.Reader, error) { return gzip.NewReader(r) },
}

func (z *Gzip) deflater() Deflater {
	if idle, ok := z.idle.Get().(Deflater); ok {
		return idle
	}
	return z.NewDeflater()
}

// deflated is bytes that were compressed by themselves, up to a byte boundary. They can
// stand anywhere in a gzip file.
type deflated struct {
	data  []byte
	size  uint32 // before compression
	sum   uint32 // CRC-32 of that
	shift uint32 // see shiftOf
}

// deflate compresses content onto the end of out. The result lacks the data, which are
// there.
func deflate(out *bytes.Buffer, zw Deflater, content []byte) deflated {
	zw.Reset(out)
	zw.Write(content) // a bytes.Buffer takes all
	zw.Flush()
	return deflated{nil, uint32(len(content)), crc32.ChecksumIEEE(content), shiftOf(len(content))}
}

const (
	// pendingSize is how many bytes a gzipWriter collects before it compresses them.
	pendingSize = 64 << 10
	// storedSize is up to how many bytes are not worth to be compressed by themselves.
	storedSize = 128
)

// gzipWriter writes a gzip file (RFC 1952) of one member, from bytes that it compresses
// and from such that are compressed already.
type gzipWriter struct {
	w         *bufio.Writer
	zip       *Gzip
	zw        Deflater
	open      bool // zw has begun, and was not flushed
	pending   []byte
	size, sum uint32
}

func newGzipWriter(w *bufio.Writer, zip *Gzip) *gzipWriter {
	w.Write([]byte{0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 4, 0xff}) // deflate, no name, no time, fastest, no system
	return &gzipWriter{w: w, zip: zip, zw: zip.deflater()}
}

func (g *gzipWriter) Write(b []byte) (int, error) {
	g.size += uint32(len(b))
	g.sum = crc32.Update(g.sum, crc32.IEEETable, b)
	g.pending = append(g.pending, b...)
	if len(g.pending) < pendingSize {
		return len(b), nil
	}
	return len(b), g.compress()
}

func (g *gzipWriter) compress() error {
	if !g.open {
		g.zw.Reset(g.w)
		g.open = true
	}
	_, err := g.zw.Write(g.pending)
	g.pending = g.pending[:0]
	return err
}

// flush writes all up to a byte boundary.
func (g *gzipWriter) flush() error {
	if n := len(g.pending); !g.open && n <= storedSize {
		if n == 0 {
			return nil
		}
		g.w.Write([]byte{0, byte(n), 0, ^byte(n), 0xff}) // a block that is not compressed: RFC 1951, 3.2.4
		_, err := g.w.Write(g.pending)
		g.pending = g.pending[:0]
		return err
	}
	if err := g.compress(); err != nil {
		return err
	}
	g.open = false
	return g.zw.Flush()
}

// writeDeflated writes what is compressed already.
func (g *gzipWriter) writeDeflated(d deflated) error {
	if err := g.flush(); err != nil {
		return err
	}
	g.size += d.size
	g.sum = multModP(d.shift, g.sum) ^ d.sum
	_, err := g.w.Write(d.data)
	return err
}

// Close ends the file.
func (g *gzipWriter) Close() error {
	if err := g.flush(); err != nil {
		return err
	}
	g.zip.idle.Put(g.zw)
	g.w.Write([]byte{1, 0, 0, 0xff, 0xff}) // an empty last block
	_, err := g.w.Write(binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint32(nil, g.sum), g.size))
	return err
}

// inflaters are what flate.NewReader returns: 40 KB each, where an exposition has thousands
// of pieces.
var inflaters sync.Pool

// inflate writes what d was before compression.
func (d deflated) inflate(w io.Writer) error {
	r, ok := inflaters.Get().(io.ReadCloser)
	if !ok {
		r = flate.NewReader(nil)
	}
	defer inflaters.Put(r)
	if err := r.(flate.Resetter).Reset(bytes.NewReader(d.data), nil); err != nil {
		return err
	}
	_, err := io.CopyN(w, r, int64(d.size))
	return err
}

// shiftOf returns x^(8n) modulo the polynomial of CRC-32: the CRC of two texts is that of the
// first, times shiftOf the length of the second, plus that of the second. So the sum of
// what is compressed already needs no look at it. This is how zlib's crc32_combine does it.
func shiftOf(n int) uint32 {
	power, shift := uint32(1)<<(31-8), uint32(1)<<31 // x^8 and 1: the highest bit is x^0
	for ; n > 0; n >>= 1 {
		if n&1 == 1 {
			shift = multModP(power, shift)
		}
		power = multModP(power, power)
	}
	return shift
}

// multModP multiplies two polynomials modulo that of CRC-32.
func multModP(a, b uint32) (product uint32) {
	for bit := uint32(1) << 31; bit > 0; bit >>= 1 {
		if a&bit != 0 {
			product ^= b
		}
		if b&1 == 1 {
			b = b>>1 ^ crc32.IEEE
		} else {
			b >>= 1
		}
	}
	return product
}
