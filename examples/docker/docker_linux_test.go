// Package docker has Dockerfiles of both programs.
package docker

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-io/culvert/protocol/externaltest"
)

// plan is what lint prints.
type plan struct {
	Files  []string
	Stages []struct {
		Name, Base string
		Commands   []struct {
			Name, Shell         string
			Sources             []string
			Dest, From          string
			Chown, Chmod, Other string
		}
	}
}

// TestImages has BuildKit's parser read the Dockerfiles, carries out their instructions here,
// as there may be no registry with a base image, and runs what comes out with nothing else in
// its root, and as the image's user.
func TestImages(t *testing.T) {
	if os.Getuid() != 0 {
		externaltest.Missing(t, "only root can run a program in a root of its own")
	}
	if out, err := exec.Command("go", "-C", "lint", "mod", "download").CombinedOutput(); err != nil {
		externaltest.Missing(t, "BuildKit's parser can't be had: "+string(out))
	}
	lint := filepath.Join(t.TempDir(), "lint")
	if out, err := exec.Command("go", "-C", "lint", "build", "-o", lint, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, kind := range []string{"proxy", "client"} {
		t.Run(kind, func(t *testing.T) {
			cmd := exec.Command(lint, kind+".Dockerfile", "../..")
			cmd.Stderr = t.Output()
			out, err := cmd.Output()
			if err != nil {
				t.Fatal(err)
			}
			var p plan
			if err := json.Unmarshal(out, &p); err != nil {
				t.Fatal(err)
			}
			root, user := carryOut(t, p)
			uid, gid, ok := strings.Cut(user, ":")
			id, err := strconv.Atoi(uid)
			if err != nil || !ok || gid != uid || id == 0 {
				t.Fatalf("the user is %q: only a number is known to Kubernetes as none of root's", user)
			}
			image := func(args ...string) *exec.Cmd {
				cmd := exec.Command("/culvert-"+kind, args...)
				cmd.Dir, cmd.Env = "/", []string{}
				cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root, Credential: &syscall.Credential{Uid: uint32(id), Gid: uint32(id), NoSetGroups: true}, Pdeathsig: syscall.SIGKILL}
				return cmd
			}
			if out, err := image("--version").CombinedOutput(); err != nil || !strings.Contains(string(out), "culvert-"+kind+", version 1.2.3-test ") {
				t.Errorf("--version: %v\n%s", err, out)
			}
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			address := l.Addr().String()
			l.Close()
			url, args := "http://"+address+"/-/healthy", []string{"--web.listen-address=" + address}
			if kind == "client" {
				url, args = "http://"+address+"/metrics", []string{"--proxy-url=https://127.0.0.1:1", "--fqdn=web-1", "--metrics-addr=" + address, "--key-file=/data/agent.key"}
			}
			program := image(args...)
			program.Stderr = t.Output()
			if err := program.Start(); err != nil {
				t.Fatal(err)
			}
			for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) { // it tells nobody when it listens
				resp, err := http.Get(url)
				if err == nil {
					io.Copy(io.Discard, resp.Body)
					resp.Body.Close()
					if resp.StatusCode == http.StatusOK {
						break
					}
					err = fmt.Errorf("%s", resp.Status)
				}
				if time.Now().After(deadline) {
					t.Errorf("%s: %v", url, err)
					break
				}
			}
			if err := program.Process.Signal(syscall.SIGTERM); err != nil {
				t.Error(err)
			}
			if err := program.Wait(); err != nil {
				t.Errorf("SIGTERM ends it with %v", err)
			}
			stored, err := os.ReadDir(filepath.Join(root, "data"))
			if err != nil || len(stored) == 0 {
				t.Errorf("nothing is stored in /data: %v", err)
			}
		})
	}
}

// carryOut does what the instructions say. It returns the root of the last stage, and its
// user.
func carryOut(t *testing.T, p plan) (root, user string) {
	t.Helper()
	if len(p.Stages) != 2 || p.Stages[0].Name != "build" || p.Stages[1].Base != "scratch" {
		t.Fatalf("want a stage that builds and one from nothing: %+v", p.Stages)
	}
	builder := t.TempDir()
	root = t.TempDir()
	if err := os.Chmod(root, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, leak := range []string{".git/HEAD", "README.md", "proxy/import_test.go", "examples/docker/docker_linux_test.go"} {
		if slices.Contains(p.Files, leak) {
			t.Errorf(".dockerignore lets %s into the image's context", leak)
		}
	}
	for _, c := range p.Stages[0].Commands {
		switch {
		case c.Name == "WORKDIR" || c.Name == "ARG":
		case c.Name == "COPY" && slices.Equal(c.Sources, []string{"."}) && c.Dest == ".":
			for _, file := range p.Files {
				copyFile(t, filepath.Join("../..", file), filepath.Join(builder, "src", file), 0o644)
			}
		case c.Name == "RUN":
			// What is absolute there is below the builder's root here.
			shell := regexp.MustCompile(`(^|\s)/out\b`).ReplaceAllString(c.Shell, "${1}"+builder+"/out")
			cmd := exec.Command("/bin/sh", "-c", shell)
			cmd.Dir = filepath.Join(builder, "src")
			cmd.Env = append(os.Environ(), "TARGETOS=linux", "TARGETARCH="+runtime.GOARCH, "VERSION=1.2.3-test", "GOFLAGS=")
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("%s: %v\n%s", shell, err, out)
			}
		default:
			t.Fatalf("%s can't be carried out here", c.Name)
		}
	}
	for _, c := range p.Stages[1].Commands {
		switch c.Name {
		case "COPY":
			source := filepath.Join("../..", c.Sources[0])
			if c.From == "build" {
				source = filepath.Join(builder, c.Sources[0])
				if strings.HasPrefix(c.Sources[0], "/etc/") { // of the base image
					source = c.Sources[0]
				}
			} else if !slices.Contains(p.Files, c.Sources[0]) {
				t.Fatalf(".dockerignore takes %s away", c.Sources[0])
			}
			dest := filepath.Join(root, c.Dest)
			info, err := os.Stat(source)
			if err != nil {
				if strings.HasPrefix(source, "/etc/ssl") {
					externaltest.Missing(t, "there are no CA certificates here: apt-get install ca-certificates")
				}
				t.Fatal(err)
			}
			if info.IsDir() {
				if err := os.MkdirAll(dest, 0o755); err != nil {
					t.Fatal(err)
				}
			} else {
				copyFile(t, source, dest, info.Mode().Perm())
			}
			if c.Chmod != "" {
				if out, err := exec.Command("chmod", c.Chmod, dest).CombinedOutput(); err != nil {
					t.Fatalf("%v\n%s", err, out)
				}
			}
			if c.Chown != "" {
				if out, err := exec.Command("chown", c.Chown, dest).CombinedOutput(); err != nil {
					t.Fatalf("%v\n%s", err, out)
				}
			}
		case "USER":
			user = strings.TrimPrefix(strings.Trim(c.Other, "{}"), "USER ")
		}
	}
	return root, user
}

func copyFile(t *testing.T, from, to string, mode os.FileMode) {
	t.Helper()
	text, err := os.ReadFile(from)
	if err == nil {
		err = os.MkdirAll(filepath.Dir(to), 0o755)
	}
	if err == nil {
		err = os.WriteFile(to, text, mode)
	}
	if err != nil {
		t.Fatal(err)
	}
}
