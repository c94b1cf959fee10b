package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/culvert-io/culvert/protocol/externaltest"
)

// maxSize is the most that the README promises for the binary of linux/amd64, in bytes.
const maxSize = 15_000_000

// goCommand runs the go command in this directory for linux/amd64, and returns what it
// printed.
func goCommand(t *testing.T, args ...string) string {
	t.Helper()
	if _, err := exec.LookPath("go"); err != nil {
		externaltest.Missing(t, "the go command is missing")
	}
	c := exec.CommandContext(t.Context(), "go", args...)
	c.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=", "GOOS=linux", "GOARCH=amd64")
	var stderr bytes.Buffer
	c.Stderr = &stderr
	out, err := c.Output()
	if err != nil {
		t.Fatalf("go %s: %v\n%s", strings.Join(args, " "), err, stderr.Bytes())
	}
	return string(out)
}

// TestDependencies keeps heavy packages out of the agent: it should be small enough to
// be copied to any host.
func TestDependencies(t *testing.T) {
	t.Parallel()
	heavy := map[string]string{
		"github.com/prometheus/prometheus":        "its parsers bring gogo/protobuf along; gateway has an OpenMetrics reader and native histograms of its own",
		"github.com/gogo/protobuf":                "google.golang.org/protobuf is there already",
		"github.com/prometheus/common/config":     "it brings html/template along, by its dialer; client/httpclient reads the same format",
		"github.com/golang-jwt/jwt":               "client/httpclient signs assertions itself, and verifies none",
		"github.com/klauspost/compress/flate":     "compress/flate is there already; proxies hand gateway/fastgzip to the gateway",
		"golang.org/x/net/http/httpproxy":         "net/http has a copy of its own, and of IDNA's tables; client/httpclient reads no_proxy",
		"golang.org/x/net/idna":                   "net/http has a copy of its own",
		"html/template":                           "the usage text of the command line is text",
		"golang.org/x/net/trace":                  "it brings html/template along",
		"net/http/pprof":                          "the agent serves no profiles, and it adds routes to the default mux",
		"golang.org/x/net/http2":                  "net/http has HTTP/2, and the agent speaks HTTP/1.1",
		"github.com/prometheus/exporter-toolkit":  "the agent's listeners have no web configuration",
		"go.etcd.io/etcd":                         "only proxies form a cluster",
		"google.golang.org/grpc":                  "only etcd's client needs it",
		"github.com/culvert-io/culvert/proxy":     "the agent is not the proxy",
		"github.com/prometheus/client_golang/api": "the agent asks no Prometheus",
	}
	for _, dependency := range strings.Fields(goCommand(t, "list", "-deps", ".")) {
		for path, why := range heavy {
			if dependency == path || strings.HasPrefix(dependency, path+"/") {
				t.Errorf("the agent imports %s: %s", dependency, why)
			}
		}
	}
}

// TestSize builds the agent as a release is built. What is cheap to look at where it has
// grown: slices.SortFunc is 12 kB or more for each type of element that is no pointer,
// sort.Slice is shared. And as kingpin uses text/template, the linker keeps all exported
// methods of a type whose values become interfaces.
func TestSize(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "culvert-client")
	goCommand(t, "build", "-buildvcs=false", "-trimpath", "-ldflags=-s -w", "-o", path, ".")
	binary, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d bytes", len(binary))
	if len(binary) > maxSize {
		t.Errorf("the agent has %d bytes, more than %d; go tool nm -size -sort size of a build without -s -w shows what is large", len(binary), maxSize)
	}
}
