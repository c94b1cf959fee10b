//go:build unix

package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-io/culvert/proxy/server"
)

// writeFile writes a file of a test, and returns its path.
func writeFile(t *testing.T, name, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// issue makes a certificate and its key, as files, and what others can be issued by.
func issue(t *testing.T, name string, by *x509.Certificate, byKey *ecdsa.PrivateKey) (cert *x509.Certificate, key *ecdsa.PrivateKey, certFile, keyFile string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), NotAfter: time.Now().Add(time.Hour),
		DNSNames: []string{name}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	if by == nil {
		by, byKey = template, key
		template.IsCA, template.BasicConstraintsValid, template.KeyUsage = true, true, x509.KeyUsageCertSign
	}
	der, err := x509.CreateCertificate(rand.Reader, template, by, &key.PublicKey, byKey)
	if err != nil {
		t.Fatal(err)
	}
	if cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return cert, key, writeFile(t, name+".pem", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))),
		writeFile(t, name+".key", string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})))
}

// TestPushCredentials: pushes to a proxy with roles, by each kind of credential that it
// takes. What is refused says what to do, and nothing that is said has a secret in it.
func TestPushCredentials(t *testing.T) {
	t.Parallel()
	const password, token = "pa ss-w0rd%/@", "t0ken-0123456789"
	ca, caKey, caFile, _ := issue(t, "ca", nil, nil)
	_, _, serverCert, serverKey := issue(t, "localhost", ca, caKey)
	_, _, clientCert, clientKey := issue(t, "jobs.example.net", ca, caKey)
	_, _, strangerCert, strangerKey := issue(t, "stranger.example.net", ca, caKey)
	passwordFile, tokenFile := writeFile(t, "password", password+"\n"), writeFile(t, "token", token+"\n")
	hash := sha256.Sum256([]byte(token))
	roles := writeFile(t, "culvert.yml", fmt.Sprintf(`
roles:
  scrapers: [{name: prometheus, basic_auth: {username: prometheus, password_file: %[1]s}}]
  pushers:
    - {name: by password, basic_auth: {username: jobs, password_file: %[1]s}, jobs: ['basic-.*']}
    - {name: by token, token_hash: %[2]s, jobs: ['token-.*']}
    - {name: by certificate, client_cert: [jobs.example.net], jobs: ['cert-.*']}
`, passwordFile, hex.EncodeToString(hash[:])))
	web := writeFile(t, "web.yml", fmt.Sprintf("tls_server_config: {cert_file: %s, key_file: %s, client_ca_file: %s, client_auth_type: VerifyClientCertIfGiven}\n", serverCert, serverKey, caFile))
	plain := startPushProxy(t, func(c *server.Config) { c.ConfigFile = roles })
	secured := strings.Replace(startPushProxy(t, func(c *server.Config) { c.ConfigFile, c.WebConfigFile = roles, web }), "http:", "https:", 1)
	withUser := func(base string) string { return strings.Replace(base, "://", "://jobs:pa%20ss-w0rd%25%2F%40@", 1) }
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	basic := []string{"--basic-auth.username=jobs", "--basic-auth.password-file=" + passwordFile}
	byToken := []string{"--token-file=" + tokenFile}
	tls := "--tls.cacert=" + caFile
	const refused, badInput = codeRefused, codeBadInput
	for _, c := range []struct {
		job   string
		url   string // in the environment
		flags []string
		code  int // of push
		want  string
	}{
		{job: "basic-1", url: plain, flags: basic},
		{job: "token-1", url: plain, flags: byToken},
		{job: "basic-2", url: withUser(plain)},
		{job: "token-2", url: withUser(plain), flags: byToken}, // a flag wins
		{job: "basic-3", url: secured, flags: append([]string{tls}, basic...)},
		{job: "token-3", url: secured, flags: append([]string{tls}, byToken...)},
		{job: "basic-4", url: withUser(secured), flags: []string{tls}},
		{job: "cert-1", url: secured, flags: []string{tls, "--tls.cert=" + clientCert, "--tls.key=" + clientKey}},
		{job: "basic-5", url: plain, flags: []string{"--push-url=" + withUser(plain)}, want: "in the list of processes"},

		{job: "cert-2", url: secured, flags: []string{tls, "--tls.cert=" + strangerCert, "--tls.key=" + strangerKey}, code: refused, want: "401"},
		{job: "none", url: plain, code: refused, want: "--token-file, a user with --basic-auth.username"},
		{job: "other", url: plain, flags: basic, code: refused, want: "403 Forbidden"},
		{job: "other", url: plain, flags: byToken, code: refused, want: "403 Forbidden"},
		{job: "basic-x", url: plain, flags: []string{basic[0], "--basic-auth.password-file=" + tokenFile}, code: refused, want: "401"},
		{job: "token-x", url: plain, flags: []string{"--token-file=" + writeFile(t, "other", token+"x")}, code: refused, want: "401"},
		{job: "token-x", url: secured, flags: byToken, code: refused, want: "--tls.cacert"},

		{job: "token-x", url: plain, flags: []string{"--token-file=/no/such/file"}, code: badInput, want: "/no/such/file"},
		{job: "token-x", url: plain, flags: []string{"--token-file=" + t.TempDir()}, code: badInput, want: "no regular file"},
		{job: "token-x", url: plain, flags: []string{"--token-file=" + fifo}, code: badInput, want: "no regular file"},
		{job: "token-x", url: plain, flags: []string{"--token-file=" + writeFile(t, "empty", " \n")}, code: badInput, want: "is empty"},
		{job: "token-x", url: plain, flags: []string{"--token-file=" + writeFile(t, "large", strings.Repeat("x", 4097))}, code: badInput, want: "larger than 4096 bytes"},
		{job: "token-x", url: plain, flags: []string{"--token-file=" + passwordFile}, code: badInput, want: "one word of printable ASCII"},
		{job: "basic-x", url: plain, flags: []string{basic[0], "--basic-auth.password-file=/no/such/file"}, code: badInput, want: "/no/such/file"},
		{job: "basic-x", url: strings.Replace(plain, "://", "://jobs:"+password+"@", 1), code: badInput, want: "as in %2F"},
		{job: "basic-x", url: strings.Replace(plain, "://", "://jobs:17/pa ss-w0rd@", 1), code: badInput, want: "as in %2F"},
	} {
		for _, command := range []string{"push", "run"} {
			name := c.job + "-" + command
			call := call{env: []string{"CULVERT_PUSH_URL=" + c.url}, args: append([]string{command, "--job=" + name, "--push-timeout=50s"}, c.flags...)}
			code := c.code
			if command == "run" {
				call.args, code = append(call.args, "--", "true"), 0 // whatever becomes of the push
			} else {
				call.stdin = "# TYPE culvert_job_exit_code gauge\nculvert_job_exit_code 0\n"
			}
			_, stderr := call.want(t, code)
			if c.want == "" && stderr != "" || !strings.Contains(stderr, c.want) {
				t.Errorf("%s %v: it said %q, want %q", name, c.flags, stderr, c.want)
			}
			for _, secret := range []string{"w0rd", token} {
				if strings.Contains(stderr, secret) {
					t.Errorf("%s %v: it said %q", name, c.flags, stderr)
				}
			}
			if strings.HasPrefix(c.url, "http:") {
				req, err := http.NewRequest(http.MethodGet, plain+"/metrics?only=groups", nil)
				if err != nil {
					t.Fatal(err)
				}
				req.SetBasicAuth("prometheus", password)
				resp, err := http.DefaultClient.Do(req)
				if err != nil {
					t.Fatal(err)
				}
				text, err := io.ReadAll(resp.Body)
				resp.Body.Close()
				if err != nil || resp.StatusCode != http.StatusOK {
					t.Fatalf("%s: %v\n%s", resp.Status, err, text)
				}
				if pushed := strings.Contains(string(text), `culvert_job_exit_code{instance="",job="`+name+`"} 0`); pushed != (c.code == 0) {
					t.Errorf("%s %v: pushed %t", name, c.flags, pushed)
				}
			}
		}
	}

	for _, c := range []struct{ args, want string }{
		{"--token-file=FILE --basic-auth.username=u --basic-auth.password-file=FILE", "give one of them"},
		{"--token-file=FILE --push-url=http://u@127.0.0.1:1", "give one of them"},
		{"--basic-auth.username=u --basic-auth.password-file=FILE --push-url=u:p@127.0.0.1:1", "give one of them"},
		{"--basic-auth.username=u", "go together"},
		{"--basic-auth.password-file=FILE", "go together"},
		{"--basic-auth.username=u:v --basic-auth.password-file=FILE", "no colon"},
	} {
		args := strings.Fields(strings.ReplaceAll(c.args, "FILE", tokenFile))
		file := filepath.Join(t.TempDir(), "file")
		if _, stderr := (call{args: append(append([]string{"run", "--job=j"}, args...), "--", "touch", file)}).want(t, codeNoRun); !strings.Contains(stderr, c.want) {
			t.Errorf("%s: it said %q, want %q", c.args, stderr, c.want)
		}
		if _, err := os.Stat(file); err == nil {
			t.Errorf("%s: the job was run", c.args)
		}
		if _, stderr := (call{args: append([]string{"push", "--job=j"}, args...)}).want(t, codeBadInput); !strings.Contains(stderr, c.want) {
			t.Errorf("%s: it said %q, want %q", c.args, stderr, c.want)
		}
	}
}

// TestPushCredentialsStay: they are read again for each try, and go to nobody else when
// the endpoint points elsewhere, nor to the same host without TLS.
func TestPushCredentialsStay(t *testing.T) {
	t.Parallel()
	tokenFile := writeFile(t, "token", "first\n")
	seen := make(chan string, 10)
	other := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { seen <- "other " + r.Header.Get("Authorization") }))
	defer other.Close()
	// Of another host, for what decides where credentials may go.
	elsewhere := strings.Replace(other.URL, "127.0.0.1", "localhost", 1)
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		token := r.Header.Get("Authorization")
		seen <- token
		switch {
		case r.TLS != nil:
			http.Redirect(w, r, other.URL, http.StatusTemporaryRedirect)
		case token == "Bearer first":
			if err := os.WriteFile(tokenFile, []byte("second\n"), 0o600); err != nil {
				t.Error(err)
			}
			http.Error(w, "later", http.StatusServiceUnavailable)
		default:
			http.Redirect(w, r, elsewhere, http.StatusTemporaryRedirect)
		}
	})
	endpoint, secured := httptest.NewServer(handler), httptest.NewTLSServer(handler)
	defer endpoint.Close()
	defer secured.Close()
	ca := writeFile(t, "ca.pem", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: secured.Certificate().Raw})))
	push := func(url string, code int, want ...string) {
		t.Helper()
		call{args: []string{"push", "--job=j", "--token-file=" + tokenFile, "--tls.cacert=" + ca, "--push-url=" + url}, stdin: "a 1\n"}.want(t, code)
		for _, want := range want {
			if got := <-seen; got != want {
				t.Errorf("it showed %q, want %q", got, want)
			}
		}
		if len(seen) > 0 {
			t.Errorf("it showed %q too", <-seen)
		}
	}
	push(endpoint.URL, 0, "Bearer first", "Bearer second", "other ")
	push(secured.URL, codeRefused, "Bearer second")
}
