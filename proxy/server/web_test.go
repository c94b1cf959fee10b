package server_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/culvert-io/culvert/proxy/server"
)

// newCertificate returns a web configuration with a certificate of its own that
// nobody knows, and HTTP/2 asked for.
func newCertificate(t *testing.T) (webConfig string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for name, content := range map[string][]byte{
		"cert.pem": pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		"key.pem":  pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}),
		"web.yml":  []byte("tls_server_config: {cert_file: cert.pem, key_file: key.pem}\nhttp_server_config: {http2: true}\n"),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return filepath.Join(dir, "web.yml")
}

// TestWebConfig: HTTP/1.1 alone is offered, headers are added, and what would
// take the targets' credentials is refused.
func TestWebConfig(t *testing.T) {
	t.Parallel()
	t.Run("TLS", func(t *testing.T) {
		p := newProxy(t, func(c *server.Config) { c.WebConfigFile = newCertificate(t) })
		conn := tls.Client(rawConn(t, p.addr), &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2", "http/1.1"}})
		if err := conn.Handshake(); err != nil {
			t.Fatal(err)
		}
		if got := conn.ConnectionState().NegotiatedProtocol; got != "http/1.1" {
			t.Errorf("negotiated %q", got)
		}
	})
	t.Run("expiry", func(t *testing.T) {
		registry, path := prometheus.NewRegistry(), newCertificate(t)
		newProxy(t, func(c *server.Config) { c.Registry, c.WebConfigFile = registry, path })
		const family = "culvert_proxy_tls_certificate_expiry_timestamp_seconds"
		if left := time.Until(time.Unix(int64(metricSum(t, registry, family, path)), 0)); left < 30*time.Minute || left > time.Hour {
			t.Errorf("the certificate of an hour is said to expire in %s", left)
		}
		if err := os.Remove(filepath.Join(filepath.Dir(path), "key.pem")); err != nil {
			t.Fatal(err)
		}
		if n, err := testutil.GatherAndCount(registry, family); n != 1 || err != nil || metricSum(t, registry, family) != 0 {
			t.Errorf("of a certificate without its key there are %d series, %v", n, err)
		}
	})
	write := func(text string) string {
		path := filepath.Join(t.TempDir(), "web.yml")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	t.Run("headers", func(t *testing.T) {
		registry := prometheus.NewRegistry()
		p := newProxy(t, func(c *server.Config) {
			c.Registry, c.WebConfigFile = registry, write("http_server_config: {headers: {X-Frame-Options: deny}}")
		})
		if n, err := testutil.GatherAndCount(registry, "culvert_proxy_tls_certificate_expiry_timestamp_seconds"); n != 0 || err != nil {
			t.Errorf("without a certificate there are %d series of certificates, %v", n, err)
		}
		for _, path := range []string{"/clients", "http://nobody/metrics", "/tunnel"} {
			if v := p.get(path).header.Get("X-Frame-Options"); v != "deny" {
				t.Errorf("%s: X-Frame-Options: %q", path, v)
			}
		}
	})
	for name, c := range map[string]struct{ text, word string }{
		"users":         {"basic_auth_users: {joe: x}", "Authorization"},
		"unknown field": {"tls: {}", "tls"},
		"no file":       {"tls_server_config: {cert_file: nowhere.pem, key_file: nowhere.pem}", "nowhere.pem"},
	} {
		t.Run(name, func(t *testing.T) {
			path := write(c.text)
			for _, config := range []server.Config{{WebConfigFile: path}, {AgentListenAddresses: []string{"127.0.0.1:0"}, AgentWebConfigFile: path}} {
				config.ListenAddresses = []string{"127.0.0.1:0"}
				s, err := server.New(config)
				if err != nil {
					t.Fatal(err)
				}
				if err := s.Listen(); err == nil || !strings.Contains(err.Error(), c.word) || !strings.Contains(err.Error(), path) {
					t.Errorf("got %v", err)
				}
			}
		})
	}
}
