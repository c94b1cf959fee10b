package boltstore

import (
	"encoding/binary"
	"errors"

	"github.com/culvert-io/culvert/gateway"
)

// A change in a frame is a groupKey, one byte of the kind, and for all kinds but the
// first the length of the content as a varint and the content. A mark, whose spool
// stands in the content, has the hash of that for a key.
const (
	changeGone   = iota
	changeRecord // Record.AppendBinary
	changeRepeat // Record.AppendRepeat
	changeMark   // Mark.AppendBinary
)

func appendChange(frame []byte, key groupKey, c gateway.Change) ([]byte, error) {
	switch {
	case c.Record == nil:
		return append(append(frame, key[:]...), changeGone), nil
	case c.Record.Repeats:
		return appendContent(frame, key, changeRepeat, func(out []byte) ([]byte, error) { return c.Record.AppendRepeat(out), nil })
	}
	return appendContent(frame, key, changeRecord, c.Record.AppendBinary)
}

// appendContent appends a change whose content is what add appends.
func appendContent(frame []byte, key groupKey, kind byte, add func([]byte) ([]byte, error)) ([]byte, error) {
	frame = append(append(frame, key[:]...), kind)
	// The length stands in front of the content, and is known behind it.
	const room = binary.MaxVarintLen32
	at := len(frame)
	frame, err := add(append(frame, make([]byte, room)...))
	if err != nil {
		return nil, err
	}
	size := len(frame) - at - room
	used := binary.PutUvarint(frame[at:at+room], uint64(size))
	copy(frame[at+used:], frame[at+room:])
	return frame[:at+used+size], nil
}

func cutChange(payload []byte) (key groupKey, kind byte, content, rest []byte, err error) {
	cutOff := errors.New("it is cut off")
	if len(payload) < len(key)+1 {
		return key, 0, nil, nil, cutOff
	}
	payload = payload[copy(key[:], payload):]
	if kind, payload = payload[0], payload[1:]; kind == changeGone {
		return key, kind, nil, payload, nil
	}
	size, n := binary.Uvarint(payload)
	if n <= 0 || size > uint64(len(payload)-n) {
		return key, 0, nil, nil, cutOff
	}
	payload = payload[n:]
	return key, kind, payload[:size:size], payload[size:], nil
}
