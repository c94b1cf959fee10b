package main

import (
	"fmt"
	"io"
	"os"
	"time"
)

// progress is a line that tells what is going on. In a terminal it is overwritten;
// elsewhere a line comes at most every few seconds.
type progress struct {
	out      io.Writer
	terminal bool
	scenario string
	shown    time.Time
}

func newProgress(out io.Writer) *progress {
	p := &progress{out: out}
	if file, ok := out.(*os.File); ok {
		info, err := file.Stat()
		p.terminal = err == nil && info.Mode()&os.ModeCharDevice != 0
	}
	return p
}

func (p *progress) show(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	if p.scenario != "" {
		text = p.scenario + ": " + text
	}
	if p.terminal {
		fmt.Fprintf(p.out, "\r\x1b[K%s", text)
	} else if time.Since(p.shown) > 5*time.Second {
		p.shown = time.Now()
		fmt.Fprintln(p.out, text)
	}
}

// end makes room for other output.
func (p *progress) end() {
	if p.terminal {
		fmt.Fprint(p.out, "\r\x1b[K")
	}
}

// note writes a line that stays.
func (p *progress) note(format string, args ...any) {
	p.end()
	fmt.Fprintf(p.out, "%s: %s\n", p.scenario, fmt.Sprintf(format, args...))
}
