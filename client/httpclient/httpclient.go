// Package httpclient reads the settings of HTTP clients that Prometheus documents as
// http_config (https://prometheus.io/docs/prometheus/latest/configuration/configuration/#http_config),
// and makes transports of them.
//
// github.com/prometheus/common/config does the same, and more. It brings html/template
// and other packages along that the agent has no use for. TestLikePrometheus compares
// with it.
package httpclient

import (
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Config is a http_config. At most one of BasicAuth, Authorization, OAuth2,
// BearerToken and BearerTokenFile can be there. Files are read for each request, and
// those of TLS are used from the next request on when they have changed.
//
// References to a secret manager, as in password_ref, are not there: there is none.
type Config struct {
	BasicAuth     *BasicAuth     `yaml:"basic_auth"`
	Authorization *Authorization `yaml:"authorization"`
	OAuth2        *OAuth2        `yaml:"oauth2"`
	// BearerToken and BearerTokenFile are the old form of Authorization.
	BearerToken     Secret    `yaml:"bearer_token"`
	BearerTokenFile string    `yaml:"bearer_token_file"`
	TLSConfig       TLSConfig `yaml:"tls_config"`
	// FollowRedirects is for who sends the requests: a transport follows none.
	FollowRedirects bool `yaml:"follow_redirects"`
	// EnableHTTP2 is taken, and does nothing: the transports speak HTTP/1.1.
	EnableHTTP2 bool `yaml:"enable_http2"`
	Proxy       `yaml:",inline"`
	// HTTPHeaders are added to those of a request, by name.
	HTTPHeaders map[string]Header `yaml:"http_headers"`
}

// DefaultConfig is what holds where nothing is set.
var DefaultConfig = Config{FollowRedirects: true, EnableHTTP2: true}

// Secret is text that should not be shown.
type Secret string

// String hides the secret from logs and errors.
func (s Secret) String() string {
	if s == "" {
		return ""
	}
	return "<secret>"
}

// BasicAuth is a user's name and password, each as text or in a file.
type BasicAuth struct {
	Username     string `yaml:"username"`
	UsernameFile string `yaml:"username_file"`
	Password     Secret `yaml:"password"`
	PasswordFile string `yaml:"password_file"`
}

// Authorization is what stands in the header field Authorization: a type, Bearer
// where none is set, and credentials as text or in a file.
type Authorization struct {
	Type            string `yaml:"type"`
	Credentials     Secret `yaml:"credentials"`
	CredentialsFile string `yaml:"credentials_file"`
}

// Header is a header field with one or more values.
type Header struct {
	Values  []string `yaml:"values"`
	Secrets []Secret `yaml:"secrets"`
	Files   []string `yaml:"files"`
}

// Proxy is the HTTP proxy to use.
type Proxy struct {
	ProxyURL URL `yaml:"proxy_url"`
	// NoProxy lists, in the form of the environment variable NO_PROXY, what is
	// reached without ProxyURL.
	NoProxy string `yaml:"no_proxy"`
	// ProxyFromEnvironment has HTTP_PROXY, HTTPS_PROXY and NO_PROXY instead.
	ProxyFromEnvironment bool                `yaml:"proxy_from_environment"`
	ProxyConnectHeader   map[string][]Secret `yaml:"proxy_connect_header"`
}

// URL is a URL that is read when the configuration is. It is nil where none is set.
type URL struct{ *url.URL }

// UnmarshalYAML reads a URL from text.
func (u *URL) UnmarshalYAML(unmarshal func(any) error) error {
	var text string
	if err := unmarshal(&text); err != nil {
		return err
	}
	if u.URL = nil; text == "" {
		return nil
	}
	parsed, err := url.Parse(text)
	if err != nil {
		var reason *url.Error
		if errors.As(err, &reason) {
			err = reason.Err // the whole error would repeat a password
		}
		return fmt.Errorf("proxy_url: %w", err)
	}
	u.URL = parsed
	return nil
}

// reservedHeaders are the connection's, or have settings of their own, or are
// Prometheus's.
var reservedHeaders = []string{
	"Authorization", "Host", "Content-Encoding", "Content-Length", "Content-Type", "User-Agent", "Connection", "Keep-Alive",
	"Proxy-Authenticate", "Proxy-Authorization", "Www-Authenticate", "Accept-Encoding",
	"X-Prometheus-Remote-Write-Version", "X-Prometheus-Remote-Read-Version", "X-Prometheus-Scrape-Timeout-Seconds",
	"X-Amz-Date", "X-Amz-Security-Token", "X-Amz-Content-Sha256",
}

// Validate says what settings exclude each other, or miss another one. It turns the
// old form of Authorization into the new one. The files need not be there.
func (c *Config) Validate() error {
	if c.BearerToken != "" && c.BearerTokenFile != "" {
		return errors.New("bearer_token and bearer_token_file are both set; leave one away")
	}
	var ways []string
	for _, way := range []struct {
		name string
		set  bool
	}{
		{"basic_auth", c.BasicAuth != nil},
		{"authorization", c.Authorization != nil},
		{"oauth2", c.OAuth2 != nil},
		{"bearer_token", c.BearerToken != ""},
		{"bearer_token_file", c.BearerTokenFile != ""},
	} {
		if way.set {
			ways = append(ways, way.name)
		}
	}
	if len(ways) > 1 {
		return fmt.Errorf("at most one of basic_auth, authorization, oauth2, bearer_token and bearer_token_file can be set, not %s", strings.Join(ways, " and "))
	}
	if b := c.BasicAuth; b != nil {
		if b.Username != "" && b.UsernameFile != "" {
			return errors.New("basic_auth: username and username_file are both set; leave one away")
		}
		if b.Password != "" && b.PasswordFile != "" {
			return errors.New("basic_auth: password and password_file are both set; leave one away")
		}
	}
	if c.BearerToken != "" || c.BearerTokenFile != "" {
		c.Authorization = &Authorization{Credentials: c.BearerToken, CredentialsFile: c.BearerTokenFile}
		c.BearerToken, c.BearerTokenFile = "", ""
	}
	if a := c.Authorization; a != nil {
		if a.Credentials != "" && a.CredentialsFile != "" {
			return errors.New("authorization: credentials and credentials_file are both set; leave one away")
		}
		if a.Type = strings.TrimSpace(a.Type); a.Type == "" {
			a.Type = "Bearer"
		}
		if strings.EqualFold(a.Type, "basic") {
			return errors.New(`authorization: the type can't be "basic"; use basic_auth`)
		}
	}
	if c.OAuth2 != nil {
		if err := c.OAuth2.validate(); err != nil {
			return fmt.Errorf("oauth2: %w", err)
		}
	}
	if err := c.TLSConfig.Validate(); err != nil {
		return fmt.Errorf("tls_config: %w", err)
	}
	for name := range c.HTTPHeaders {
		if slices.Contains(reservedHeaders, http.CanonicalHeaderKey(name)) {
			return fmt.Errorf("http_headers: %s can't be set here", http.CanonicalHeaderKey(name))
		}
	}
	return c.Proxy.validate()
}

func (p *Proxy) validate() error {
	switch {
	case p.ProxyFromEnvironment && p.ProxyURL.URL != nil:
		return errors.New("proxy_from_environment and proxy_url are both set; leave one away")
	case p.ProxyFromEnvironment && p.NoProxy != "":
		return errors.New("proxy_from_environment and no_proxy are both set; leave one away")
	case p.ProxyURL.URL == nil && p.NoProxy != "":
		return errors.New("no_proxy is set, and proxy_url is not; set it as well")
	case p.ProxyURL.URL == nil && !p.ProxyFromEnvironment && len(p.ProxyConnectHeader) > 0:
		return errors.New("proxy_connect_header is set, and neither proxy_url nor proxy_from_environment is; set one of them")
	}
	return nil
}

func (p *Proxy) connectHeader() http.Header {
	if p.ProxyConnectHeader == nil {
		return nil
	}
	header := http.Header{}
	for name, values := range p.ProxyConnectHeader {
		for _, v := range values {
			header[name] = append(header[name], string(v))
		}
	}
	return header
}

// SetDirectory has relative names of files count from dir.
func (c *Config) SetDirectory(dir string) {
	names := []*string{&c.BearerTokenFile}
	if b := c.BasicAuth; b != nil {
		names = append(names, &b.UsernameFile, &b.PasswordFile)
	}
	if a := c.Authorization; a != nil {
		names = append(names, &a.CredentialsFile)
	}
	if o := c.OAuth2; o != nil {
		names = append(names, &o.ClientSecretFile, &o.ClientCertificateKeyFile)
		o.TLSConfig.SetDirectory(dir)
	}
	for _, h := range c.HTTPHeaders {
		for i := range h.Files {
			names = append(names, &h.Files[i])
		}
	}
	for _, name := range names {
		*name = JoinDir(dir, *name)
	}
	c.TLSConfig.SetDirectory(dir)
}

// JoinDir returns the path as seen from dir. One that is empty or absolute stays.
func JoinDir(dir, path string) string {
	if path == "" || filepath.IsAbs(path) {
		return path
	}
	return filepath.Join(dir, path)
}

// read returns what is set as text or is in the file now, without blanks around it.
// It is empty where neither is set.
func read(text, file string) (string, error) {
	if file == "" {
		return text, nil
	}
	content, err := os.ReadFile(file)
	return strings.TrimSpace(string(content)), err
}
