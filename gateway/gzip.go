package gateway

import (
	"compress/gzip"
	"io"
	"sync"
)

// Gzip is an implementation of gzip, to answer scrapes and to read pushes. Both functions
// must be set. It must not be copied after first use.
type Gzip struct {
	// NewWriter returns a writer that would rather be fast than compress well. It is
	// used again, after a Reset.
	NewWriter func() GzipWriter
	NewReader func(io.Reader) (io.Reader, error)

	idle sync.Pool // of GzipWriters
}

// GzipWriter compresses what is written.
type GzipWriter interface {
	io.WriteCloser
	// Reset starts anew, towards w.
	Reset(w io.Writer)
}

// standardGzip is what programs have anyway, by net/http. Package fastgzip has what takes
// about half the time.
var standardGzip = &Gzip{
	NewWriter: func() GzipWriter {
		zw, _ := gzip.NewWriterLevel(nil, gzip.BestSpeed) // the level is a good one
		return zw
	},
	NewReader: func(r io.Reader) (io.Reader, error) { return gzip.NewReader(r) },
}

// writer returns a writer to w. done ends the compression, and takes the writer back.
func (z *Gzip) writer(w io.Writer) (zw io.Writer, done func()) {
	idle, ok := z.idle.Get().(GzipWriter)
	if !ok {
		idle = z.NewWriter()
	}
	idle.Reset(w)
	return idle, func() {
		idle.Close()
		z.idle.Put(idle)
	}
}
