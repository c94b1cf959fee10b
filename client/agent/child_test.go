package agent_test

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/culvert-io/culvert/client/agent"
	"github.com/culvert-io/culvert/protocol"
	"github.com/culvert-io/culvert/proxy/server"
)

// childName, where it is set, makes the test binary run one of children: for
// what belongs to a whole process, its environment and its end.
const childName = "CULVERT_TEST_CHILD"

var children = map[string]func(){"agent": runAgent}

// runAgent is an agent as the environment says, until its standard input ends.
func runAgent() {
	c := agent.Config{
		Name:             "web-1",
		ProxyURLs:        []string{os.Getenv("TEST_PROXY_URL")},
		RetryInitialWait: 10 * time.Millisecond,
		Hosts:            []agent.Host{{Name: "exporter.invalid"}},
		Allow:            []agent.PortRange{{First: 1, Last: 65535}},
		Targets:          []agent.Target{{Name: "node", URL: "http://exporter.invalid/metrics"}},
		Logger:           slog.New(slog.NewTextHandler(os.Stderr, nil)),
	}
	if ca, err := os.ReadFile(os.Getenv("TEST_CA")); err == nil {
		pool := x509.NewCertPool()
		pool.AppendCertsFromPEM(ca)
		c.TLS = &tls.Config{RootCAs: pool}
	}
	a, err := agent.New(c)
	if err != nil {
		panic(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		io.Copy(io.Discard, os.Stdin)
		cancel()
	}()
	a.Run(ctx)
}

// startChild starts an agent in a process of its own.
func startChild(t *testing.T, env ...string) *logBuffer {
	t.Helper()
	logs := &logBuffer{}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), append(env, childName+"=agent", "GORACE=atexit_sleep_ms=0")...)
	cmd.Stderr = logs
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stdin.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("the agent's process: %v", err)
		}
		if t.Failed() {
			t.Logf("log of the agent's process:\n%s", logs)
		}
	})
	return logs
}

// newCertificate makes a certificate for the host, and a web configuration that
// uses it.
func newCertificate(t *testing.T, host string) (webConfig string, pool *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: host}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}
	if ip := net.ParseIP(host); ip != nil {
		template.IPAddresses = []net.IP{ip}
	} else {
		template.DNSNames = []string{host}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	for name, content := range map[string][]byte{
		"cert.pem": cert,
		"key.pem":  pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}),
		"web.yml":  []byte("tls_server_config: {cert_file: cert.pem, key_file: key.pem}\nhttp_server_config: {http2: true}\n"),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	pool = x509.NewCertPool()
	pool.AppendCertsFromPEM(cert)
	return filepath.Join(dir, "web.yml"), pool
}

// TestEnvironmentProxy: HTTPS_PROXY is for the way out to the proxy, not for
// scrapes. The name culvert.invalid is known to the CONNECT proxy alone.
func TestEnvironmentProxy(t *testing.T) {
	t.Parallel()
	webConfig, _ := newCertificate(t, "culvert.invalid")
	p := newProxy(t, func(c *server.Config) {
		c.AgentWebConfigFile, c.AgentListenAddresses = webConfig, []string{"127.0.0.1:0"}
	})
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var asked []string
	var conns []net.Conn
	var tasks sync.WaitGroup
	t.Cleanup(func() {
		ln.Close()
		mu.Lock()
		for _, c := range conns {
			c.Close()
		}
		mu.Unlock()
		tasks.Wait()
	})
	tasks.Go(func() {
		for {
			near, err := ln.Accept()
			if err != nil {
				return
			}
			tasks.Go(func() {
				defer near.Close()
				r := bufio.NewReader(near)
				req, err := http.ReadRequest(r)
				if err != nil {
					return
				}
				mu.Lock()
				asked = append(asked, req.Method+" "+req.RequestURI)
				mu.Unlock()
				if req.Method != http.MethodConnect || req.Host != "culvert.invalid:443" {
					io.WriteString(near, "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")
					return
				}
				far, err := net.Dial("tcp", p.AgentAddr())
				if err != nil {
					return
				}
				defer far.Close()
				mu.Lock()
				conns = append(conns, near, far)
				mu.Unlock()
				io.WriteString(near, "HTTP/1.1 200 Connection established\r\n\r\n")
				tasks.Go(func() { io.Copy(far, r); far.Close() })
				io.Copy(near, far)
			})
		}
	})
	proxyURL := "http://" + ln.Addr().String()
	logs := startChild(t, "HTTPS_PROXY="+proxyURL, "HTTP_PROXY="+proxyURL, "https_proxy=", "http_proxy=", "NO_PROXY=", "no_proxy=",
		"TEST_PROXY_URL=https://culvert.invalid", "TEST_CA="+filepath.Join(filepath.Dir(webConfig), "cert.pem"))
	logs.wait(t, "msg=Connected")
	p.want("http://agent.web-1/metrics", 200, "culvert_client_connected")
	p.want("http://node.web-1/metrics", 502, "exporter.invalid")
	p.want("http://exporter.invalid:9100/metrics", 502, "exporter.invalid")
	mu.Lock()
	defer mu.Unlock()
	if got := strings.Join(asked, ", "); got != "CONNECT culvert.invalid:443" {
		t.Errorf("the environment's proxy was asked: %s", got)
	}
}

// TestOddDrains: whatever a proxy says in a drain, the agent lives on.
func TestOddDrains(t *testing.T) {
	t.Parallel()
	for _, seconds := range []float64{0, 1e-12, 1e-9, -1, 0.001} {
		t.Run(fmt.Sprint(seconds), func(t *testing.T) {
			t.Parallel()
			sessions := make(chan *protocol.Session, 10)
			var tasks sync.WaitGroup
			s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				session, err := protocol.Accept(w, r, "upgrade", "odd", protocol.SessionConfig{})
				if err != nil {
					return
				}
				tasks.Go(func() { // takes the registration
					http.Serve(session.Listener(), http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
				})
				sessions <- session
			}))
			t.Cleanup(func() { s.Close(); tasks.Wait() })
			logs := startChild(t, "TEST_PROXY_URL="+s.URL)
			logs.wait(t, "msg=Connected")
			first := received(t, sessions, "the session")
			t.Cleanup(func() { first.Close() })
			if err := first.SendDrain(t.Context(), protocol.Drain{Reason: "test", ReconnectAfterSeconds: seconds}); err != nil {
				t.Errorf("drain: %v", err)
			}
			select {
			case second := <-sessions:
				t.Cleanup(func() { second.Close() })
			case <-time.After(patience):
				t.Errorf("the agent did not come back")
			}
		})
	}
}
