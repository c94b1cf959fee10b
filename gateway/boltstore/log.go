package boltstore

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sort"
)

// commitLog is the two files that a store writes its changes to before they are
// acknowledged. One of them takes the changes, from its start on; when it is full
// they go on in the other, whose changes are in the database by then. So the files
// are overwritten again and again, and neither grows: a flush that has no new size to
// note costs half.
//
// A file is a sequence of frames, each at a multiple of frameAlign bytes. A frame is
//
//	8 bytes  which store it belongs to
//	8 bytes  number; each try to write one takes the next
//	8 bytes  number of the last frame before that was written
//	4 bytes  length of the payload
//	4 bytes  CRC-32C of the 28 bytes above and the payload
//	the payload, and zeros up to the next multiple of frameAlign
//
// with little-endian integers. What follows the last frame is left of earlier ones,
// with smaller numbers. A crash leaves at most one frame incomplete: the last one,
// which was not acknowledged.
type commitLog struct {
	paths   [2]string
	store   uint64
	files   [2]*os.File
	sizes   [2]int64
	active  int    // the file that takes the next frame
	end     int64  // where in it
	tried   uint64 // number of the last try
	written uint64 // number of the last frame that was written, or saved to the database
	buf     []byte
}

const (
	frameHeaderSize = 32
	frameAlign      = 512
	// maxFrame bounds what a length may be that is worth to be believed.
	maxFrame = 1 << 30
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func newCommitLog(path string, store uint64) *commitLog {
	return &commitLog{paths: [2]string{path + ".log0", path + ".log1"}, store: store}
}

// frameRef is a frame in a file.
type frameRef struct {
	file             int
	offset           int64
	number, previous uint64
}

// replay calls f with the payload of each frame whose number is above applied, in
// order. It opens the files for reading only. It returns the highest number, and an
// error for whatever a crash doesn't leave behind. The payload is only valid until f
// returns.
func (l *commitLog) replay(applied uint64, f func(payload []byte) error) (last uint64, err error) {
	var files [2]*os.File
	var frames []frameRef
	for i, path := range l.paths {
		file, err := os.Open(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		} else if err != nil {
			return 0, err
		}
		defer file.Close()
		files[i] = file
		if frames, err = l.scan(frames, file, i, applied); err != nil {
			return 0, fmt.Errorf("%s: %w", path, err)
		}
	}
	if len(frames) == 0 {
		return applied, nil
	}
	sort.Slice(frames, func(i, j int) bool { return frames[i].number < frames[j].number })
	last = frames[len(frames)-1].number
	// Each frame tells which one was written before it: those between failed.
	var chain []frameRef
	for i := len(frames) - 1; ; {
		chain = append(chain, frames[i])
		previous := frames[i].previous
		if previous <= applied {
			break
		}
		for i--; i >= 0 && frames[i].number > previous; i-- {
		}
		if i < 0 || frames[i].number != previous {
			return 0, fmt.Errorf("%s: the change %d is missing", l.paths[0], previous)
		}
	}
	for _, ref := range slices.Backward(chain) {
		number, _, payload, err := l.frame(files[ref.file], ref.offset)
		if err == nil && (payload == nil || number != ref.number) {
			err = errors.New("it changes while it is read")
		}
		if err == nil {
			err = f(payload)
		}
		if err != nil {
			return 0, fmt.Errorf("%s: change %d: %w", l.paths[ref.file], ref.number, err)
		}
	}
	return last, nil
}

// scan appends the frames of a file with numbers above applied.
func (l *commitLog) scan(frames []frameRef, file *os.File, index int, applied uint64) ([]frameRef, error) {
	offset, last := int64(0), uint64(0)
	for {
		number, previous, payload, err := l.frame(file, offset)
		if err != nil {
			return nil, err
		}
		if payload == nil || number <= last {
			break
		}
		if last = number; number > applied {
			frames = append(frames, frameRef{index, offset, number, previous})
		}
		offset += frameSize(len(payload))
	}
	// Nothing newer may follow what can't be read.
	info, err := file.Stat()
	if err != nil {
		return nil, err
	}
	for last = max(last, applied); offset < info.Size(); offset += frameAlign {
		switch number, _, payload, err := l.frame(file, offset); {
		case err != nil:
			return nil, err
		case payload != nil && number > last:
			return nil, fmt.Errorf("the change %d is there, and one after %d can't be read", number, last)
		}
	}
	return frames, nil
}

func frameSize(payload int) int64 {
	return (frameHeaderSize + int64(payload) + frameAlign - 1) / frameAlign * frameAlign
}

// frame reads a frame; its payload is nil where there is no whole one of this store.
func (l *commitLog) frame(file *os.File, offset int64) (number, previous uint64, payload []byte, err error) {
	var header [frameHeaderSize]byte
	if _, err := file.ReadAt(header[:], offset); err == io.EOF {
		return 0, 0, nil, nil
	} else if err != nil {
		return 0, 0, nil, err
	}
	length := int(binary.LittleEndian.Uint32(header[24:]))
	if binary.LittleEndian.Uint64(header[:]) != l.store || length > maxFrame {
		return 0, 0, nil, nil
	}
	if cap(l.buf) < length {
		info, err := file.Stat()
		if err != nil || offset+int64(length) > info.Size() {
			return 0, 0, nil, err
		}
		l.buf = make([]byte, 0, length)
	}
	payload = l.buf[:length:length]
	if _, err := file.ReadAt(payload, offset+frameHeaderSize); err == io.EOF {
		return 0, 0, nil, nil
	} else if err != nil {
		return 0, 0, nil, err
	}
	if binary.LittleEndian.Uint32(header[28:]) != checksum(header[:28], payload) {
		return 0, 0, nil, nil
	}
	if payload == nil {
		payload = []byte{}
	}
	return binary.LittleEndian.Uint64(header[8:]), binary.LittleEndian.Uint64(header[16:]), payload, nil
}

func checksum(header, payload []byte) uint32 {
	return crc32.Update(crc32.Checksum(header, castagnoli), castagnoli, payload)
}

// moveForeign moves files away that another store wrote, whose database is gone: they
// may hold what that one lacks. It returns their new names.
func (l *commitLog) moveForeign() (moved []string, err error) {
	for _, path := range l.paths {
		file, err := os.Open(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		} else if err != nil {
			return moved, err
		}
		var id [8]byte
		_, err = io.ReadFull(file, id[:])
		file.Close()
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			continue // not even one frame
		} else if err != nil {
			return moved, err
		}
		if of := binary.LittleEndian.Uint64(id[:]); of != 0 && of != l.store {
			to := fmt.Sprintf("%s.of-%016x", path, of)
			if err := os.Rename(path, to); err != nil {
				return moved, err
			}
			moved = append(moved, to)
		}
	}
	return moved, nil
}

// open opens the files for writing. All their frames, up to the number last, must be
// in the database.
func (l *commitLog) open(last uint64) error {
	for i, path := range l.paths {
		file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			l.close()
			return err
		}
		l.files[i] = file
		info, err := file.Stat()
		if err != nil {
			l.close()
			return err
		}
		l.sizes[i] = info.Size()
	}
	if err := syncDir(filepath.Dir(l.paths[0])); err != nil {
		l.close()
		return err
	}
	l.active, l.end, l.tried, l.written = 0, 0, last, last
	return nil
}

// frameStart returns a buffer for a payload: it is to be appended.
func (l *commitLog) frameStart() []byte {
	return slices.Grow(l.buf[:0], frameHeaderSize)[:frameHeaderSize]
}

// write writes a frame, frameStart's buffer with a payload, and returns when it is on
// disk. Where it fails the next frame takes its place.
func (l *commitLog) write(frame []byte) error {
	payload := len(frame) - frameHeaderSize
	if payload > maxFrame {
		return fmt.Errorf("a change of %d bytes is too large", payload)
	}
	l.tried++
	binary.LittleEndian.PutUint64(frame, l.store)
	binary.LittleEndian.PutUint64(frame[8:], l.tried)
	binary.LittleEndian.PutUint64(frame[16:], l.written)
	binary.LittleEndian.PutUint32(frame[24:], uint32(payload))
	binary.LittleEndian.PutUint32(frame[28:], checksum(frame[:28], frame[frameHeaderSize:]))
	size := int(frameSize(payload))
	frame = append(frame, make([]byte, size-len(frame))...)
	if cap(frame) <= 1<<20 {
		l.buf = frame
	}
	if err := l.put(frame); err != nil {
		return err
	}
	l.end += int64(size)
	l.written = l.tried
	return nil
}

// growth is in which steps the files grow: a flush that has a new size or new blocks to
// note costs twice as much, and zeros that are written ahead spare it that.
const growth = 256 << 10

var zeros [growth]byte

// put writes behind the last frame.
func (l *commitLog) put(data []byte) error {
	file := l.files[l.active]
	end, size := l.end+int64(len(data)), &l.sizes[l.active]
	if end > *size {
		if _, err := file.WriteAt(zeros[:], end); err == nil {
			*size = end + growth
		} else { // there may be room for the frame itself
			file.Truncate(*size)
		}
	}
	if _, err := file.WriteAt(data, l.end); err != nil {
		return err
	}
	*size = max(*size, end)
	if err := datasync(file); err != nil {
		return fmt.Errorf("%s: %w", file.Name(), err)
	}
	return nil
}

// probe tells whether so many bytes can be written.
func (l *commitLog) probe(size int) error { return l.put(make([]byte, size)) }

// turn makes the other file the one that takes the next frame. All its frames must
// be in the database.
func (l *commitLog) turn() {
	l.active, l.end = 1-l.active, 0
}

func (l *commitLog) close() error {
	if l == nil {
		return nil
	}
	var errs []error
	for i, file := range l.files {
		if file != nil {
			errs = append(errs, file.Close())
			l.files[i] = nil
		}
	}
	return errors.Join(errs...)
}
