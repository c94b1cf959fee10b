package server_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/culvert-io/culvert/client/agent"
	"github.com/culvert-io/culvert/protocol"
	"github.com/culvert-io/culvert/proxy/server"
)

// testCA issues certificates.
type testCA struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pool *x509.CertPool
}

func newCA(t *testing.T) *testCA {
	t.Helper()
	ca := &testCA{t: t, pool: x509.NewCertPool()}
	ca.cert, ca.key = ca.issue(&x509.Certificate{Subject: pkix.Name{CommonName: "CA"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign})
	ca.pool.AddCert(ca.cert)
	return ca
}

func (ca *testCA) issue(template *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey) {
	ca.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		ca.t.Fatal(err)
	}
	template.SerialNumber, template.NotAfter = big.NewInt(time.Now().UnixNano()), time.Now().Add(time.Hour)
	template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}
	parent, signer := ca.cert, ca.key
	if parent == nil {
		parent, signer = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	if err != nil {
		ca.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		ca.t.Fatal(err)
	}
	return cert, key
}

// client returns the TLS configuration of who has a certificate of that name, issued by ca.
func (ca *testCA) client(names ...string) *tls.Config {
	cert, key := ca.issue(&x509.Certificate{DNSNames: names})
	return &tls.Config{RootCAs: ca.pool, Certificates: []tls.Certificate{{Certificate: [][]byte{cert.Raw}, PrivateKey: key}}}
}

// webConfig returns a web configuration for 127.0.0.1 that asks for client certificates.
func (ca *testCA) webConfig(clientAuth string) string {
	cert, key := ca.issue(&x509.Certificate{DNSNames: []string{"localhost"}})
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		ca.t.Fatal(err)
	}
	dir := ca.t.TempDir()
	authority := "client_ca_file: ca.pem, "
	if clientAuth == "RequestClientCert" {
		authority = ""
	}
	for name, content := range map[string][]byte{
		"ca.pem":   pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.cert.Raw}),
		"cert.pem": pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}),
		"key.pem":  pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}),
		"web.yml":  []byte("tls_server_config: {cert_file: cert.pem, key_file: key.pem, " + authority + "client_auth_type: " + clientAuth + "}\n"),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			ca.t.Fatal(err)
		}
	}
	return filepath.Join(dir, "web.yml")
}

const certificateRoles = `
roles:
  scrapers: [{name: prom, client_cert: [prom.example.net]}]
  agents: [{name: own names, client_cert: ['*.agents.lan']}]
  pushers: [{name: jobs, client_cert: [jobs.example.net], jobs: [backup]}]
  operators: [{name: root, client_cert: [root.example.net]}]
`

// TestClientCertificates: a verified certificate is as good as a password, everywhere.
func TestClientCertificates(t *testing.T) {
	t.Parallel()
	ca := newCA(t)
	file := newRolesFile(t, certificateRoles)
	p := newProxy(t, func(c *server.Config) {
		c.ConfigFile, c.WebConfigFile = file.path, ca.webConfig("VerifyClientCertIfGiven")
	})
	base := mustParse(t, "https://"+p.addr)
	config := func(names ...string) *tls.Config {
		c := &tls.Config{RootCAs: ca.pool}
		if names != nil {
			c = ca.client(names...)
		}
		c.ServerName = "localhost"
		return c
	}
	_, port := newTarget(t, nil)
	newAgent(t, p, func(c *agent.Config) {
		c.Name, c.ProxyURLs, c.TLS = "web-1.agents.lan", []string{base.String()}, config("web-1.agents.lan")
		allowAll(c)
	})
	for _, c := range []struct {
		names  []string
		method string
		url    string // "" host: the proxy's own
		want   int
	}{
		{nil, "GET", "/clients", 401},
		{[]string{"stranger.example.net"}, "GET", "/clients", 401},
		{[]string{"prom.example.net"}, "GET", "/clients", 200},
		{[]string{"prom.example.net"}, "PUT", "/metrics/job/backup", 403},
		{[]string{"jobs.example.net"}, "PUT", "/metrics/job/backup", 200},
		{[]string{"jobs.example.net"}, "PUT", "/metrics/job/other", 403},
		{[]string{"root.example.net"}, "GET", "/api/v1/status", 200},
		{nil, "GET", "http://web-1.agents.lan:" + port + "/metrics", 407},
		{[]string{"prom.example.net"}, "GET", "http://web-1.agents.lan:" + port + "/metrics", 200},
		{[]string{"web-1.agents.lan"}, "GET", "http://web-1.agents.lan:" + port + "/metrics", 403},
	} {
		transport := &http.Transport{TLSClientConfig: config(c.names...), DisableKeepAlives: true}
		u := c.url
		if u[0] == '/' {
			u = base.String() + u
		} else {
			transport.Proxy = http.ProxyURL(base)
		}
		req, _ := http.NewRequest(c.method, u, nil)
		resp, err := (&http.Client{Transport: transport}).Do(req)
		if err != nil {
			t.Errorf("%s %s as %v: %v", c.method, c.url, c.names, err)
			continue
		}
		resp.Body.Close()
		if resp.StatusCode != c.want {
			t.Errorf("%s %s as %v: got %s, want %d", c.method, c.url, c.names, resp.Status, c.want)
		}
	}
	_, err := (&protocol.Dialer{ProxyURL: base, Agent: "web-2.agents.lan", Instance: "1", TLS: config("web-1.agents.lan")}).Dial(t.Context())
	wantRefusal(t, err, 403, protocol.CodeForbidden, "web-2.agents.lan")
}

// TestUnverifiedCertificate: where the web configuration takes any certificate, it
// proves nothing.
func TestUnverifiedCertificate(t *testing.T) {
	t.Parallel()
	ca, stranger := newCA(t), newCA(t)
	file := newRolesFile(t, certificateRoles)
	p := newProxy(t, func(c *server.Config) {
		c.ConfigFile, c.WebConfigFile = file.path, ca.webConfig("RequestClientCert")
	})
	config := stranger.client("root.example.net")
	config.RootCAs, config.ServerName = ca.pool, "localhost"
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: config, DisableKeepAlives: true}}
	resp, err := client.Get((&url.URL{Scheme: "https", Host: p.addr, Path: "/api/v1/status"}).String())
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != 401 {
		t.Error(fmt.Sprint("got ", resp.Status))
	}
}
