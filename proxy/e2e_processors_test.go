package main_test

import (
	"fmt"
	"runtime"
	"strings"
	"testing"
	"time"
)

// TestProcessorsInUse: a proxy that has nothing to do keeps to one processor, and uses all
// for a large scrape.
func TestProcessorsInUse(t *testing.T) {
	if runtime.NumCPU() == 1 {
		t.Skip("this machine has one processor")
	}
	t.Setenv("GOMAXPROCS", "") // what the tests were started with
	proxy := startProxy(t)
	body := strings.Repeat("e2e_large 1\n", 1<<20/6)
	large := serve(t, exposition(body))
	startAgent(t, proxy.url, "web-1", "--allow="+port(t, large))
	inUse := func() int { return int(proxy.gauge("go_sched_gomaxprocs_threads")) }
	one := func() error {
		if n := inUse(); n != 1 {
			return fmt.Errorf("%d processors are in use", n)
		}
		return nil
	}
	eventually(t, 2*time.Minute, one)
	if err := expect(through(t, proxy.url, nil), "http://web-1:"+port(t, large)+"/metrics", "10", body); err != nil {
		t.Fatal(err)
	}
	if n := inUse(); n == 1 {
		t.Error("a large scrape keeps to one processor")
	}
	eventually(t, 2*time.Minute, one)
}
