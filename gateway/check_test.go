package gateway_test

import (
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/culvert-io/culvert/gateway"
)

// TestCheckBody: what CheckBody takes, a store takes, and the other way round.
func TestCheckBody(t *testing.T) {
	s := start(t, gateway.StoreConfig{}, gateway.Memory())
	key, err := gateway.NewKey(map[string]string{"job": "j", "x": "1"})
	if err != nil {
		t.Fatal(err)
	}
	const openMetrics = "application/openmetrics-text"
	for _, c := range []struct {
		contentType, body string
		names, want       string
	}{
		{"", "", "", ""},
		{"", "b 1\na 2\n", "a,b", ""},
		{openMetrics, "# TYPE a counter\na_total 1\n# EOF\n", "a_total", ""},
		{"", "a 1\nb\n", "", "line 2"},
		{openMetrics, "a 1\nb\n# EOF\n", "", "line 2"},
		{"", "a 1 1\n", "", "timestamps are not allowed"},
		{"", "a{x=\"2\"} 1\na{x=\"3\"} 1\n", "", "already seen"}, // the key's x replaces both
		{"", "a 1 1\nb 1 1\n", "", `metric "b"`},
	} {
		names, err := gateway.CheckBody(key, c.contentType, []byte(c.body))
		if err == nil != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
			t.Errorf("%q: %v, want %q", c.body, err, c.want)
		}
		if got := strings.Join(names, ","); got != c.names || !slices.IsSorted(names) {
			t.Errorf("%q has the names %s, want %s", c.body, got, c.names)
		}
		if w := s.do(http.MethodPut, "/j/x/1", c.body, "Content-Type", c.contentType); w.Code == http.StatusOK != (err == nil) {
			t.Errorf("%q: CheckBody says %v, the store %d %s", c.body, err, w.Code, w.Body)
		}
	}
}
