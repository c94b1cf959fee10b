package textfile

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"iter"

	dto "github.com/prometheus/client_model/go"
)

const (
	// cursorBuffers is how many bytes all cursors of a walk read ahead, together; each one
	// has minBuffer at least and maxBuffer at most.
	cursorBuffers        = 512 << 10
	minBuffer, maxBuffer = 256, 16 << 10
	// pieceSize is how many series of a large family are in memory at a time.
	pieceSize = 256
	// dropChunk is how many bytes of a dropList are in memory.
	dropChunk = 32 << 10
)

// walker goes through the families of all files in the order of their names, as sorted
// files are merged: with a cursor in each.
type walker struct {
	heap    []*cursor // by name, then by file: heap[i] is in front of heap[2i+1] and heap[2i+2]
	group   []*cursor // what next returned
	hashes  []int64   // memory for findDuplicates; int64, for which slices.Sort is in the program anyhow
	scratch []byte
}

// cursor stands at a family of a file.
type cursor struct {
	collector *Collector
	file      *file
	index     int // number of the file
	nth       int // number of the family in the file

	name, help, unit       []byte
	kind                   dto.MetricType
	duplicates, series     int
	hashes, body, bodySize int // where they are in the content, and how large
	following              int // where the family behind it is

	buffer []byte // of the content, from start on
	start  int
}

func newWalker(c *Collector, files []*file) *walker {
	w := &walker{group: make([]*cursor, len(files))}
	size := min(max(cursorBuffers/max(len(files), 1), minBuffer), maxBuffer)
	for i, f := range files {
		w.group[i] = &cursor{collector: c, file: f, index: i, nth: -1}
		if f.content.file != nil {
			w.group[i].buffer = make([]byte, 0, min(size, f.content.size))
		}
	}
	return w
}

// next returns the cursors that stand at the next name, in the order of the files, until
// there are none. Those that it returned before move on.
func (w *walker) next() []*cursor {
	for _, c := range w.group {
		if !c.advance(&w.scratch) {
			continue
		}
		w.heap = append(w.heap, c)
		for i := len(w.heap) - 1; i > 0 && w.heap[i].compare(w.heap[(i-1)/2]) < 0; i = (i - 1) / 2 {
			w.heap[i], w.heap[(i-1)/2] = w.heap[(i-1)/2], w.heap[i]
		}
	}
	w.group = w.group[:0]
	for len(w.heap) > 0 && (len(w.group) == 0 || bytes.Equal(w.heap[0].name, w.group[0].name)) {
		w.group = append(w.group, w.heap[0])
		last := len(w.heap) - 1
		w.heap[0] = w.heap[last]
		w.heap = w.heap[:last]
		for i := 0; ; {
			first := i
			for _, child := range [2]int{2*i + 1, 2*i + 2} {
				if child < last && w.heap[child].compare(w.heap[first]) < 0 {
					first = child
				}
			}
			if first == i {
				break
			}
			w.heap[i], w.heap[first] = w.heap[first], w.heap[i]
			i = first
		}
	}
	return w.group
}

func (c *cursor) compare(with *cursor) int {
	return cmp.Or(bytes.Compare(c.name, with.name), c.index-with.index)
}

// advance moves the cursor to the next family of its file. It returns false where there
// is none.
func (c *cursor) advance(scratch *[]byte) bool {
	c.nth++
	left := c.file.content.size - c.following
	if left == 0 {
		return false
	}
	length := decoder{b: c.view(c.following, min(left, binary.MaxVarintLen32), scratch)}
	had := len(length.b)
	size := length.number()
	at := c.following + had - len(length.b)
	d := decoder{b: c.view(at, min(size, left), scratch)}
	c.name = append(c.name[:0], d.text()...)
	c.help = append(c.help[:0], d.text()...)
	c.unit = append(c.unit[:0], d.text()...)
	if kind := d.bytes(1); kind != nil {
		c.kind = dto.MetricType(kind[0])
	}
	c.duplicates, c.series, c.bodySize = d.number(), d.number(), d.number()
	c.hashes = at + size
	c.body = c.hashes + 8*c.series
	c.following = c.body + c.bodySize
	if length.broken || d.broken || c.following > c.file.content.size {
		c.fail(errStored)
		return false
	}
	return true
}

// view returns n bytes of the content, which are good until the next call. It returns
// none where they can't be read.
func (c *cursor) view(offset, n int, scratch *[]byte) []byte {
	content := &c.file.content
	if offset < 0 || n < 0 || offset+n > content.size {
		c.fail(errStored)
		return nil
	}
	if content.file == nil {
		return content.memory[offset : offset+n]
	}
	if offset >= c.start && offset+n <= c.start+len(c.buffer) {
		return c.buffer[offset-c.start:][:n]
	}
	var into []byte
	if n <= cap(c.buffer) {
		c.start = offset
		c.buffer = c.buffer[:min(cap(c.buffer), content.size-offset)]
		into = c.buffer
	} else {
		if cap(*scratch) < n {
			*scratch = make([]byte, n)
		}
		into = (*scratch)[:n]
	}
	if err := content.readAt(into, offset); err != nil {
		c.buffer = c.buffer[:0]
		c.fail(err)
		return nil
	}
	return into[:n]
}

// fail notes that what is left of the file is missing, for the next Collect.
func (c *cursor) fail(err error) {
	c.collector.mu.Lock()
	defer c.collector.mu.Unlock()
	if c.collector.late[c.file.path] == nil {
		c.collector.late[c.file.path] = failf(ReasonIO, "%s: what came in the last exposition is not all of it: %w", c.file.path, err)
	}
}

// read yields the series of the family, but those that drop has, where the first one has
// the number first. They come in pieces.
func (c *cursor) read(d *seriesDecoder, drop bitmap, first int, scratch *[]byte) iter.Seq[[]*dto.Metric] {
	return func(yield func([]*dto.Metric) bool) {
		kept := c.file.metrics
		if drop.count(first, c.series) == c.series {
			return
		}
		if kept == nil {
			d.begin(c.view(c.body, c.bodySize, scratch), c.kind)
		}
		for at := 0; at < c.series; at += pieceSize {
			var piece []*dto.Metric
			size := min(pieceSize, c.series-at)
			if kept != nil {
				piece = kept[c.nth][at : at+size : at+size]
			} else {
				var err error
				if piece, err = d.next(size); err != nil {
					c.fail(err)
					return
				}
			}
			if drop != nil {
				left := make([]*dto.Metric, 0, len(piece))
				for i, m := range piece {
					if !drop.has(first + at + i) {
						left = append(left, m)
					}
				}
				piece = left
			}
			if !yield(piece) {
				return
			}
		}
	}
}

// dropList notes which series of which names are left out, in the order of a walk.
type dropList struct {
	chunks []blob
	last   []byte // number of the name, size of the bitmap, bitmap; and so on
}

func (l *dropList) add(c *Collector, number int, drop bitmap) {
	l.last = binary.AppendUvarint(l.last, uint64(number))
	l.last = appendText(l.last, string(drop))
	if len(l.last) > dropChunk {
		l.chunks = append(l.chunks, c.spill.put(l.last, 0))
		l.last = l.last[:0]
	}
}

// dropReader reads a dropList.
type dropReader struct {
	list   *dropList
	chunk  int // the next one
	buffer []byte
	left   decoder
	number int // of what comes next, and its bitmap; nil at first and at the end
	drop   bitmap
	begun  bool
}

// of returns the bitmap of a name, whose number must be larger than that in the call
// before; nil where nothing is left out.
func (r *dropReader) of(number int) bitmap {
	for !r.begun || r.drop != nil && r.number < number {
		r.begun, r.drop = true, nil
		if len(r.left.b) == 0 {
			switch {
			case r.chunk < len(r.list.chunks):
				b := &r.list.chunks[r.chunk]
				if cap(r.buffer) < b.size {
					r.buffer = make([]byte, b.size)
				}
				r.buffer = r.buffer[:b.size]
				if err := b.readAt(r.buffer, 0); err == nil {
					r.left.b = r.buffer
				}
			case r.chunk == len(r.list.chunks):
				r.left.b = r.list.last
			}
			r.chunk++
		}
		if len(r.left.b) > 0 {
			r.number = r.left.number()
			r.drop = r.left.text()
		}
	}
	if r.number == number {
		return r.drop
	}
	return nil
}
