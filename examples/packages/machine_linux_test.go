package packages

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-io/culvert/protocol/externaltest"
)

// machine is a systemd that was started in namespaces of its own, on a copy of this
// machine's files that is gone with it.
type machine struct {
	t    *testing.T
	pid  int
	root string // its files, as seen from here
}

// startMachine starts a machine, and waits until its systemd takes orders.
func startMachine(t *testing.T) *machine {
	t.Helper()
	if os.Getuid() != 0 {
		externaltest.Missing(t, "only root can start a systemd to install the packages under")
	}
	externaltest.Program(t, "nsenter", "util-linux")
	externaltest.Program(t, "ip", "iproute2")
	externaltest.Program(t, "systemctl", "systemd")
	externaltest.Program(t, "curl", "curl")
	cgroup := fmt.Sprintf("culvert-test-%d", os.Getpid())
	cmd := exec.Command("testdata/machine.sh", t.TempDir(), cgroup)
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWUTS | syscall.CLONE_NEWIPC | syscall.CLONE_NEWNET,
		Pdeathsig:  syscall.SIGKILL,
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		externaltest.Missing(t, "no namespaces to start a systemd in: "+err.Error())
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	m := &machine{t: t, pid: cmd.Process.Pid, root: fmt.Sprintf("/proc/%d/root", cmd.Process.Pid)}
	gone := false
	t.Cleanup(func() {
		if !gone {
			cmd.Process.Kill() // and with it all of its processes
			<-ended
		}
		for _, pattern := range []string{"/sys/fs/cgroup/", "/sys/fs/cgroup/*/"} {
			found, _ := filepath.Glob(pattern + cgroup)
			for _, path := range found {
				removeGroups(t, path)
			}
		}
	})
	deadline := time.After(30 * time.Second)
	for {
		if _, code := m.try("systemctl", "is-active", "test.target"); code == 0 {
			return m
		}
		select {
		case err := <-ended:
			gone = true
			externaltest.Missing(t, fmt.Sprintf("no systemd can be started here: %v: %s", err, &stderr))
		case <-deadline:
			t.Fatalf("systemd doesn't take orders\n%s", &stderr)
		case <-time.After(50 * time.Millisecond): // before it listens there is nothing to wait for
		}
	}
}

// removeGroups removes a control group whose processes have ended, and those in it.
func removeGroups(t *testing.T, path string) {
	var groups []string
	filepath.WalkDir(path, func(path string, entry fs.DirEntry, err error) error {
		if err == nil && entry.IsDir() {
			groups = append(groups, path)
		}
		return nil
	})
	for i := len(groups) - 1; i >= 0; i-- {
		if err := syscall.Rmdir(groups[i]); err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("control group %s: %v", groups[i], err)
		}
	}
}

// try runs a command in the machine, and returns what it printed and its exit code.
func (m *machine) try(command ...string) (output string, code int) {
	m.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{fmt.Sprintf("--target=%d", m.pid), "--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--root", "--wd"}, command...)...)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C.UTF-8", "DEBIAN_FRONTEND=noninteractive", "HOME=/root"}
	out, err := cmd.CombinedOutput()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok && ctx.Err() == nil {
		return string(out), exit.ExitCode()
	}
	if err != nil {
		m.t.Fatalf("%s: %v\n%s", strings.Join(command, " "), err, out)
	}
	return string(out), 0
}

// run runs a command in the machine that has to succeed, and returns what it printed.
func (m *machine) run(command ...string) string {
	m.t.Helper()
	out, code := m.try(command...)
	if code != 0 {
		journal, _ := m.try("journalctl", "--no-pager", "--lines=60", "--output=cat")
		m.t.Fatalf("%s: exit code %d\n%s\njournal:\n%s", strings.Join(command, " "), code, out, journal)
	}
	return out
}

// has tells whether there is a file in the machine.
func (m *machine) has(path string) bool {
	_, err := os.Lstat(m.root + path)
	return err == nil
}

// write writes a file of the machine.
func (m *machine) write(path, text string, mode fs.FileMode) {
	m.t.Helper()
	if err := os.MkdirAll(filepath.Dir(m.root+path), 0o755); err != nil {
		m.t.Fatal(err)
	}
	if err := os.WriteFile(m.root+path, []byte(text), mode); err != nil {
		m.t.Fatal(err)
	}
}
