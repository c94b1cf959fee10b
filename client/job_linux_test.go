package main

import (
	"bufio"
	"io"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestRunInTerminal: the terminal sends Ctrl-C to the job and to culvert-client,
// which doesn't pass it on a second time.
func TestRunInTerminal(t *testing.T) {
	t.Parallel()
	proxy := startPushProxy(t)
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Skipf("no terminals here: %v", err)
	}
	defer master.Close()
	number, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	slave, err := os.OpenFile("/dev/pts/"+strconv.Itoa(number), os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer slave.Close()
	cmd := job(proxy, "env", childName+"=signals", os.Args[0]).command(t.Context())
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	slave.Close()
	// Fd made it blocking, so there are no read deadlines.
	hung := time.AfterFunc(patience, func() { cmd.Process.Kill() })
	defer hung.Stop()
	out := bufio.NewReader(master)
	wantLine := func(want string) {
		t.Helper()
		line, err := out.ReadString('\n')
		line = strings.TrimPrefix(strings.TrimRight(line, "\r\n"), "^C") // what is typed is echoed
		if line = strings.TrimPrefix(line, `^\`); line != want {
			t.Errorf("got %q, %v, want the line %q", line, err, want)
		}
	}
	wantLine("ready")
	for _, key := range []struct{ typed, signal string }{{"\x03", "interrupt"}, {"\x1c", "quit"}, {"\x03", "interrupt"}} {
		io.WriteString(master, key.typed)
		wantLine(key.signal)
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	wantLine("terminated")
	io.WriteString(master, "\x04") // end of input
	rest, _ := io.ReadAll(out)     // ends with an error, when nobody has the terminal any more
	if err := cmd.Wait(); cmd.ProcessState.ExitCode() != 7 {
		t.Errorf("it ended with %v", err)
	}
	if len(rest) > 0 {
		t.Errorf("it wrote too much: %q", rest)
	}
}
