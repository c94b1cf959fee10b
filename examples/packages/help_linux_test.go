package packages

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/culvert-io/culvert/protocol/externaltest"
)

// unpack returns a directory with the files of the Debian package.
func unpack(t *testing.T, name string) string {
	t.Helper()
	dir := t.TempDir()
	if out, err := exec.Command(externaltest.Program(t, "dpkg-deb", "dpkg"), "--extract", deb(t, name), dir).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return dir
}

// TestManPages has mandoc and man-db read the pages.
func TestManPages(t *testing.T) {
	mandoc := externaltest.Program(t, "mandoc", "mandoc")
	lexgrog := externaltest.Program(t, "lexgrog", "man-db")
	for _, name := range names {
		page := filepath.Join(unpack(t, name), "usr/share/man/man1", name+".1.gz")
		if out, err := exec.Command(mandoc, "-T", "lint", "-W", "warning", page).CombinedOutput(); err != nil || len(out) > 0 {
			t.Errorf("mandoc: %v\n%s", err, out)
		}
		out, err := exec.Command(mandoc, "-T", "utf8", page).Output()
		if err != nil {
			t.Fatal(err)
		}
		text := strings.ReplaceAll(string(out), "\b", "")
		for _, heading := range []string{"NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "COMMANDS", "SIGNALS", "EXIT STATUS", "ENVIRONMENT", "FILES", "EXAMPLES", "SEE ALSO"} {
			if !strings.Contains("\n"+unbold(string(out)), "\n"+heading+"\n") {
				t.Errorf("%s has no section %s", name, heading)
			}
		}
		for _, stray := range []string{`\-`, `\f`, "{{", "<no value>", "%!"} {
			if strings.Contains(text, stray) {
				t.Errorf("%s has markup in its text: %s", name, stray)
			}
		}
		if out, err := exec.Command(lexgrog, page).CombinedOutput(); err != nil || !strings.Contains(string(out), `"`+name+" - ") {
			t.Errorf("what whatis would show: %v\n%s", err, out)
		}
	}
}

// unbold takes away what a terminal shows as bold or underlined: a character, backspace,
// and the character again.
func unbold(text string) string {
	var out []rune
	for _, r := range text {
		if r == '\b' && len(out) > 0 {
			out = out[:len(out)-1]
			continue
		}
		out = append(out, r)
	}
	return string(out)
}

var completions = []struct{ line, want string }{
	{"culvert-client --proxy-u", "--proxy-url"},
	{"culvert-client --log.level ", "debug info warn error"},
	{"culvert-client --log.level=wa", "warn"},
	{"culvert-client --proxy-url http://a:8080 --log.format=", "logfmt json"},
	{"culvert-client doc", "doctor"},
	{"culvert-client --proxy-url=http://a:8080 --allow=9100 l", "leave"},
	{"culvert-client run --jo", "--job"},
	{"culvert-proxy --web.listen", "--web.listen-address"},
	{"culvert-proxy token c", "create"},
}

// TestBashCompletion has bash complete what people may have typed.
func TestBashCompletion(t *testing.T) {
	bash := externaltest.Program(t, "bash", "bash")
	for _, name := range names {
		dir := unpack(t, name)
		script := filepath.Join(dir, "usr/share/bash-completion/completions", name)
		if out, err := exec.Command(bash, "-n", script).CombinedOutput(); err != nil || len(out) > 0 {
			t.Errorf("%v\n%s", err, out)
		}
		for _, c := range completions {
			if !strings.HasPrefix(c.line, name) {
				continue
			}
			cmd := exec.Command(bash, "--norc", "-c", `source "$1"; COMP_LINE=$2 COMP_POINT=${#2}; "_$3"; echo "${COMPREPLY[*]}"`, "bash", script, c.line, name)
			cmd.Env = append(os.Environ(), "PATH="+filepath.Join(dir, "usr/bin")+":"+os.Getenv("PATH"))
			out, err := cmd.CombinedOutput()
			if got := strings.TrimSpace(string(out)); err != nil || got != c.want {
				t.Errorf("%q is completed to %q, want %q; %v", c.line, got, c.want, err)
			}
		}
	}
}

// TestZshCompletion has zsh, on a terminal of its own, complete a line at the first try.
func TestZshCompletion(t *testing.T) {
	zsh := externaltest.Program(t, "zsh", "zsh")
	for _, name := range names {
		dir := unpack(t, name)
		functions := filepath.Join(dir, "usr/share/zsh/vendor-completions")
		if out, err := exec.Command(zsh, "-n", filepath.Join(functions, "_"+name)).CombinedOutput(); err != nil || len(out) > 0 {
			t.Errorf("%v\n%s", err, out)
		}
		for _, c := range completions {
			if !strings.HasPrefix(c.line, name) || strings.Contains(c.want, " ") {
				continue
			}
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			cmd := exec.CommandContext(ctx, zsh, "-f", "-c", `
zmodload zsh/zpty
zpty shell zsh -f -i
zpty -w shell "PS1= PROMPT_EOL_MARK=; fpath=($1 \$fpath); autoload -Uz compinit; compinit -D -u; print rea''dy"
zpty -r shell out '*ready*'
zpty -w -n shell "$2"$'\t'
zpty -r shell out "*$3 *"
print -r -- "$out"
zpty -d shell`, "zsh", functions, c.line, c.want)
			cmd.Env = append(os.Environ(), "PATH="+filepath.Join(dir, "usr/bin")+":"+os.Getenv("PATH"), "TERM=dumb", "ZDOTDIR="+dir)
			out, err := cmd.CombinedOutput()
			cancel()
			if err != nil || !strings.Contains(string(out), c.want+" ") {
				t.Errorf("%q is completed to %q, want %q; %v", c.line, out, c.want, err)
			}
		}
	}
}
