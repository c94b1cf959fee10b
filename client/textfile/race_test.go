//go:build race

package textfile_test

// raceEnabled: the race detector takes ten times as long, and memory of its own.
const raceEnabled = true
