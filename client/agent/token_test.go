package agent_test

import (
	"bytes"
	"context"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/culvert-io/culvert/client/agent"
)

// TestTokenFile: the token is read for each handshake.
func TestTokenFile(t *testing.T) {
	t.Parallel()
	shown := make(chan string, 10)
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		shown <- r.Header.Get("Authorization")
		w.Header().Set("Culvert-Error", "unauthorized")
		w.WriteHeader(http.StatusUnauthorized)
	}))
	defer proxy.Close()
	file := filepath.Join(t.TempDir(), "token")
	write := func(text string, mode os.FileMode) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(file, mode); err != nil {
			t.Fatal(err)
		}
	}
	var log bytes.Buffer
	config := agent.Config{
		Name: "web-1", ProxyURLs: []string{proxy.URL}, TokenFile: file,
		Logger: slog.New(slog.NewTextHandler(&log, nil)),
	}
	write("first\n", 0o600)
	a, err := agent.New(config)
	if err != nil {
		t.Fatal(err)
	}
	if log.Len() > 0 {
		t.Errorf("logged: %s", &log)
	}
	for _, token := range []string{"first", "second"} {
		write(token+"\n", 0o600)
		if _, err := a.Dial(context.Background(), a.ProxyURLs()[0]); err == nil || !strings.Contains(err.Error(), "unauthorized") {
			t.Errorf("got %v", err)
		}
		if got := <-shown; got != "Bearer "+token {
			t.Errorf("shown: %q, want the token %q", got, token)
		}
	}
	os.Remove(file)
	if _, err := a.Dial(context.Background(), a.ProxyURLs()[0]); err == nil || !strings.Contains(err.Error(), "token: ") {
		t.Errorf("without the file: %v", err)
	}
	if _, err := agent.New(config); err == nil || !strings.Contains(err.Error(), "token file: ") {
		t.Errorf("a new agent without the file: %v", err)
	}
	for text, want := range map[string]string{"": "is empty", "a b": "one word", "a\nb": "one word", "ü": "one word", strings.Repeat("x", 5000): "larger"} {
		write(text, 0o600)
		if _, err := agent.New(config); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.20q: got %v, want %q", text, err, want)
		}
	}
	write("third", 0o644)
	config.ProxyURLs = []string{"http://user:secret@proxy.example.net"}
	if _, err := agent.New(config); err == nil || !strings.Contains(err.Error(), "give one of them") {
		t.Errorf("with a user in the URL: %v", err)
	}
	log.Reset()
	config.ProxyURLs = []string{"http://proxy.example.net"}
	if _, err := agent.New(config); err != nil {
		t.Fatal(err)
	}
	if runtime.GOOS != "windows" && !strings.Contains(log.String(), "chmod 600") || !strings.Contains(log.String(), "without TLS") {
		t.Errorf("logged: %s", &log)
	}
}

// TestKeyFile: a key is made once, for its owner alone, and shown each time.
func TestKeyFile(t *testing.T) {
	t.Parallel()
	shown := make(chan string, 10)
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		shown <- r.Header.Get("Culvert-Key")
		w.Header().Set("Culvert-Error", "unauthorized")
		w.WriteHeader(http.StatusUnauthorized)
	}))
	defer proxy.Close()
	dir := t.TempDir()
	file := filepath.Join(dir, "key")
	var keys []string
	for range 2 {
		a, err := agent.New(agent.Config{Name: "web-1", ProxyURLs: []string{proxy.URL}, KeyFile: file})
		if err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if _, err := a.Dial(context.Background(), a.ProxyURLs()[0]); err == nil || !strings.Contains(err.Error(), "unauthorized") {
				t.Errorf("got %v", err)
			}
			keys = append(keys, <-shown)
		}
	}
	if len(keys[0]) < 32 || strings.Join(keys, " ") != strings.TrimSpace(strings.Repeat(keys[0]+" ", 4)) {
		t.Errorf("shown: %q", keys)
	}
	if info, err := os.Stat(file); err != nil || runtime.GOOS != "windows" && info.Mode().Perm() != 0o600 {
		t.Errorf("the file: %v %v", info.Mode(), err)
	}
	if left, _ := os.ReadDir(dir); len(left) != 1 {
		t.Errorf("left behind: %v", left)
	}
	if err := os.WriteFile(file, []byte("short"), 0o600); err != nil {
		t.Fatal(err)
	}
	a, err := agent.New(agent.Config{Name: "web-1", ProxyURLs: []string{proxy.URL}, KeyFile: file})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.Dial(context.Background(), a.ProxyURLs()[0]); err == nil || !strings.Contains(err.Error(), "remove the file") {
		t.Errorf("a key that is too short: %v", err)
	}
}
