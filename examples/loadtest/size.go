package main

import (
	"fmt"
	"strconv"
	"strings"
)

// size is a number of bytes, as a flag: "1000", "100kB" or "5MB", by powers of ten.
type size int

func (s *size) Set(text string) error {
	number, factor := strings.ToLower(text), 1
	for suffix, f := range map[string]int{"kb": 1000, "mb": 1_000_000} {
		if short, ok := strings.CutSuffix(number, suffix); ok {
			number, factor = short, f
		}
	}
	n, err := strconv.Atoi(number)
	if err != nil || n < 1 || n > 1_000_000_000/factor {
		return fmt.Errorf("%q is no size: use bytes, kB or MB, as in 100kB, at most 1000MB", text)
	}
	*s = size(n * factor)
	return nil
}

func (s size) String() string {
	switch {
	case s != 0 && s%1_000_000 == 0:
		return fmt.Sprintf("%dMB", s/1_000_000)
	case s != 0 && s%1000 == 0:
		return fmt.Sprintf("%dkB", s/1000)
	}
	return strconv.Itoa(int(s))
}

// or returns s, or the other where s is not given.
func (s size) or(other size) size {
	if s == 0 {
		return other
	}
	return s
}
