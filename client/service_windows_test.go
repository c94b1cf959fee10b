package main

import (
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/windows/svc"
)

// logLines takes log lines, and hands them on.
type logLines chan string

func (l logLines) Write(line []byte) (int, error) {
	l <- string(line)
	return len(line), nil
}

// await returns once the log has a line with that text.
func (l logLines) await(t *testing.T, text string) {
	t.Helper()
	for deadline := time.After(30 * time.Second); ; {
		select {
		case line := <-l:
			if strings.Contains(line, text) {
				return
			}
		case <-deadline:
			t.Fatalf("the log does not say %q", text)
		}
	}
}

// TestService does what Windows' service manager does.
func TestService(t *testing.T) {
	log := make(logLines, 100)
	s := &service{log: log, arguments: []string{"--proxy-url=http://127.0.0.1:1", "--fqdn=web-1", "--metrics-addr="}}
	requests, status := make(chan svc.ChangeRequest), make(chan svc.Status, 10)
	type result struct {
		own  bool
		code uint32
	}
	ended := make(chan result, 1)
	go func() {
		own, code := s.Execute(nil, requests, status)
		ended <- result{own, code}
	}()
	want := func(state svc.State) svc.Status {
		t.Helper()
		select {
		case got := <-status:
			if got.State != state {
				t.Fatalf("the state is %d, want %d", got.State, state)
			}
			return got
		case <-time.After(30 * time.Second):
			t.Fatalf("the state %d was not told", state)
		}
		return svc.Status{}
	}
	want(svc.StartPending)
	running := want(svc.Running)
	requests <- svc.ChangeRequest{Cmd: svc.Interrogate, CurrentStatus: running}
	want(svc.Running)
	log.await(t, "Starting culvert-client")
	requests <- svc.ChangeRequest{Cmd: svc.ParamChange}
	want(svc.Running)
	log.await(t, "Configuration reloaded")
	requests <- svc.ChangeRequest{Cmd: svc.PreShutdown}
	if hint := want(svc.StopPending).WaitHint; hint < 13_000 {
		t.Errorf("the service manager is asked to wait for %d ms", hint)
	}
	want(svc.StopPending)
	if got := <-ended; got != (result{}) {
		t.Errorf("the service ended with %+v", got)
	}

	for _, c := range []struct {
		argument, want string
		code           uint32
	}{
		{"--no-such", "no-such", 2},
		{"doctor", "doctor", 2},
		{"--allow=nothing", "nothing", 1},
	} {
		s := &service{log: log, arguments: []string{"--proxy-url=http://127.0.0.1:1", "--metrics-addr=", c.argument}}
		own, code := s.Execute(nil, requests, status)
		if !own || code != c.code {
			t.Errorf("%s: the service ended with %v %d, want its own code %d", c.argument, own, code, c.code)
		}
		log.await(t, c.want)
		for len(status) > 0 {
			<-status
		}
	}
}
