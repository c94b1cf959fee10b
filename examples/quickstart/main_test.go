package main

import (
	"bytes"
	"strings"
	"testing"
)

func TestOnce(t *testing.T) {
	var out bytes.Buffer
	if err := run(t.Context(), &out, "127.0.0.1:0", true); err != nil {
		t.Fatalf("%v\n%s", err, out.String())
	}
	for _, want := range []string{"quickstart_scrapes_total 1", "app.quickstart/metrics", "culvert_client_connected", "\n   apt_upgrades_pending 3\n", "proxy_url: http://127.0.0.1:", `push_up{database="orders",instance="",job="backup"} 1`, "honor_labels: true", "/targets", "open http://127.0.0.1:"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the output lacks %q:\n%s", want, out.String())
		}
	}
}
