package access

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"go.yaml.in/yaml/v2"
)

// maxTokensFile bounds the file of Config.AgentTokens, in bytes.
const maxTokensFile = 64 << 20

// ReadAgentTokens reads the file of Config.AgentTokens. One that is not there is empty.
func ReadAgentTokens(path string) ([]Agent, error) {
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is no regular file", path)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxTokensFile+1))
	if err != nil {
		return nil, err
	}
	if len(text) > maxTokensFile {
		return nil, fmt.Errorf("%s is larger than %d bytes", path, maxTokensFile)
	}
	var agents []Agent
	if err := yaml.UnmarshalStrict(text, &agents); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return agents, nil
}

// ErrTokensBusy is returned by EditAgentTokens where another process edits the file, or
// was killed while it did.
var ErrTokensBusy = errors.New("somebody else is writing the file of the tokens")

// EditAgentTokens replaces the content of the file of Config.AgentTokens, all or nothing,
// by what edit returns. It returns the error of edit, and writes nothing then, an error
// where the result would be no good configuration, or ErrTokensBusy.
func EditAgentTokens(path string, edit func([]Agent) ([]Agent, error)) (err error) {
	temporary := path + ".tmp"
	// The hash of a random token tells nothing: whoever runs the proxy may read it.
	f, err := os.OpenFile(temporary, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%w; if nobody is, remove %s", ErrTokensBusy, temporary)
	}
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(temporary)
		}
	}()
	defer f.Close()
	agents, err := ReadAgentTokens(path)
	if err != nil {
		return err
	}
	if agents, err = edit(agents); err != nil {
		return err
	}
	if _, err := (&Config{Agents: agents}).Compile(""); err != nil {
		return err
	}
	text, err := yaml.Marshal(agents)
	if err != nil {
		return err
	}
	if _, err := f.WriteString("# Written by culvert-proxy token. The tokens stand here as their SHA-256.\n" + string(text)); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return os.Rename(temporary, path)
}

// Stamp tells the current version of the file of Config.AgentTokens, "" where there is
// no such file or none is configured.
func (r *Roles) Stamp() string {
	if r.tokensFile == "" {
		return ""
	}
	info, err := os.Stat(r.tokensFile)
	if err != nil {
		return ""
	}
	return fmt.Sprint(info.ModTime().Format(time.RFC3339Nano), info.Size())
}

// Stamped returns the Stamp of what was read.
func (r *Roles) Stamped() string { return r.stamp }

// TokensFile returns the file of Config.AgentTokens, as it counts from dir.
func (c *Config) TokensFile(dir string) string {
	if c == nil || c.AgentTokens == "" {
		return ""
	}
	return join(dir, c.AgentTokens)
}
