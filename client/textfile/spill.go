package textfile

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
)

// spill keeps bytes out of the memory, in a temporary file that has no name: it goes with
// the last blob that is in it, and with the process. Where it can't be written, what was
// to go there stays in memory; that is logged.
type spill struct {
	dir    string // the system's by default
	logger *slog.Logger
	file   *os.File // nil until it is needed
	size   int64    // of what was written to it
	failed bool
}

// blob is what was put into a spill. It is immutable, and may be read by several
// goroutines at a time.
type blob struct {
	memory []byte   // all of it, or
	file   *os.File // where it is
	offset int64
	size   int
}

// put stores a copy of b, in memory where it has no more than memory bytes.
func (s *spill) put(b []byte, memory int64) blob {
	if int64(len(b)) > memory {
		stored, err := s.write(b)
		if err == nil {
			s.failed = false
			return stored
		}
		if !s.failed {
			s.failed = true
			s.logger.Warn("What large textfiles hold stays in memory, as the temporary file for it can't be written; make room, or set TMPDIR", "err", err)
		}
	}
	return blob{memory: slices.Clone(b), size: len(b)}
}

func (s *spill) write(b []byte) (blob, error) {
	if s.file == nil {
		var err error
		if s.file, err = openTemporary(s.dir); err != nil {
			return blob{}, err
		}
		s.size = 0
	}
	if _, err := s.file.WriteAt(b, s.size); err != nil {
		return blob{}, err
	}
	stored := blob{file: s.file, offset: s.size, size: len(b)}
	s.size += int64(len(b))
	return stored, nil
}

// renew starts a new file, whose first blobs are copies of those given. A blob that can't
// be copied stays where it is.
func (s *spill) renew(blobs []*blob) {
	next := spill{dir: s.dir}
	var buffer []byte
	for _, b := range blobs {
		buffer = slices.Grow(buffer[:0], b.size)[:b.size]
		if b.readAt(buffer, 0) != nil {
			continue
		}
		moved, err := next.write(buffer)
		if err != nil {
			return
		}
		*b = moved
	}
	s.file, s.size = next.file, next.size
}

// readAt fills p with what stands at offset of the blob.
func (b *blob) readAt(p []byte, offset int) error {
	if offset < 0 || offset+len(p) > b.size {
		return io.ErrUnexpectedEOF
	}
	if b.file == nil {
		copy(p, b.memory[offset:])
		return nil
	}
	if _, err := b.file.ReadAt(p, b.offset+int64(offset)); err != nil {
		return fmt.Errorf("read the temporary file: %w", err)
	}
	return nil
}

// openTemporary opens a file that nobody else finds. Nobody needs to close it: the
// collector of garbage does.
func openTemporary(dir string) (*os.File, error) {
	dirs := []string{dir}
	if dir == "" {
		dirs = []string{os.TempDir()}
		if os.Getenv("TMPDIR") == "" && runtime.GOOS != "windows" {
			dirs = []string{"/var/tmp", os.TempDir()} // /tmp is often memory
		}
	}
	flag := os.O_RDWR | os.O_CREATE | os.O_EXCL
	if runtime.GOOS == "windows" {
		flag |= 0x04000000 // FILE_FLAG_DELETE_ON_CLOSE: an open file can't be removed
	}
	var failures []error
	for _, dir := range dirs {
		path := filepath.Join(dir, "culvert-textfiles-"+rand.Text())
		file, err := os.OpenFile(path, flag, 0o600)
		if err == nil && runtime.GOOS != "windows" {
			if err = os.Remove(path); err != nil {
				file.Close()
			}
		}
		if err == nil {
			return file, nil
		}
		failures = append(failures, err)
	}
	return nil, errors.Join(failures...)
}
