//go:build !windows

package main

import (
	"errors"

	"github.com/alecthomas/kingpin/v2"
)

// Elsewhere than on Windows a service is a program like any other.

func runAsService() bool { return false }

func addServiceCommands(*kingpin.Application) {}

func controlService(command string, _ *flags, _ []string) error {
	return errors.New(command + " is there on Windows only")
}
