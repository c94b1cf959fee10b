// Package packages has what packages of both programs are built from.
package packages

import (
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/culvert-io/culvert/protocol/externaltest"
)

// version of the packages that the tests build.
const version = "1.2.3~test"

var names = []string{"culvert-proxy", "culvert-client"}

// built is the directory of the packages.
var built string

func TestMain(m *testing.M) {
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "culvert-packages-")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		built = dir
		return m.Run()
	}())
}

var download = sync.OnceValue(func() error {
	out, err := exec.Command("go", "-C", "nfpm", "mod", "download").CombinedOutput()
	if err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
})

var build = sync.OnceValues(func() (string, error) {
	cmd := exec.Command("./build.sh", built)
	cmd.Env = append(os.Environ(), "VERSION="+version)
	out, err := cmd.CombinedOutput()
	return string(out), err
})

// deb and rpm return the path of a package, which is built at first use.
func deb(t *testing.T, name string) string { return pkg(t, name+"_"+version+"_*.deb") }
func rpm(t *testing.T, name string) string { return pkg(t, name+"-"+version+"-1.*.rpm") }

func pkg(t *testing.T, pattern string) string {
	t.Helper()
	if err := download(); err != nil {
		externaltest.Missing(t, "nfpm can't be had: "+err.Error())
	}
	if out, err := build(); err != nil {
		t.Fatalf("build.sh: %v\n%s", err, out)
	}
	found, err := filepath.Glob(filepath.Join(built, pattern))
	if err != nil || len(found) != 1 {
		t.Fatalf("%s: %q %v", pattern, found, err)
	}
	return found[0]
}

// files are those of a package, with their modes; NAME and KIND stand for culvert-proxy and
// proxy.
var files = map[string]fs.FileMode{
	"/usr/bin/NAME":                                 0o755,
	"/usr/lib/systemd/system/NAME.service":          0o644,
	"/usr/lib/sysusers.d/NAME.conf":                 0o644,
	"/etc/default/NAME":                             0o644,
	"/etc/NAME":                                     fs.ModeDir | 0o750,
	"/etc/NAME/KIND.yml":                            0o644,
	"/usr/share/man/man1/NAME.1.gz":                 0o644,
	"/usr/share/bash-completion/completions/NAME":   0o644,
	"/usr/share/doc/NAME/README.md.gz":              0o644,
	"/usr/share/doc/NAME/CHANGELOG.md.gz":           0o644,
	"/usr/share/doc/NAME/LICENSES.gz":               0o644,
	"/usr/share/doc/NAME/copyright (deb)":           0o644,
	"/usr/share/zsh/vendor-completions/_NAME (deb)": 0o644,
	"/usr/share/zsh/site-functions/_NAME (rpm)":     0o644,
	"/usr/share/licenses/NAME/LICENSE (rpm)":        0o644,
}

// filesOf returns the files of one package of a format, with their modes.
func filesOf(name, format string) map[string]fs.FileMode {
	of := map[string]fs.FileMode{}
	for path, mode := range files {
		path, only, _ := strings.Cut(path, " ")
		if only == "" || only == "("+format+")" {
			of[strings.NewReplacer("NAME", name, "KIND", strings.TrimPrefix(name, "culvert-")).Replace(path)] = mode
		}
	}
	return of
}

// checkFiles checks that the files of a package are there.
func checkFiles(t *testing.T, root, name, format string) {
	t.Helper()
	for path, mode := range filesOf(name, format) {
		info, err := os.Lstat(root + path)
		if err != nil {
			t.Error(err)
			continue
		}
		if info.Mode() != mode {
			t.Errorf("%s has the mode %s, want %s", path, info.Mode(), mode)
		}
		if owner := info.Sys().(*syscall.Stat_t).Uid; owner != 0 {
			t.Errorf("%s is of the user %d", path, owner)
		}
	}
}

// leftFiles returns those files of a package that are still there.
func leftFiles(root, name, format string) []string {
	var left []string
	for path := range filesOf(name, format) {
		if _, err := os.Lstat(root + path); err == nil {
			left = append(left, path)
		}
	}
	slices.Sort(left)
	return left
}

// TestDpkg installs and removes the packages in an empty directory: there are no
// programs in it, and no systemd runs there. The packages' scripts run with this machine's
// programs, and then without systemd's.
func TestDpkg(t *testing.T) {
	externaltest.Program(t, "dpkg", "dpkg")
	externaltest.Program(t, "systemctl", "systemd")
	if os.Getuid() != 0 {
		externaltest.Missing(t, "only root can install packages")
	}
	t.Run("systemd", func(t *testing.T) { testDpkg(t, true) })
	t.Run("without systemd", func(t *testing.T) {
		programs := t.TempDir()
		for _, name := range []string{"sh", "dpkg", "dpkg-deb", "dpkg-split", "tar", "xz", "rm", "rmdir", "diff", "sed", "chgrp", "getent", "useradd", "ldconfig", "start-stop-daemon"} {
			path, err := exec.LookPath(name)
			if err != nil {
				path, err = exec.LookPath("/usr/sbin/" + name)
			}
			if err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink(path, filepath.Join(programs, name)); err != nil {
				t.Fatal(err)
			}
		}
		for _, name := range names {
			deb(t, name) // needs more programs
		}
		t.Setenv("PATH", programs)
		testDpkg(t, false)
	})
}

func testDpkg(t *testing.T, systemd bool) {
	root := t.TempDir()
	for path, text := range map[string]string{"var/lib/dpkg/status": "", "etc/passwd": "root:x:0:0:root:/root:/bin/sh\n", "etc/group": "root:x:0:\n"} {
		if err := os.MkdirAll(filepath.Join(root, filepath.Dir(path)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, path), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	dpkg := func(args ...string) string {
		t.Helper()
		out, err := exec.Command("dpkg", append([]string{"--root=" + root, "--force-script-chrootless", "--log=/dev/null"}, args...)...).CombinedOutput()
		if err != nil {
			t.Fatalf("dpkg %s: %v\n%s", strings.Join(args, " "), err, out)
		}
		return string(out)
	}
	for _, name := range names {
		t.Run(name, func(t *testing.T) {
			if info, err := os.Stat(deb(t, name)); err == nil {
				t.Logf("%s: %d bytes", filepath.Base(deb(t, name)), info.Size())
			}
			dpkg("--install", deb(t, name))
			checkFiles(t, root, name, "deb")
			passwd, err := os.ReadFile(filepath.Join(root, "etc/passwd"))
			if user := regexp.MustCompile("(?m)^" + name + ":.*:/var/lib/" + name + ":/usr/sbin/nologin$"); err != nil || !user.Match(passwd) {
				t.Errorf("the user is missing: %v\n%s", err, passwd)
			}
			if info, err := os.Stat(filepath.Join(root, "etc", name)); err != nil || info.Sys().(*syscall.Stat_t).Gid == 0 {
				t.Errorf("/etc/%s belongs to root's group: %v", name, err)
			}
			out, err := exec.Command(filepath.Join(root, "usr/bin", name), "--version").CombinedOutput()
			if err != nil || !strings.Contains(string(out), name+", version "+version+" (branch: ") {
				t.Errorf("--version: %v\n%s", err, out)
			}
			if systemd {
				if out, err := exec.Command("systemctl", "--root="+root, "enable", name).CombinedOutput(); err != nil {
					t.Fatalf("%v\n%s", err, out)
				}
			}
			data := filepath.Join(root, "var/lib", name, "data")
			if err := os.MkdirAll(data, 0o700); err != nil {
				t.Fatal(err)
			}

			dpkg("--remove", name)
			want := []string{"/etc/" + name, "/etc/" + name + "/" + strings.TrimPrefix(name, "culvert-") + ".yml", "/etc/default/" + name}
			if left := leftFiles(root, name, "deb"); !slices.Equal(left, want) {
				t.Errorf("after the removal there are %q, want %q", left, want)
			}
			if _, err := os.Lstat(filepath.Join(root, "etc/systemd/system/multi-user.target.wants", name+".service")); err == nil {
				t.Error("the service is still enabled")
			}
			if out := dpkg("--purge", name); !strings.Contains(out, "is left in /var/lib/"+name) {
				t.Errorf("the purge does not say where the data are:\n%s", out)
			}
			if left := leftFiles(root, name, "deb"); len(left) > 0 {
				t.Errorf("after the purge there are %q", left)
			}
			if _, err := os.Stat(data); err != nil {
				t.Error(err)
			}
		})
	}
}
