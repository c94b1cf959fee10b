package gateway

import (
	"fmt"
	"testing"
	"unique"
)

// Groups of the same families share the list of them, also where other groups came between;
// a long list is not kept for groups that may never come.
func TestFamilyListShared(t *testing.T) {
	list := func(kind string, families int) *familyList {
		l := new(familyList)
		for i := range families {
			l.metas = append(l.metas, unique.Make(meta{name: fmt.Sprintf("%s_%d", kind, i)}))
		}
		return l.shared()
	}
	first := list("first", 3)
	for n := range len(recentLists) / 2 {
		other := list(fmt.Sprint("other", n), 3)
		if again := list("first", 3); again != first {
			t.Fatalf("after %d other lists it is not shared", n+1)
		}
		if other == first {
			t.Fatal("two lists of other families are one")
		}
	}
	if list("first", 2) == first {
		t.Error("a shorter list is the same")
	}
	long := list("long", maxShared+1)
	if again := list("long", maxShared+1); again == long {
		t.Error("a long list is kept")
	}
}
