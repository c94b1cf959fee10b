package main

import (
	"path/filepath"
	"slices"
	"testing"
)

func TestServiceArguments(t *testing.T) {
	absolute := func(path string) string {
		path, err := filepath.Abs(path)
		if err != nil {
			t.Fatal(err)
		}
		return path
	}
	// The command is leave: service install, which is like it, is there on Windows only.
	got, err := serviceArguments([]string{"--proxy-url", "http://a:8080", "--config.file=client.yml", "leave", "--allow=9100", "--allow=9200", "--proxy.resolve-all",
		"--metrics-addr=", "--push.listen-address=127.0.0.1:9091", "--push.listen-address=unix:push.sock", "--storage.path=", "--fqdn=leave"})
	want := []string{"--proxy-url=http://a:8080", "--config.file=" + absolute("client.yml"), "--allow=9100", "--allow=9200", "--proxy.resolve-all",
		"--metrics-addr=", "--push.listen-address=127.0.0.1:9091", "--push.listen-address=unix:" + absolute("push.sock"), "--storage.path=", "--fqdn=leave"}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("got %q, %v\nwant %q", got, err, want)
	}
	if _, _, err := parseFlags(got); err != nil {
		t.Error(err)
	}
	if _, err := serviceArguments([]string{"--no-such"}); err == nil {
		t.Error("a flag that is not there is taken")
	}
}
