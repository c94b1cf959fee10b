//go:build !race

package main_test

// raceEnabled: the programs under test are built as the test itself is.
const raceEnabled = false
