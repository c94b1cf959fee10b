// Package externaltest has what tests need that start programs which are not ours.
package externaltest

import (
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"sync"
	"testing"
)

// Missing skips the test, or fails it where CULVERT_REQUIRE_EXTERNAL is 1. The message
// says in one line what is missing, and how to get it.
func Missing(t testing.TB, message string) {
	t.Helper()
	if os.Getenv("CULVERT_REQUIRE_EXTERNAL") == "1" {
		t.Fatal(message)
	}
	t.Skip(message)
}

// Program returns the path of a program in the PATH. Where it is not there, the test is
// skipped or fails, with the name of the Debian package that has it.
func Program(t testing.TB, name, debianPackage string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		Missing(t, name+" is not installed: apt-get install "+debianPackage)
	}
	return path
}

// given are the addresses that FreeAddress returned.
var given sync.Map

// FreeAddress returns an address of this host that nobody listens on. It stays free until
// somebody asks for it, and between a program's end and its start: systems give ports
// below 32768 to no connection by themselves.
func FreeAddress(t testing.TB) string {
	t.Helper()
	address, err := freeAddress()
	if err != nil {
		t.Fatal(err)
	}
	return address
}

func freeAddress() (string, error) {
	var err error
	for range 1000 {
		address := fmt.Sprint("127.0.0.1:", 10_000+rand.IntN(20_000))
		if _, taken := given.LoadOrStore(address, true); taken {
			continue
		}
		var l net.Listener
		if l, err = net.Listen("tcp", address); err == nil {
			return address, l.Close()
		}
	}
	return "", fmt.Errorf("no address is free: %w", err)
}
