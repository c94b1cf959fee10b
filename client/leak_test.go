package main

import (
	"os"
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
	goleak.VerifyTestMain(m)
}
