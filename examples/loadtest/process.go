package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// stage holds what a scenario has started.
type stage struct {
	dir     string       // for files; removed by close
	cert    *certificate // of what speaks TLS; nil: nothing does
	closing []func() error
}

func newStage() (*stage, error) {
	dir, err := os.MkdirTemp("", "culvert-loadtest-")
	if err != nil {
		return nil, err
	}
	st := &stage{dir: dir}
	st.onClose(func() error { return os.RemoveAll(dir) })
	return st, nil
}

// onClose has f called by close.
func (st *stage) onClose(f func() error) { st.closing = append(st.closing, f) }

// close ends all that was started, what came last first.
func (st *stage) close() error {
	var errs []error
	for i := len(st.closing) - 1; i >= 0; i-- {
		errs = append(errs, st.closing[i]())
	}
	st.closing = nil
	return errors.Join(errs...)
}

// keptLog is how many bytes of a program's log are kept, to show where it fails.
const keptLog = 16 << 10

// process is a child process.
type process struct {
	name   string
	cmd    *exec.Cmd
	exited chan struct{} // closed once it is gone

	mu  sync.Mutex // protects log
	log bytes.Buffer
}

// start starts a program that ends with the stage.
func (st *stage) start(name, program string, args ...string) (*process, error) {
	p := &process{name: name, cmd: exec.Command(program, args...), exited: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = p, p
	p.cmd.SysProcAttr = childAttributes()
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	go func() {
		defer close(p.exited)
		p.cmd.Wait()
	}()
	st.onClose(func() error { return p.stop(syscall.SIGTERM) })
	return p, nil
}

// Write keeps what the program logs.
func (p *process) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.log.Len()+len(b) > keptLog {
		p.log.Next(p.log.Len() / 2)
	}
	return p.log.Write(b)
}

// awaitLog waits for a log line and returns its submatches.
func (p *process) awaitLog(ctx context.Context, pattern string) ([]string, error) {
	re := regexp.MustCompile(pattern)
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); {
		ended := p.ended()
		p.mu.Lock()
		found := re.FindStringSubmatch(p.log.String())
		p.mu.Unlock()
		if found != nil {
			return found, nil
		}
		if ended {
			return nil, p.failure("has ended")
		}
		if err := pause(ctx, 10*time.Millisecond); err != nil {
			return nil, err
		}
	}
	return nil, p.failure("did not log " + pattern)
}

func (p *process) ended() bool {
	select {
	case <-p.exited:
		return true
	default:
		return false
	}
}

// failure returns an error that shows the end of the program's log.
func (p *process) failure(what string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	log := strings.TrimSpace(p.log.String())
	return fmt.Errorf("%s %s; its log ends with:\n%s", p.name, what, log[max(0, len(log)-2000):])
}

// stop ends the program: by s, and by force if that takes too long.
func (p *process) stop(s os.Signal) error {
	if p.ended() {
		return nil
	}
	if err := p.cmd.Process.Signal(s); err != nil && !errors.Is(err, os.ErrProcessDone) {
		p.cmd.Process.Kill()
	}
	select {
	case <-p.exited:
		return nil
	case <-time.After(30 * time.Second):
		p.cmd.Process.Kill()
		<-p.exited
		return p.failure("did not end within 30 s, and was killed")
	}
}

// clockTick is the unit of times in /proc/PID/stat: Linux shows user space 100 a
// second whatever the kernel's own is (proc_pid_stat(5), USER_HZ).
const clockTick = 0.01 // seconds

// cpu returns the CPU time in seconds that the process has used, or 0 where the
// system doesn't tell (other than Linux) or there is no process.
func (p *process) cpu() float64 {
	if p == nil {
		return 0
	}
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.cmd.Process.Pid))
	if err != nil {
		return 0
	}
	// The second field is the name in parentheses, and may hold anything. utime and
	// stime are fields 14 and 15.
	fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	if len(fields) < 13 {
		return 0
	}
	user, _ := strconv.ParseFloat(fields[11], 64)
	system, _ := strconv.ParseFloat(fields[12], 64)
	return (user + system) * clockTick
}

var residentLine = regexp.MustCompile(`(?m)^VmRSS:\s+(\d+) kB$`)

// resident returns the resident memory of the process in bytes, or 0 as cpu does.
func (p *process) resident() float64 {
	if p == nil {
		return 0
	}
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		return 0
	}
	line := residentLine.FindSubmatch(text)
	if line == nil {
		return 0
	}
	kilobytes, _ := strconv.ParseFloat(string(line[1]), 64)
	return kilobytes * 1024
}
