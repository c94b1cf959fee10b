package httpclient_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/golang-jwt/jwt/v5"
	"github.com/prometheus/common/config"
	"go.yaml.in/yaml/v2"

	"github.com/culvert-io/culvert/client/httpclient"
)

// read reads settings as the agent's file does: strictly, with the defaults set.
func read(text, dir string) (httpclient.Config, error) {
	target := struct {
		httpclient.Config `yaml:",inline"`
	}{httpclient.DefaultConfig}
	if err := yaml.UnmarshalStrict([]byte(text), &target); err != nil {
		return target.Config, err
	}
	target.SetDirectory(dir)
	return target.Config, target.Validate()
}

// servers are a target over http and https, an HTTP proxy and a server for tokens.
// They note what they are asked.
type servers struct {
	target, secured, forward, tokens *httptest.Server

	mu    sync.Mutex // protects the following
	asked []string
}

func newServers(t *testing.T) *servers {
	s := new(servers)
	note := func(who string, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		if who == "tokens" {
			// What is random in an assertion is not told.
			if _, assertion, ok := strings.Cut(string(body), "assertion="); ok {
				assertion, _, _ = strings.Cut(assertion, "&")
				token, _, err := jwt.NewParser().ParseUnverified(assertion, jwt.MapClaims{})
				if err != nil {
					t.Error(err)
					return
				}
				claims := token.Claims.(jwt.MapClaims)
				if claims["jti"] == "" || claims["exp"].(float64)-claims["iat"].(float64) != 600 {
					t.Errorf("claims %v", claims)
				}
				delete(claims, "jti")
				delete(claims, "iat")
				delete(claims, "exp")
				body = []byte(strings.Replace(string(body), assertion, fmt.Sprint(token.Header, claims), 1))
				r.Header.Del("Content-Length")
			}
		}
		var header []string
		for _, name := range slices.Sorted(maps.Keys(r.Header)) {
			header = append(header, fmt.Sprintf("%s: %q", name, r.Header[name]))
		}
		certificates := 0
		if r.TLS != nil {
			certificates = len(r.TLS.PeerCertificates)
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		s.asked = append(s.asked, fmt.Sprintf("%s %s %s %s %v %s certificates %d", who, r.Method, r.URL.Path, r.Proto, header, body, certificates))
	}
	handler := func(who, answer string) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			note(who, r)
			w.Header().Set("Content-Type", "application/json")
			io.WriteString(w, answer)
		})
	}
	s.target = httptest.NewServer(handler("target", "ok"))
	s.forward = httptest.NewServer(handler("proxy", "ok"))
	s.tokens = httptest.NewServer(handler("tokens", `{"access_token":"the-token","token_type":"bearer","expires_in":3600}`))
	s.secured = httptest.NewUnstartedServer(handler("secured", "ok"))
	s.secured.Config.ErrorLog = log.New(io.Discard, "", 0) // of handshakes that should fail
	s.secured.StartTLS()
	for _, server := range []*httptest.Server{s.target, s.forward, s.tokens, s.secured} {
		t.Cleanup(server.Close)
	}
	return s
}

// ask sends a request, and returns what came of it and what the servers were asked.
func (s *servers) ask(rt http.RoundTripper, url string) string {
	r, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		return err.Error()
	}
	r.Header.Set("User-Agent", "Prometheus/3")
	r.Header.Set("X-Mine", "scraper")
	s.mu.Lock()
	s.asked = nil
	s.mu.Unlock()
	resp, err := rt.RoundTrip(r)
	s.mu.Lock()
	asked := strings.Join(s.asked, "\n")
	s.mu.Unlock()
	if err != nil {
		return asked + "\nan error"
	}
	defer resp.Body.Close()
	body, _ := io.ReadAll(resp.Body)
	return fmt.Sprintf("%s\n%s: %s", asked, resp.Status, body)
}

// TestLikePrometheus compares with Prometheus's own package: what settings are
// refused, and what requests look like with the others.
func TestLikePrometheus(t *testing.T) {
	s := newServers(t)
	dir := t.TempDir()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	curve, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ec, err := x509.MarshalPKCS8PrivateKey(curve)
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{
		"pkcs8.pem":  string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})),
		"ec.pem":     string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: ec})),
		"broken.pem": string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte("x")})),
		"user":       "joe\n", "password": " from file\n", "empty": "",
		"ca.pem":  string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.secured.Certificate().Raw})),
		"rsa.pem": string(pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)})),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	tokenURL := ", token_url: " + s.tokens.URL + "/token"
	for _, text := range []string{
		"",
		"basic_auth: {username: joe, password: secret}",
		"basic_auth: {}",
		"basic_auth: {username: joe}",
		"basic_auth: {username_file: user, password_file: password}",
		"basic_auth: {username_file: nowhere, password_file: password}",
		"basic_auth: {username: joe, password_file: nowhere}",
		"basic_auth: {username: a, username_file: user}",
		"basic_auth: {password: a, password_file: password}",
		"basic_auth: {name: joe}",
		"basic_auth: {username: joe}\nauthorization: {credentials: x}",
		"basic_auth: {username: joe}\nbearer_token: x",
		"authorization: {credentials: x}",
		"authorization: {}",
		"authorization: {type: ' Token ', credentials_file: password}",
		"authorization: {type: Basic, credentials: x}",
		"authorization: {credentials: x, credentials_file: password}",
		"authorization: {credentials_file: nowhere}",
		"bearer_token: x",
		"bearer_token_file: password",
		"bearer_token: x\nbearer_token_file: password",
		"bearer_token: x\nauthorization: {credentials: y}",
		"http_headers: {x-mine: {values: [a, b], secrets: [c], files: [password, user]}, X-Other: {}}",
		"http_headers: {X-Mine: {files: [nowhere]}}",
		"http_headers: {authorization: {values: [a]}}",
		"http_headers: {X-PROMETHEUS-scrape-timeout-seconds: {values: [a]}}",
		"http_headers: {X-Mine: {value: [a]}}",
		"proxy_url: " + s.forward.URL,
		"proxy_url: " + strings.Replace(s.forward.URL, "://", "://joe:secret@", 1),
		"proxy_url: ''",
		"proxy_url: 'http://a b'",
		"proxy_url: " + s.forward.URL + "\nproxy_connect_header: {X-Secret: [a, b]}",
		"proxy_url: " + s.forward.URL + "\nno_proxy: 127.0.0.0/8",
		"proxy_url: " + s.forward.URL + "\nno_proxy: example.com",
		"proxy_from_environment: true",
		"proxy_from_environment: true\nproxy_url: " + s.forward.URL,
		"proxy_from_environment: true\nno_proxy: a",
		"no_proxy: a",
		"proxy_connect_header: {X-Secret: [a]}",
		"follow_redirects: false\nenable_http2: false",
		"follow_redirects: maybe",
		"tls_config: {insecure_skip_verify: true}",
		"tls_config: {ca_file: ca.pem, server_name: example.com, min_version: TLS12, max_version: TLS13}",
		"tls_config: {ca_file: ca.pem, server_name: elsewhere.example.net}",
		"tls_config: {ca_file: ca.pem, max_version: TLS11}",
		"tls_config: {ca_file: nowhere}",
		"tls_config: {ca_file: empty}",
		"tls_config: {ca: none}",
		"tls_config: {ca: none, ca_file: ca.pem}",
		"tls_config: {cert_file: ca.pem}",
		"tls_config: {key: x}",
		"tls_config: {cert_file: ca.pem, key_file: rsa.pem}",
		"tls_config: {cert: a, cert_file: ca.pem, key: x}",
		"tls_config: {cert: a, key: x, key_file: rsa.pem}",
		"tls_config: {min_version: TLS9}",
		"tls_config: {min_version: TLS13, max_version: TLS12}",
		"oauth2: {client_id: me, client_secret: x" + tokenURL + "}",
		"oauth2: {client_id: me, client_secret_file: password, scopes: [a, b], endpoint_params: {p: q}" + tokenURL + "}",
		"oauth2: {client_id: me, client_secret: x, endpoint_params: {grant_type: other}" + tokenURL + "}",
		"oauth2: {client_id: me, client_secret: x, scopes: [a], endpoint_params: {scope: other}" + tokenURL + "}",
		"oauth2: {client_id: me" + tokenURL + "}",
		"oauth2: {client_id: me, client_secret: x, client_secret_file: password" + tokenURL + "}",
		"oauth2: {client_secret: x" + tokenURL + "}",
		"oauth2: {client_id: me, client_secret: x}",
		"oauth2: {client_id: me, client_secret_file: nowhere" + tokenURL + "}",
		"oauth2: {client_id: me, client_secret: x, token_url: http://127.0.0.1:1/}",
		"oauth2: {client_id: me, client_secret: x" + tokenURL + ", proxy_url: " + s.forward.URL + "}",
		"oauth2: {client_id: me, client_secret: x" + tokenURL + ", no_proxy: a}",
		"oauth2: {client_id: me, client_secret: x" + tokenURL + ", tls_config: {ca: a, ca_file: ca.pem}}",
		"oauth2: {client_id: me, client_secret: x" + tokenURL + "}\nbasic_auth: {username: joe}",
		"oauth2: {client_id: me, client_secret: x" + tokenURL + "}\nauthorization: {credentials: x}",
		"oauth2: {client_id: me, client_secret: x" + tokenURL + "}\nbearer_token: x",
		"oauth2: {client_id: me, client_secret: x" + tokenURL + "}\nhttp_headers: {X-Mine: {values: [a]}}",
		"oauth2: {grant_type: 'urn:ietf:params:oauth:grant-type:jwt-bearer', client_id: me, client_certificate_key_file: DIR/rsa.pem" + tokenURL + "}",
		"oauth2: {grant_type: 'urn:ietf:params:oauth:grant-type:jwt-bearer', client_id: me, client_certificate_key_file: DIR/rsa.pem, client_certificate_key_id: k, signature_algorithm: RS512, iss: i, audience: au, claims: {c: d}, scopes: [a, b], endpoint_params: {p: q}" + tokenURL + "}",
		"oauth2: {grant_type: 'urn:ietf:params:oauth:grant-type:jwt-bearer', client_id: me, client_certificate_key: none" + tokenURL + "}",
		"oauth2: {grant_type: 'urn:ietf:params:oauth:grant-type:jwt-bearer', client_id: me, client_certificate_key_file: DIR/pkcs8.pem, signature_algorithm: RS384, claims: {iss: j, exp: 1, iat: -599, n: 1.5, list: [a, '<&>']}" + tokenURL + "}",
		"oauth2: {grant_type: 'urn:ietf:params:oauth:grant-type:jwt-bearer', client_id: me, client_certificate_key_file: DIR/rsa.pem, claims: {nested: {a: b}}" + tokenURL + "}",
		"oauth2: {grant_type: 'urn:ietf:params:oauth:grant-type:jwt-bearer', client_id: me, client_certificate_key_file: DIR/ec.pem" + tokenURL + "}",
		"oauth2: {grant_type: 'urn:ietf:params:oauth:grant-type:jwt-bearer', client_id: me, client_certificate_key_file: DIR/broken.pem" + tokenURL + "}",
		"oauth2: {grant_type: 'urn:ietf:params:oauth:grant-type:jwt-bearer', client_id: me, client_certificate_key_file: DIR/rsa.pem, endpoint_params: {assertion: x}" + tokenURL + "}",
		"oauth2: {grant_type: 'urn:ietf:params:oauth:grant-type:jwt-bearer', client_id: me, signature_algorithm: HS256, client_certificate_key: x" + tokenURL + "}",
		"oauth2: {grant_type: 'urn:ietf:params:oauth:grant-type:jwt-bearer', client_id: me, client_certificate_key: x, client_certificate_key_file: DIR/rsa.pem" + tokenURL + "}",
		"oauth3: {}",
	} {
		text = strings.ReplaceAll(text, "DIR", dir)
		var theirs http.RoundTripper
		want, wantErr := config.LoadHTTPConfig(text)
		if wantErr == nil {
			if text == "" {
				*want = config.DefaultHTTPClientConfig
			}
			want.SetDirectory(dir)
			theirs, wantErr = config.NewRoundTripperFromConfig(*want, "test", config.WithHTTP2Disabled())
		}
		var ours *httpclient.Transport
		got, err := read(text, dir)
		if err == nil {
			if ours, err = httpclient.NewTransport(got, new(net.Dialer).DialContext); err == nil {
				t.Cleanup(ours.CloseIdleConnections)
			}
		}
		if (err == nil) != (wantErr == nil) {
			t.Errorf("%s\ngot the error %v, Prometheus's is %v", text, err, wantErr)
			continue
		}
		if err != nil {
			continue
		}
		if got.FollowRedirects != want.FollowRedirects {
			t.Errorf("%s\ngot follow_redirects %v", text, got.FollowRedirects)
		}
		for _, url := range []string{s.target.URL + "/metrics", s.secured.URL + "/metrics"} {
			if got, want := s.ask(ours, url), s.ask(theirs, url); got != want {
				t.Errorf("%s\n%s: got\n%s\nPrometheus's is\n%s", text, url, got, want)
			}
		}
		theirs.(interface{ CloseIdleConnections() }).CloseIdleConnections()
	}
}

// TestFilesChange: credentials, CA and secrets are those of now.
func TestFilesChange(t *testing.T) {
	s := newServers(t)
	dir := t.TempDir()
	write := func(name, content string) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	ca := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.secured.Certificate().Raw}))
	other := httptest.NewTLSServer(http.NotFoundHandler())
	defer other.Close()
	otherCA := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: other.Certificate().Raw}))
	write("ca.pem", ca)
	write("secret", "one")
	c, err := read("tls_config: {ca_file: ca.pem}\noauth2: {client_id: me, client_secret_file: secret, token_url: "+s.tokens.URL+"}", dir)
	if err != nil {
		t.Fatal(err)
	}
	transport, err := httpclient.NewTransport(c, new(net.Dialer).DialContext)
	if err != nil {
		t.Fatal(err)
	}
	defer transport.CloseIdleConnections()
	for _, step := range []struct {
		file, content, answer string
		tokens                bool
	}{
		{"secret", "one", "200 OK", true},
		{"secret", "one\n", "200 OK", false},
		{"secret", "two", "200 OK", true},
		{"ca.pem", "none", "an error", false},
		{"ca.pem", ca, "200 OK", false},
		{"secret", "two", "200 OK", false},
		{"ca.pem", ca + otherCA, "200 OK", false},
	} {
		write(step.file, step.content)
		got := s.ask(transport, s.secured.URL)
		if !strings.Contains(got, step.answer) || strings.Contains(got, "tokens POST") != step.tokens {
			t.Errorf("with %q in %s: got\n%s\nwant %s, asking for a token: %v", step.content, step.file, got, step.answer, step.tokens)
		}
	}
}

// TestAssertionIsSigned checks the signature of an assertion with the key.
func TestAssertionIsSigned(t *testing.T) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	s := newServers(t)
	for algorithm, block := range map[string]*pem.Block{
		"RS256": {Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)},
		"RS384": {Type: "PRIVATE KEY", Bytes: pkcs8},
		"RS512": {Type: "PRIVATE KEY", Bytes: pkcs8},
	} {
		tokens := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			_, err := jwt.Parse(r.PostFormValue("assertion"), func(*jwt.Token) (any, error) { return &key.PublicKey, nil }, jwt.WithValidMethods([]string{algorithm}))
			if err != nil {
				http.Error(w, err.Error(), http.StatusBadRequest)
				return
			}
			w.Header().Set("Content-Type", "application/json")
			io.WriteString(w, `{"access_token":"`+algorithm+`","token_type":"bearer"}`)
		}))
		defer tokens.Close()
		c := httpclient.DefaultConfig
		c.OAuth2 = &httpclient.OAuth2{
			ClientID: "me", GrantType: "urn:ietf:params:oauth:grant-type:jwt-bearer", SignatureAlgorithm: algorithm, TokenURL: tokens.URL,
			ClientCertificateKey: httpclient.Secret(pem.EncodeToMemory(block)),
		}
		transport, err := httpclient.NewTransport(c, new(net.Dialer).DialContext)
		if err != nil {
			t.Fatal(err)
		}
		defer transport.CloseIdleConnections()
		if got := s.ask(transport, s.target.URL); !strings.Contains(got, `Authorization: ["Bearer `+algorithm+`"]`) {
			t.Error(got)
		}
	}
}

// TestTokenTakesNoLonger: a request ends with its context, whoever else waits for the
// server of tokens.
func TestTokenTakesNoLonger(t *testing.T) {
	asked, end := make(chan struct{}), make(chan struct{})
	tokens := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked <- struct{}{}
		<-end
	}))
	defer tokens.Close()
	defer close(end)
	c := httpclient.DefaultConfig
	c.OAuth2 = &httpclient.OAuth2{ClientID: "me", ClientSecret: "x", TokenURL: tokens.URL}
	transport, err := httpclient.NewTransport(c, new(net.Dialer).DialContext)
	if err != nil {
		t.Fatal(err)
	}
	defer transport.CloseIdleConnections()
	send := func(ctx context.Context) chan error {
		done := make(chan error, 1)
		r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://127.0.0.1:1/", nil)
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			_, err := transport.RoundTrip(r)
			done <- err
		}()
		return done
	}
	first, endFirst := context.WithCancel(t.Context())
	defer endFirst()
	firstDone := send(first)
	<-asked
	second, endSecond := context.WithCancel(t.Context())
	endSecond()
	if err := <-send(second); !errors.Is(err, context.Canceled) {
		t.Errorf("the second request got %v", err)
	}
	endFirst()
	if err := <-firstDone; !errors.Is(err, context.Canceled) {
		t.Errorf("the first request got %v", err)
	}
}
