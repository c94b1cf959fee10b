package main

import (
	"os"
	"os/signal"
	"syscall"
	"testing"

	"go.uber.org/goleak"
)

// childName, where it is set, makes the test binary run one of children: for
// what belongs to a whole process, its signals and its end.
const childName = "CULVERT_TEST_CHILD"

var children = map[string]func(){"client": main}

func TestMain(m *testing.M) {
	if child := children[os.Getenv(childName)]; child != nil {
		child()
		return
	}
	// Under nohup, or behind a shell's &, these are ignored, by children too unless somebody
	// takes them. What the children do with them is tested.
	for _, s := range []os.Signal{syscall.SIGHUP, syscall.SIGINT, syscall.SIGQUIT} {
		if signal.Ignored(s) {
			signal.Notify(make(chan os.Signal, 1), s)
		}
	}
	goleak.VerifyTestMain(m)
}
