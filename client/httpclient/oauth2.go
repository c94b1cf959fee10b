package httpclient

import (
	"cmp"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	_ "crypto/sha512" // RS384 and RS512
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"strings"
	"time"

	"golang.org/x/oauth2"
	"golang.org/x/oauth2/clientcredentials"
)

// OAuth2 fetches tokens, with the grant client_credentials (RFC 6749, 4.4) or with
// assertions that it signs (RFC 7523, 2.1).
type OAuth2 struct {
	ClientID         string `yaml:"client_id"`
	ClientSecret     Secret `yaml:"client_secret"`
	ClientSecretFile string `yaml:"client_secret_file"`
	// ClientCertificateKey is the RSA key in PEM that signs assertions.
	ClientCertificateKeyID   string `yaml:"client_certificate_key_id"`
	ClientCertificateKey     Secret `yaml:"client_certificate_key"`
	ClientCertificateKeyFile string `yaml:"client_certificate_key_file"`
	// GrantType other than urn:ietf:params:oauth:grant-type:jwt-bearer means
	// client_credentials.
	GrantType string `yaml:"grant_type"`
	// SignatureAlgorithm is RS256, the default, RS384 or RS512.
	SignatureAlgorithm string `yaml:"signature_algorithm"`
	// Iss is who issues assertions: ClientID where it is empty.
	Iss string `yaml:"iss"`
	// Audience is whom they are for: TokenURL where it is empty.
	Audience string `yaml:"audience"`
	// Claims are further ones in them.
	Claims         map[string]any    `yaml:"claims"`
	Scopes         []string          `yaml:"scopes"`
	TokenURL       string            `yaml:"token_url"`
	EndpointParams map[string]string `yaml:"endpoint_params"`
	TLSConfig      TLSConfig         `yaml:"tls_config"`
	Proxy          `yaml:",inline"`
}

const (
	grantJWTBearer = "urn:ietf:params:oauth:grant-type:jwt-bearer"
	// tokenTimeout bounds the request for a token, as the timeout of the scrape does.
	tokenTimeout = 30 * time.Second
	// assertionLifetime is how long the server may take an assertion.
	assertionLifetime = 10 * time.Minute
)

// signatureHashes are what is signed, by the algorithm (RFC 7518, 3.3).
var signatureHashes = map[string]crypto.Hash{"RS256": crypto.SHA256, "RS384": crypto.SHA384, "RS512": crypto.SHA512}

func (o *OAuth2) validate() error {
	switch {
	case o.ClientID == "":
		return errors.New("client_id is missing")
	case o.TokenURL == "":
		return errors.New("token_url is missing")
	case o.GrantType == grantJWTBearer && o.ClientCertificateKey != "" && o.ClientCertificateKeyFile != "":
		return errors.New("client_certificate_key and client_certificate_key_file are both set; leave one away")
	case o.GrantType == grantJWTBearer && o.SignatureAlgorithm != "" && signatureHashes[o.SignatureAlgorithm] == 0:
		return fmt.Errorf("signature_algorithm %q is not known; use RS256, RS384 or RS512", o.SignatureAlgorithm)
	case o.GrantType != grantJWTBearer && o.ClientSecret != "" && o.ClientSecretFile != "":
		return errors.New("client_secret and client_secret_file are both set; leave one away")
	}
	if err := o.TLSConfig.Validate(); err != nil {
		return fmt.Errorf("tls_config: %w", err)
	}
	return o.Proxy.validate()
}

// tokens has a token, and fetches a new one when that expires or the secret changes.
type tokens struct {
	settings *OAuth2
	base     *reloading

	turn   chan struct{} // has one entry while somebody uses the following
	last   *oauth2.Token
	secret string // that last was fetched with
}

func newTokens(o *OAuth2, dial Dial) *tokens {
	return &tokens{settings: o, turn: make(chan struct{}, 1), base: &reloading{settings: &o.TLSConfig, transport: http.Transport{
		DialContext:           dial,
		Proxy:                 o.Proxy.function(),
		ProxyConnectHeader:    o.Proxy.connectHeader(),
		MaxIdleConns:          20,
		MaxIdleConnsPerHost:   1,
		IdleConnTimeout:       10 * time.Second,
		TLSHandshakeTimeout:   10 * time.Second,
		ExpectContinueTimeout: time.Second,
	}}}
}

// token returns a token that has not expired. It fetches one in the time that ctx
// leaves; the server sees userAgent.
func (t *tokens) token(ctx context.Context, userAgent string) (*oauth2.Token, error) {
	select {
	case t.turn <- struct{}{}:
		defer func() { <-t.turn }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	o := t.settings
	text, file := o.ClientSecret, o.ClientSecretFile
	if o.GrantType == grantJWTBearer {
		text, file = o.ClientCertificateKey, o.ClientCertificateKeyFile
	}
	secret, err := read(string(text), file)
	if err != nil {
		return nil, fmt.Errorf("client secret: %w", err)
	}
	if t.last.Valid() && secret == t.secret {
		return t.last, nil
	}
	grant := &clientcredentials.Config{Scopes: o.Scopes, TokenURL: o.TokenURL, EndpointParams: url.Values{}}
	for name, value := range o.EndpointParams {
		grant.EndpointParams.Set(name, value)
	}
	if o.GrantType == grantJWTBearer {
		// The grants differ in their parameters only. Without a client's ID none is sent.
		grant.AuthStyle = oauth2.AuthStyleInParams
		if err := o.addAssertion(grant.EndpointParams, secret); err != nil {
			return nil, err
		}
	} else {
		grant.ClientID, grant.ClientSecret = o.ClientID, secret
	}
	ctx, cancel := context.WithTimeout(ctx, tokenTimeout)
	defer cancel()
	token, err := grant.Token(context.WithValue(ctx, oauth2.HTTPClient, &http.Client{Transport: tokenTransport{t.base, userAgent}}))
	if err != nil {
		return nil, err
	}
	t.last, t.secret = token, secret
	return token, nil
}

// addAssertion adds what a token is asked for with, signed with the key.
func (o *OAuth2) addAssertion(params url.Values, text string) error {
	if params.Has("assertion") {
		return errors.New(`endpoint_params: "assertion" is what the grant sends; remove it`)
	}
	key, err := parseKey(text)
	if err != nil {
		return fmt.Errorf("client_certificate_key: %w", err)
	}
	now := time.Now()
	claims := map[string]any{
		"iss": cmp.Or(o.Iss, o.ClientID), "sub": o.ClientID, "aud": cmp.Or(o.Audience, o.TokenURL), "jti": rand.Text(),
		"iat": now.Unix(), "exp": now.Add(assertionLifetime).Unix(),
	}
	if len(o.Scopes) > 0 {
		claims["scope"] = strings.Join(o.Scopes, " ")
	}
	maps.Copy(claims, o.Claims)
	algorithm := cmp.Or(o.SignatureAlgorithm, "RS256")
	header := map[string]any{"typ": "JWT", "alg": algorithm}
	if o.ClientCertificateKeyID != "" {
		header["kid"] = o.ClientCertificateKeyID
	}
	signed, err := sign(header, claims, signatureHashes[algorithm], key)
	if err != nil {
		return fmt.Errorf("signing the assertion: %w", err)
	}
	params.Set("assertion", signed)
	if !params.Has("grant_type") {
		params.Set("grant_type", grantJWTBearer)
	}
	return nil
}

// parseKey reads an RSA key in PEM, in the form of PKCS #1 or #8.
func parseKey(text string) (*rsa.PrivateKey, error) {
	block, _ := pem.Decode([]byte(text))
	if block == nil {
		return nil, errors.New("there is no key in PEM")
	}
	if key, err := x509.ParsePKCS1PrivateKey(block.Bytes); err == nil {
		return key, nil
	}
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, err
	}
	key, ok := parsed.(*rsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("it is a %T; an RSA key is needed", parsed)
	}
	return key, nil
}

// sign returns a JSON Web Token in compact form (RFC 7515, 3.1). The libraries for such
// tokens do much more, and verify above all; they make the agent larger.
func sign(header, claims map[string]any, hash crypto.Hash, key *rsa.PrivateKey) (string, error) {
	var parts []string
	for _, part := range []map[string]any{header, claims} {
		text, err := json.Marshal(part)
		if err != nil {
			return "", err
		}
		parts = append(parts, base64.RawURLEncoding.EncodeToString(text))
	}
	h := hash.New()
	io.WriteString(h, strings.Join(parts, "."))
	signature, err := rsa.SignPKCS1v15(nil, key, hash, h.Sum(nil))
	if err != nil {
		return "", err
	}
	return strings.Join(append(parts, base64.RawURLEncoding.EncodeToString(signature)), "."), nil
}

// tokenTransport sends the requests for tokens.
type tokenTransport struct {
	base      *reloading
	userAgent string
}

func (t tokenTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	base, err := t.base.current()
	if err != nil {
		if r.Body != nil {
			r.Body.Close()
		}
		return nil, err
	}
	if t.userAgent != "" {
		r = r.Clone(r.Context())
		r.Header.Set("User-Agent", t.userAgent)
	}
	return base.RoundTrip(r)
}
