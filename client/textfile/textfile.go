// Package textfile is the agent's textfile collector: it serves the metrics that
// batch jobs of the machine leave in files.
//
// It does what the textfile collector of node_exporter does, and reads the same
// directories: text format 0.0.4 in files called *.prom. Files called *.om are
// OpenMetrics 1.0 text, "# EOF" included. A bad file is left out, alone and as a
// whole, and its reason is told. What differs, and why:
//
//   - HELP may stand in one file and be missing in another: that of the other file is
//     borrowed, and nothing is lost. A family without HELP never crashes anything.
//   - node_textfile_scrape_error is 1 whenever anything was left out. In
//     node_exporter it stays 0 where series are lost to a different TYPE, to another
//     file that has them, or to half of the files having HELP.
//     culvert_client_textfile_errors tells which file and why, and
//     culvert_client_textfile_dropped_series how many series.
//   - Label names that start with "__", gauge histograms in *.prom, and HELP that is not
//     UTF-8 make a bad file. Histograms with fractional counts keep them.
//   - node_textfile_mtime_seconds has fractions.
//   - A directory that is reached twice is read once.
//   - A label without a value tells no series apart, since Prometheus takes it for none.
//   - Families of more than 4,096 series that stand in several files are sorted file by
//     file, not as a whole.
//
// # Memory
//
// A file is parsed when it has changed (by modification time, change time, size, inode
// and permissions). Small ones stay in memory as they were parsed. What the others hold
// goes, sorted and in less space than the text, into a temporary file, from which
// expositions are put together as sorted files are merged. So any number of files takes
// the memory of one file and a constant; what grows are some 2 kB a file.
//
// The temporary file is in TMPDIR, by default /var/tmp or else /tmp. Its name is removed at
// once. Where it can't be written, its content stays in memory, which is logged.
//
// What an exposition shows is what Collect read, whatever becomes of the files
// afterwards.
package textfile

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	dto "github.com/prometheus/client_model/go"
)

const (
	// DefaultMaxFileSize is Config.MaxFileSize where that is 0: 16 MiB.
	DefaultMaxFileSize = 16 << 20
	// maxMaxFileSize is what the numbers of the stored form can hold.
	maxMaxFileSize = 1 << 30
	// keepText is how many bytes of text, all files together, stay in memory as they
	// were parsed, which takes about ten times as much.
	keepText = 128 << 10
	// keepStored is how many bytes of what is stored of the files, all together, stay in
	// memory: little directories need no temporary file.
	keepStored = 256 << 10
	// minGarbage is from how many bytes of changed files on the temporary file is renewed.
	minGarbage = 4 << 20
	// maxSorted is up to how many series a family that stands in several files is put
	// together in memory.
	maxSorted = 4096
	// settled is how old a file must have been when it was read to be believed
	// unchanged as long as its time and size are: file systems count time in steps of up
	// to 2 s.
	settled = 2 * time.Second
)

// Config says which files are read. Its zero values are useful.
type Config struct {
	// Directories are directories, or patterns of directories in the syntax of
	// filepath.Glob. A pattern that matches nothing is taken for a directory's name. An
	// empty string reads nothing. The first file that has a series wins, in the order
	// of Directories, of the sorted matches, of the sorted names.
	Directories []string
	// MaxAge is how long ago a file may have been modified. What is older is left out,
	// but for its node_textfile_mtime_seconds. 0 is no limit.
	MaxAge time.Duration
	// MaxFileSize is how many bytes a file may have, DefaultMaxFileSize by default, at
	// most 1 GiB. Parsing takes about ten times as much memory.
	MaxFileSize int64
	// TempDir is the directory of the temporary file. It is that of TMPDIR by default, or
	// /var/tmp, or os.TempDir.
	TempDir string
	// Now is time.Now by default. MaxAge counts from it.
	Now func() time.Time
	// Logger is slog.Default by default.
	Logger *slog.Logger
}

// Reason says why something is left out. It is the label "reason" of the metrics.
type Reason string

const (
	// ReasonParse: the file is not in its format.
	ReasonParse Reason = "parse"
	// ReasonTimestamp: a sample has a timestamp.
	ReasonTimestamp Reason = "timestamp"
	// ReasonLabel: a name of a metric or a label is not allowed, or filling in the
	// missing labels of a family would take too much memory.
	ReasonLabel Reason = "label"
	// ReasonPermission: the agent's user may not read the file or directory.
	ReasonPermission Reason = "permission"
	// ReasonTooOld: the file is older than Config.MaxAge.
	ReasonTooOld Reason = "too_old"
	// ReasonTooLarge: the file is larger than Config.MaxFileSize.
	ReasonTooLarge Reason = "too_large"
	// ReasonIO: there is no such file or directory, it is of another kind, or reading
	// it, or what was stored of it, failed.
	ReasonIO Reason = "io"
	// ReasonChanged: the file changed while it was read.
	ReasonChanged Reason = "changed"
	// ReasonConflict: series of the file are left out because their family has another
	// TYPE or HELP elsewhere, or a name that is taken.
	ReasonConflict Reason = "conflict"
	// ReasonDuplicate: series of the file are left out because they were there already.
	ReasonDuplicate Reason = "duplicate"
)

// failure is why a file or directory is left out.
type failure struct {
	reason Reason
	err    error
}

func (f *failure) Error() string { return f.err.Error() }

func failf(reason Reason, format string, args ...any) *failure {
	return &failure{reason, fmt.Errorf(format, args...)}
}

// Collector reads textfiles. It may be used by several goroutines at a time. It is a
// prometheus.Gatherer; Collect needs less memory.
type Collector struct {
	config Config

	// turn holds one element while somebody uses what follows.
	turn    chan struct{}
	files   map[string]*file
	logged  map[problemKey]string
	spill   spill
	buffer  []byte // memory for what is read
	encoded []byte // memory for what is stored

	mu   sync.Mutex // protects late
	late map[string]*failure
}

// New checks the configuration. It reads nothing yet.
func New(config Config) (*Collector, error) {
	switch {
	case config.MaxAge < 0:
		return nil, fmt.Errorf("textfiles: the maximum age %s is negative; 0 is no limit", config.MaxAge)
	case config.MaxFileSize < 0 || config.MaxFileSize > maxMaxFileSize:
		return nil, fmt.Errorf("textfiles: the maximum file size of %d bytes is not between 0 and 1 GiB", config.MaxFileSize)
	case config.MaxFileSize == 0:
		config.MaxFileSize = DefaultMaxFileSize
	}
	if config.Now == nil {
		config.Now = time.Now
	}
	if config.Logger == nil {
		config.Logger = slog.Default()
	}
	return &Collector{config: config, turn: make(chan struct{}, 1), files: map[string]*file{},
		spill: spill{dir: config.TempDir, logger: config.Logger}, late: map[string]*failure{}}, nil
}

// Collect reads what changed and puts the families of all files together. others are
// families of other sources, each name once: they come first, and series of files that
// clash with them are left out.
//
// It ends with ctx, and that is the only error.
func (c *Collector) Collect(ctx context.Context, others []*dto.MetricFamily) (*Snapshot, error) {
	select {
	case c.turn <- struct{}{}:
	case <-ctx.Done():
		return nil, fmt.Errorf("textfiles: another scrape reads them: %w", ctx.Err())
	}
	defer func() { <-c.turn }()
	start := time.Now()
	var found problems
	paths := c.list(&found)
	present := make(map[string]bool, len(paths))
	var files []*file
	var times []fileTime
	var kept, stored, inMemory int64
	for _, f := range c.files {
		kept += f.kept
		stored += int64(f.content.size)
		inMemory += int64(len(f.content.memory))
	}
	if c.spill.size > 2*(stored-inMemory)+minGarbage {
		c.renewSpill()
	}
	for _, path := range paths {
		if err := ctx.Err(); err != nil {
			return nil, fmt.Errorf("textfiles: the scrape ended while they were read: %w", err)
		}
		present[path] = true
		info, fail := c.stat(path)
		switch {
		case fail != nil:
			found.add(path, fail.reason, 0, "%s", fail)
			delete(c.files, path)
			if fail.reason == ReasonTooOld {
				times = append(times, fileTime{path, info.ModTime()})
			}
			continue
		case info == nil: // it went since it was listed
			continue
		}
		c.mu.Lock()
		late := c.late[path]
		delete(c.late, path)
		c.mu.Unlock()
		if late != nil {
			found.add(path, late.reason, 0, "%s", late)
		}
		f := c.files[path]
		if late != nil {
			delete(c.files, path)
		}
		if f == nil || late != nil || !f.unchanged(info) {
			if f != nil {
				kept -= f.kept
				inMemory -= int64(len(f.content.memory))
				delete(c.files, path)
			}
			if f, fail = c.read(path, max(0, keepText-kept), max(0, keepStored-inMemory)); fail != nil {
				if fail.reason != ReasonIO || c.exists(path) {
					found.add(path, fail.reason, 0, "%s", fail)
				}
				continue
			}
			c.files[path] = f
			kept += f.kept
			inMemory += int64(len(f.content.memory))
		}
		if f.fail != nil {
			found.add(path, f.fail.reason, 0, "%s", f.fail)
			continue
		}
		times = append(times, fileTime{path, f.info.ModTime()})
		files = append(files, f)
	}
	for path := range c.files {
		if !present[path] {
			delete(c.files, path)
		}
	}
	c.mu.Lock()
	maps.DeleteFunc(c.late, func(path string, _ *failure) bool { return !present[path] })
	c.mu.Unlock()
	if cap(c.buffer) > 256<<10 {
		c.buffer = nil
	}
	if cap(c.encoded) > 256<<10 {
		c.encoded = nil
	}

	s := &Snapshot{collector: c, files: files}
	for _, f := range others {
		if slices.Contains(ownNames, f.GetName()) {
			s.Dropped += len(f.Metric)
		} else {
			s.others = append(s.others, f)
		}
	}
	slices.SortFunc(s.others, func(a, b *dto.MetricFamily) int { return strings.Compare(a.GetName(), b.GetName()) })
	s.clashes = s.findClashes()
	s.walk(&found, func(*merged) bool { return ctx.Err() == nil })
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("textfiles: the scrape ended while they were put together: %w", err)
	}
	c.log(&found)
	s.addOwn(&found, times, time.Since(start))
	return s, nil
}

// renewSpill leaves behind what the temporary file has of files that have changed.
func (c *Collector) renewSpill() {
	var copies []*file
	var blobs []*blob
	for _, f := range c.files {
		if f.content.file != nil {
			moved := *f
			copies = append(copies, &moved)
			blobs = append(blobs, &moved.content)
		}
	}
	c.spill.renew(blobs)
	for _, f := range copies {
		c.files[f.path] = f
	}
}

// Gather returns all families at once. It never returns an error.
func (c *Collector) Gather() ([]*dto.MetricFamily, error) {
	s, err := c.Collect(context.Background(), nil)
	if err != nil {
		return nil, err
	}
	return s.Gather(), nil
}

// list returns the paths of all files in the order in which they count.
func (c *Collector) list(found *problems) (paths []string) {
	seen := map[string]bool{}
	for _, pattern := range c.config.Directories {
		if pattern == "" {
			continue
		}
		directories, err := filepath.Glob(pattern)
		if err != nil || len(directories) == 0 {
			directories = []string{pattern}
		}
		slices.Sort(directories)
		for _, directory := range directories {
			entries, err := os.ReadDir(directory)
			if err != nil {
				fail := ioFailure(err)
				hint := "create it, or correct --textfile.directory"
				if info, statErr := os.Stat(directory); statErr == nil && !info.IsDir() {
					fail, hint = failf(ReasonIO, "%s is a file", directory), "--textfile.directory takes directories, as in /var/lib/textfiles or /srv/*/textfiles, and reads the *.prom and *.om in them"
				} else if fail.reason == ReasonPermission {
					hint = "let the agent's user list it, as with chmod o+rx " + directory
				}
				found.add(directory, fail.reason, 0, "%s; %s", fail, hint)
			}
			for _, entry := range entries {
				name := entry.Name()
				if !strings.HasSuffix(name, textSuffix) && !strings.HasSuffix(name, openMetricsSuffix) {
					continue
				}
				if path := filepath.Join(directory, name); !seen[path] {
					seen[path] = true
					paths = append(paths, path)
				}
			}
		}
	}
	return paths
}

// stat returns what a file is before it is opened: a FIFO would wait for its writer.
// It returns nil and no failure where the file is gone, and both where it is too old.
func (c *Collector) stat(path string) (os.FileInfo, *failure) {
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if !c.exists(path) {
			return nil, nil
		}
		return nil, failf(ReasonIO, "%s is a link to a file that does not exist", path)
	case err != nil:
		return nil, ioFailure(err)
	case !info.Mode().IsRegular():
		return nil, failf(ReasonIO, "%s is no regular file (%s)", path, info.Mode())
	}
	if age := c.config.Now().Sub(info.ModTime()); c.config.MaxAge > 0 && age > c.config.MaxAge {
		return info, failf(ReasonTooOld, "%s was last modified at %s, which is longer ago than %s (--textfile.max-age)",
			path, info.ModTime().UTC().Format(time.RFC3339), c.config.MaxAge)
	}
	return info, nil
}

// exists reports whether there is something of that name, be it a dangling link.
func (c *Collector) exists(path string) bool {
	_, err := os.Lstat(path)
	return !errors.Is(err, fs.ErrNotExist)
}

func ioFailure(err error) *failure {
	if errors.Is(err, fs.ErrPermission) {
		return &failure{ReasonPermission, err}
	}
	return &failure{ReasonIO, err}
}

// problemKey is what a problem is counted by.
type problemKey struct {
	path   string
	reason Reason
}

// problem is what was left out of a file, or of all its families.
type problem struct {
	problemKey
	series int    // 0 where it is the whole file
	text   string // of the first, where there are several
}

// problems are those of one scrape, in the order in which they were found.
type problems struct {
	list  []*problem
	index map[problemKey]*problem
}

// add counts a problem; of those with one key only the first text is kept.
func (p *problems) add(path string, reason Reason, series int, format string, args ...any) {
	key := problemKey{path, reason}
	if known := p.index[key]; known != nil {
		known.series += series
		return
	}
	if p.index == nil {
		p.index = map[problemKey]*problem{}
	}
	p.index[key] = &problem{key, series, fmt.Sprintf(format, args...)}
	p.list = append(p.list, p.index[key])
}

// log tells what changed since the last scrape.
func (c *Collector) log(found *problems) {
	logged := make(map[problemKey]string, len(found.list))
	for _, p := range found.list {
		logged[p.problemKey] = p.text
		if c.logged[p.problemKey] == p.text {
			continue
		}
		attributes := []any{"file", p.path, "reason", p.reason, "err", p.text}
		if p.series > 0 {
			c.config.Logger.Error("Series of a textfile are left out", append(attributes, "series", p.series)...)
		} else {
			c.config.Logger.Error("A textfile or directory is left out", attributes...)
		}
	}
	for key := range c.logged {
		if _, still := logged[key]; !still {
			c.config.Logger.Info("What was left out of the textfiles is there again, or gone", "file", key.path, "reason", key.reason)
		}
	}
	c.logged = logged
}
