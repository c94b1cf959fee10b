package httpclient

import (
	"cmp"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
)

// TLSConfig is a tls_config. CA, certificate and key are PEM, each as text or in a
// file.
type TLSConfig struct {
	CA                 string     `yaml:"ca"`
	Cert               string     `yaml:"cert"`
	Key                Secret     `yaml:"key"`
	CAFile             string     `yaml:"ca_file"`
	CertFile           string     `yaml:"cert_file"`
	KeyFile            string     `yaml:"key_file"`
	ServerName         string     `yaml:"server_name"`
	InsecureSkipVerify bool       `yaml:"insecure_skip_verify"`
	MinVersion         TLSVersion `yaml:"min_version"`
	MaxVersion         TLSVersion `yaml:"max_version"`
}

// TLSVersion is a version of TLS, in YAML TLS10 to TLS13.
type TLSVersion uint16

// UnmarshalYAML reads the name of a version.
func (v *TLSVersion) UnmarshalYAML(unmarshal func(any) error) error {
	var name string
	if err := unmarshal(&name); err != nil {
		return err
	}
	version, known := map[string]TLSVersion{"TLS10": tls.VersionTLS10, "TLS11": tls.VersionTLS11, "TLS12": tls.VersionTLS12, "TLS13": tls.VersionTLS13}[name]
	if !known {
		return fmt.Errorf("%q is no TLS version; use TLS10, TLS11, TLS12 or TLS13", name)
	}
	*v = version
	return nil
}

// SetDirectory has relative names of files count from dir.
func (c *TLSConfig) SetDirectory(dir string) {
	c.CAFile, c.CertFile, c.KeyFile = JoinDir(dir, c.CAFile), JoinDir(dir, c.CertFile), JoinDir(dir, c.KeyFile)
}

// Validate says what settings exclude each other, or miss another one. The files need
// not be there.
func (c *TLSConfig) Validate() error {
	cert, key := cmp.Or(c.Cert, c.CertFile) != "", cmp.Or(string(c.Key), c.KeyFile) != ""
	switch {
	case c.CA != "" && c.CAFile != "":
		return errors.New("ca and ca_file are both set; leave one away")
	case c.Cert != "" && c.CertFile != "":
		return errors.New("cert and cert_file are both set; leave one away")
	case c.Key != "" && c.KeyFile != "":
		return errors.New("key and key_file are both set; leave one away")
	case cert && !key:
		return errors.New("the client certificate has no key; set key or key_file")
	case key && !cert:
		return errors.New("the key has no client certificate; set cert or cert_file")
	case c.MinVersion != 0 && c.MaxVersion != 0 && c.MaxVersion < c.MinVersion:
		return errors.New("max_version is below min_version")
	}
	return nil
}

// New returns what the settings mean, with the CA of now. The client's certificate is
// read again for each handshake.
func (c *TLSConfig) New() (*tls.Config, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	config := &tls.Config{
		ServerName: c.ServerName, InsecureSkipVerify: c.InsecureSkipVerify,
		MinVersion: uint16(c.MinVersion), MaxVersion: uint16(c.MaxVersion),
	}
	if c.CA != "" || c.CAFile != "" {
		ca, err := read(c.CA, c.CAFile)
		if err != nil {
			return nil, fmt.Errorf("CA certificate: %w", err)
		}
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM([]byte(ca)) {
			return nil, fmt.Errorf("CA certificate: there is none in PEM in %s", cmp.Or(c.CAFile, "what is set as ca"))
		}
	}
	if c.Cert == "" && c.CertFile == "" {
		return config, nil
	}
	load := func() (*tls.Certificate, error) {
		cert, err := read(c.Cert, c.CertFile)
		if err != nil {
			return nil, fmt.Errorf("client certificate: %w", err)
		}
		key, err := read(string(c.Key), c.KeyFile)
		if err != nil {
			return nil, fmt.Errorf("key of the client certificate: %w", err)
		}
		pair, err := tls.X509KeyPair([]byte(cert), []byte(key))
		if err != nil {
			return nil, fmt.Errorf("client certificate %s with key %s: %w", cmp.Or(c.CertFile, "as set"), cmp.Or(c.KeyFile, "as set"), err)
		}
		return &pair, nil
	}
	if _, err := load(); err != nil {
		return nil, err
	}
	config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return load() }
	return config, nil
}
