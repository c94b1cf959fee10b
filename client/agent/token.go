package agent

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
)

// maxToken bounds a token in bytes: it has to go through as a header field.
const maxToken = 4 << 10

// readToken reads a bearer token.
func readToken(file string) (string, error) {
	info, err := os.Stat(file) // opening a pipe would wait for its writer
	if err != nil {
		return "", err
	}
	if !info.Mode().IsRegular() {
		return "", fmt.Errorf("%s is no regular file", file)
	}
	f, err := os.Open(file)
	if err != nil {
		return "", err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxToken+1))
	if err != nil {
		return "", err
	}
	token := strings.TrimSpace(string(text))
	switch {
	case token == "":
		return "", fmt.Errorf("%s is empty", file)
	case len(text) > maxToken:
		return "", fmt.Errorf("%s is larger than %d bytes", file, maxToken)
	case strings.ContainsFunc(token, func(c rune) bool { return c <= ' ' || c > '~' }):
		return "", fmt.Errorf("%s: a token is one word of printable ASCII", file)
	}
	return token, nil
}

// checkToken reads the token for the first time, and tells who else may.
func (s *snapshot) checkToken() error {
	if s.TokenFile == "" {
		return nil
	}
	if _, err := readToken(s.TokenFile); err != nil {
		return fmt.Errorf("token file: %w", err)
	}
	if info, err := os.Stat(s.TokenFile); err == nil && runtime.GOOS != "windows" && info.Mode().Perm()&0o077 != 0 {
		s.Logger.Warn("Others than its owner may read or change the token file; chmod 600 it", "file", s.TokenFile, "mode", info.Mode().Perm())
	}
	for _, u := range s.proxies {
		if u.User != nil {
			return errors.New("there are a token file and a user in the proxy's URL: give one of them")
		}
		if addr, err := netip.ParseAddr(u.Hostname()); u.Scheme == "http" && u.Hostname() != "localhost" && (err != nil || !addr.IsLoopback()) {
			s.Logger.Warn("The token goes to this proxy without TLS: whoever is on the way can read it; use https", "proxy", u.Redacted())
		}
	}
	return nil
}

var keyLock sync.Mutex // the links of an agent make one key together

// readOrMakeKey reads the agent's own secret, or makes one.
func readOrMakeKey(file string) (string, error) {
	keyLock.Lock()
	defer keyLock.Unlock()
	if _, err := os.Stat(file); errors.Is(err, fs.ErrNotExist) {
		if err := makeKey(file); err != nil {
			return "", fmt.Errorf("make a key: %w", err)
		}
	}
	key, err := readToken(file)
	if err == nil && (len(key) < 32 || len(key) > 128) {
		return "", fmt.Errorf("%s: a key has 32 to 128 characters; remove the file to have one made", file)
	}
	return key, err
}

// makeKey makes the file at once, whole: a key that is shown and then lost would lock
// the agent out.
func makeKey(file string) error {
	f, err := os.CreateTemp(filepath.Dir(file), filepath.Base(file)+".*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	if _, err := fmt.Fprintln(f, rand.Text()+rand.Text()); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	if err := os.Link(f.Name(), file); err != nil && !errors.Is(err, fs.ErrExist) { // of another process
		return os.Rename(f.Name(), file) // a file system without links
	}
	return nil
}
