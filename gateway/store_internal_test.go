package gateway

import (
	"errors"
	"testing"
	"unique"
)

// A short body may become long by the labels of its grouping key. Here its families share
// their text, so that no memory is needed for all of it.
func TestImageTooLarge(t *testing.T) {
	s := newStore(StoreConfig{})
	e := edit{key: Key{{"job", "j"}}}
	text := make([]byte, 1<<30)
	for _, name := range []string{"a", "b", "c", "d"} {
		e.pushed.families = append(e.pushed.families, prepared{meta: unique.Make(meta{name: name}), series: []uint64{1}, text: text})
	}
	if _, err := s.edit(&e); !errors.Is(err, ErrBodyTooLarge) || s.Len() != 0 {
		t.Errorf("got %v, and %d groups", err, s.Len())
	}
}
