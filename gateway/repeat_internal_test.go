package gateway

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// TestEncodeSome: values are encoded once no push has come for a while, not before, and a
// group that is deleted meanwhile does not matter.
func TestEncodeSome(t *testing.T) { synctest.Test(t, testEncodeSome) }

func testEncodeSome(t *testing.T) {
	store, err := OpenStore(StoreConfig{}, Memory())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- store.Run(ctx) }()
	defer func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}()
	g := New(Config{}, store)
	const groups = 3 * maxEncode
	push := func(group, value int) {
		t.Helper()
		w := httptest.NewRecorder()
		g.ServePush(w, httptest.NewRequest(http.MethodPut, "/", strings.NewReader(fmt.Sprintf("a %d\n", value))), fmt.Sprintf("/j/i/%d", group))
		if w.Code != http.StatusOK {
			t.Fatalf("%d %s", w.Code, w.Body)
		}
	}
	unencoded := func() (n int) {
		store.mu.RLock()
		defer store.mu.RUnlock()
		for _, g := range store.groups {
			if g.image.body.Load().repeat != nil {
				n++
			}
		}
		return n
	}
	for value := range 3 {
		for group := range groups {
			push(group, value)
		}
		time.Sleep(quiet / 2)
	}
	if n := unencoded(); n != groups {
		t.Errorf("%d of %d groups wait for a reader, or for a quiet time", n, groups)
	}
	w := httptest.NewRecorder()
	g.ServeDelete(w, httptest.NewRequest(http.MethodDelete, "/", nil), "/j/i/7")
	time.Sleep(2 * quiet)
	if n := unencoded(); n != 0 {
		t.Errorf("%d groups are not encoded after a quiet time", n)
	}
	if len(store.unencoded) != 0 {
		t.Errorf("%d groups are kept", len(store.unencoded))
	}
}
