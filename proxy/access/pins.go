package access

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/culvert-io/culvert/protocol"
)

// maxPins bounds the names that have a key: whoever holds a pattern token can make up
// names.
const maxPins = 100_000

// Pins remembers which key an agent of a name showed when it registered for the first
// time, so that nobody else of the same token can be it. All methods may be called at
// the same time, in one process.
//
// The file has a line for each change, which is on the disk before the change counts:
// the name and the key's SHA-256, or "-" where the name was released. The last of a name
// counts. A last line without its end was never acknowledged.
type Pins struct {
	path   string // "": memory only
	shared Registrar

	mu        sync.RWMutex // protects what follows
	keys      map[string]proof
	pending   []byte              // lines that are to be written
	unclaimed map[string]struct{} // names whose keys the registrar was not told of
	replaced  uint64              // counts names that got another key

	writing sync.Mutex // held while the file is written; protects what follows
	rewrite bool       // the file's end is not known to be good
	failed  error      // of the last write
}

// Errors of Pins.
var (
	// ErrPinned: the name has another key.
	ErrPinned = errors.New("the name is pinned to another key")
	// ErrTooManyPins: no more names can have a key.
	ErrTooManyPins = fmt.Errorf("%d names have a key, and no more can", maxPins)
	// ErrNotKept: a key counts until the proxy ends, and is not on the disk, or not known
	// to the other proxies yet.
	ErrNotKept = errors.New("the key is not kept across a restart")
)

// OpenPins reads the pins of a file, which is made with the first of them; "" keeps them
// in memory only. It returns an error where the file is there and can't be read.
func OpenPins(path string) (*Pins, error) {
	p := &Pins{path: path, keys: map[string]proof{}}
	if path == "" {
		return p, nil
	}
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return p, nil
	}
	if err != nil {
		return nil, fmt.Errorf("the keys of agents: %w", err)
	}
	whole := bytes.LastIndexByte(text, '\n') + 1
	p.rewrite = whole < len(text)
	n := 0
	for line := range strings.Lines(string(text[:whole])) {
		n++
		name, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
		sum, err := hex.DecodeString(value)
		switch {
		case protocol.CheckName(name) == nil && value == "-":
			delete(p.keys, name)
		case protocol.CheckName(name) == nil && err == nil && len(sum) == sha256.Size:
			p.keys[name] = proof(sum)
		default:
			return nil, fmt.Errorf("the keys of agents: %s:%d: %.80q is no name and SHA-256; bring the file back from a backup, or move it away to let the next agent of each name choose its key", path, n, line)
		}
	}
	p.rewrite = p.rewrite || n > 2*len(p.keys)+100 // most of it is over
	return p, nil
}

// Check returns ErrPinned where the name has another key. "" is no key.
func (p *Pins) Check(name, key string) error {
	p.mu.RLock()
	defer p.mu.RUnlock()
	pinned, ok := p.keys[name]
	sum := sha256.Sum256([]byte(key))
	if ok && (key == "" || subtle.ConstantTimeCompare(pinned[:], sum[:]) != 1) {
		return ErrPinned
	}
	return nil
}

// Pin gives the name the key where it has none. It returns ErrPinned where it has another
// one, ErrTooManyPins, or ErrNotKept.
func (p *Pins) Pin(name, key string) error {
	sum := proof(sha256.Sum256([]byte(key)))
	p.mu.Lock()
	pinned, ok := p.keys[name]
	switch {
	case ok && pinned == sum:
		p.mu.Unlock()
		return nil
	case ok:
		p.mu.Unlock()
		return ErrPinned
	case len(p.keys) >= maxPins:
		p.mu.Unlock()
		return ErrTooManyPins
	}
	p.keys[name] = sum // from here on nobody else can have it
	p.mu.Unlock()
	var notShared error
	if p.shared != nil {
		claimed := hex.EncodeToString(sum[:])
		switch standing, err := p.shared.Claim(map[string]string{name: claimed}); {
		case err != nil:
			notShared = fmt.Errorf("%w: other proxies don't know it yet: %w", ErrNotKept, err)
		case standing[name] != claimed:
			p.Apply(name, standing[name])
			return ErrPinned
		}
	}
	p.mu.Lock()
	if p.keys[name] != sum { // released, or another one's by now
		p.mu.Unlock()
		return ErrPinned
	}
	if notShared != nil {
		p.unclaimed[name] = struct{}{}
	}
	p.pending = fmt.Appendf(p.pending, "%s %x\n", name, sum)
	p.mu.Unlock()
	return cmp.Or(notShared, p.write())
}

// Registrar keeps the keys of several proxies together, as SHA-256 in hex.
type Registrar interface {
	// Claim gives names the keys where they have none, and returns the keys that stand.
	Claim(keys map[string]string) (standing map[string]string, err error)
	// Release takes the key from a name, and reports whether it had one.
	Release(name string) (bool, error)
}

// Share has the keys counted by a registrar too, which tells of changes by Load and
// Apply. It is called before all else.
func (p *Pins) Share(r Registrar) { p.shared, p.unclaimed = r, map[string]struct{}{} }

// Load takes all keys of the registrar. What it has no more was released meanwhile;
// but where it is not the one of last time, it is told of what is known here.
func (p *Pins) Load(keys map[string]string, same bool) {
	missing := map[string]string{}
	p.mu.Lock()
	for name, sum := range p.keys {
		if _, ok := keys[name]; ok {
			continue
		}
		if _, unclaimed := p.unclaimed[name]; unclaimed || !same {
			missing[name] = hex.EncodeToString(sum[:])
			continue
		}
		p.set(name, "")
	}
	for name, key := range keys {
		p.set(name, key)
	}
	clear(p.unclaimed)
	p.mu.Unlock()
	if len(missing) > 0 {
		standing, err := p.shared.Claim(missing)
		p.mu.Lock()
		for name := range missing {
			if err != nil {
				p.unclaimed[name] = struct{}{}
			} else {
				p.set(name, standing[name])
			}
		}
		p.mu.Unlock()
	}
	p.write() // the registrar has it in any case
}

// Apply takes one key of the registrar, "" for none any more.
func (p *Pins) Apply(name, key string) {
	p.mu.Lock()
	changed := p.set(name, key)
	p.mu.Unlock()
	if changed {
		p.write() // the registrar has it in any case
	}
}

// set is called with mu held. It reports whether that was a change.
func (p *Pins) set(name, key string) bool {
	before, had := p.keys[name]
	if key == "" {
		if had {
			delete(p.keys, name)
			p.pending = fmt.Appendf(p.pending, "%s -\n", name)
		}
		return had
	}
	var sum proof
	if n, err := hex.Decode(sum[:], []byte(key)); err != nil || n != len(sum) || had && before == sum {
		return false
	}
	if had {
		p.replaced++
	}
	p.keys[name] = sum
	p.pending = fmt.Appendf(p.pending, "%s %x\n", name, sum)
	return true
}

// Replaced counts how often a name got another key than it had: agents that showed the
// one before are not whom they seem to be.
func (p *Pins) Replaced() uint64 {
	p.mu.RLock()
	defer p.mu.RUnlock()
	return p.replaced
}

// Release takes the key from the name. It returns false where there was none, and
// ErrNotKept where the name has its key again after a restart.
func (p *Pins) Release(name string) (bool, error) {
	var elsewhere bool
	var notShared error
	if p.shared != nil {
		var err error
		if elsewhere, err = p.shared.Release(name); err != nil {
			notShared = fmt.Errorf("%w: other proxies keep it: %w", ErrNotKept, err)
		}
	}
	p.mu.Lock()
	_, ok := p.keys[name]
	if !ok {
		p.mu.Unlock()
		return elsewhere, notShared
	}
	delete(p.unclaimed, name)
	delete(p.keys, name)
	p.pending = fmt.Appendf(p.pending, "%s -\n", name)
	p.mu.Unlock()
	return true, cmp.Or(notShared, p.write())
}

// write writes what is pending. What comes meanwhile, as after the first start of many
// agents, goes in one write.
func (p *Pins) write() error {
	p.writing.Lock()
	defer p.writing.Unlock()
	p.mu.Lock()
	lines := p.pending
	p.pending = nil
	if p.rewrite && p.path != "" {
		lines = nil
		for name, sum := range p.keys {
			lines = fmt.Appendf(lines, "%s %x\n", name, sum)
		}
	}
	p.mu.Unlock()
	if p.path == "" || len(lines) == 0 && !p.rewrite { // who wrote before has taken it along
		return p.failed
	}
	if p.failed = p.put(lines); p.failed != nil {
		p.failed = fmt.Errorf("%w: %w", ErrNotKept, p.failed)
		p.rewrite = true
		return p.failed
	}
	p.rewrite = false
	return nil
}

// put appends lines, or replaces the file by them. It is called with writing held.
func (p *Pins) put(lines []byte) error {
	if err := os.MkdirAll(filepath.Dir(p.path), 0o755); err != nil {
		return err
	}
	path, flags := p.path, os.O_WRONLY|os.O_CREATE|os.O_APPEND
	if p.rewrite {
		path, flags = p.path+".new", os.O_WRONLY|os.O_CREATE|os.O_TRUNC
	}
	f, err := os.OpenFile(path, flags, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Write(lines); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if p.rewrite {
		return os.Rename(path, p.path)
	}
	return nil
}
