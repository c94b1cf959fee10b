//go:build race

package ui_test

// raceEnabled: all is some ten times as slow.
const raceEnabled = true
