package spool

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"time"
)

// Push is a request that waits in a spool.
type Push struct {
	// Seq is its number, which Append gives.
	Seq uint64
	// Received is when all of it had come, or when it was made where it tells that.
	Received time.Time
	Method   string
	// Target is path and query as in a request line.
	Target string
	// Header has what goes with the push, in any form of case. Only the first value of
	// a field is kept.
	Header http.Header
	// Body is as it was sent: Header tells its encoding.
	Body []byte
}

// pushVersion is the first byte of a stored push. Behind it come, strings and numbers as
// varints of their length or value: Received in Unix nanoseconds, Method, Target, the
// number of header fields, a name and a value for each, and the body up to the end.
const pushVersion = 1

func (p *Push) appendBinary(out []byte) []byte {
	text := func(s string) {
		out = binary.AppendUvarint(out, uint64(len(s)))
		out = append(out, s...)
	}
	out = slices.Grow(out, len(p.Body)+len(p.Target)+256)
	out = append(out, pushVersion)
	out = binary.AppendVarint(out, p.Received.UnixNano())
	text(p.Method)
	text(p.Target)
	out = binary.AppendUvarint(out, uint64(len(p.Header)))
	for name := range p.Header {
		text(name)
		text(p.Header.Get(name))
	}
	return append(out, p.Body...)
}

// parsePush reads a push and its key. Nothing of the result refers to the arguments.
func parsePush(key, sealed []byte) (*Push, error) {
	if len(key) != 8 {
		return nil, fmt.Errorf("a push stands under the key %x", key)
	}
	p := &Push{Seq: binary.BigEndian.Uint64(key), Header: http.Header{}}
	rest, err := unseal(key, sealed)
	if err != nil {
		return nil, fmt.Errorf("push %d: %w", p.Seq, err)
	}
	if len(rest) == 0 || rest[0] != pushVersion {
		return nil, fmt.Errorf("push %d is in a form that this program doesn't know", p.Seq)
	}
	rest = rest[1:]
	cutOff := false
	number := func() uint64 {
		v, n := binary.Uvarint(rest)
		if n <= 0 {
			cutOff, rest = true, nil
			return 0
		}
		rest = rest[n:]
		return v
	}
	text := func() string {
		n := number()
		if n > uint64(len(rest)) {
			cutOff, rest = true, nil
			return ""
		}
		s := string(rest[:n])
		rest = rest[n:]
		return s
	}
	nanos, n := binary.Varint(rest)
	rest = rest[max(n, 0):]
	p.Received, p.Method, p.Target = time.Unix(0, nanos), text(), text()
	for range number() {
		name, value := text(), text()
		p.Header.Set(name, value)
		if cutOff {
			break
		}
	}
	if cutOff || n <= 0 {
		return nil, fmt.Errorf("push %d: %w", p.Seq, errors.New("it is cut off"))
	}
	p.Body = slices.Clone(rest)
	return p, nil
}
