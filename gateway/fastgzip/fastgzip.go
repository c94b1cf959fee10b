// Package fastgzip has the gzip of github.com/klauspost/compress for a gateway. It takes
// half the time of compress/gzip to compress an exposition, and two thirds to decompress
// one, and makes a program a fifth of a megabyte larger: it is for who serves many groups.
package fastgzip

import (
	"io"

	"github.com/klauspost/compress/flate"
	"github.com/klauspost/compress/gzip"

	"github.com/culvert-io/culvert/gateway"
)

// Gzip is a gateway.Config.Gzip.
var Gzip = &gateway.Gzip{
	NewDeflater: func() gateway.Deflater {
		zw, _ := flate.NewWriter(nil, flate.BestSpeed) // the level is a good one
		return zw
	},
	NewReader: func(r io.Reader) (io.Reader, error) { return gzip.NewReader(r) },
}
