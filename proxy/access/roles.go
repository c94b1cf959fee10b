// Package access knows who may do what on the proxy: the roles of the
// configuration, the credentials that prove them, and how far each reaches.
package access

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"
	"unicode/utf8"

	"golang.org/x/crypto/bcrypt"
)

// Config is the section "roles" of the configuration. A section without entries
// lets nobody in; without the section everything is open.
type Config struct {
	// Scrapers may scrape, list what can be scraped, and read /metrics.
	Scrapers []Scraper `yaml:"scrapers"`
	// Agents may connect as agents.
	Agents []Agent `yaml:"agents,omitempty"`
	// AgentTokens is a file with a list of more Agents, which culvert-proxy token writes.
	// One that is not there yet has none.
	AgentTokens string `yaml:"agent_tokens"`
	// Pushers may push and delete groups of their jobs, by exact path.
	Pushers []Pusher `yaml:"pushers"`
	// Operators may do everything.
	Operators []Operator `yaml:"operators"`
}

// Credential tells by what an entry is known. Of several, each is enough.
type Credential struct {
	// Name is for logs and errors: each name once in a role.
	Name string `yaml:"name,omitempty"`
	// BasicAuth is a user name and a password.
	BasicAuth *BasicAuth `yaml:"basic_auth,omitempty"`
	// TokenHash is the SHA-256 of a random bearer token in hexadecimal.
	TokenHash string `yaml:"token_hash,omitempty"`
	// TokenFile holds a bearer token of at least 16 characters in plain text.
	TokenFile string `yaml:"token_file,omitempty"`
	// ClientCert are patterns of names: the common name or a DNS name of a client
	// certificate that the listener has verified.
	ClientCert []string `yaml:"client_cert,omitempty"`
	// Expires is when the entry ends: 2027-01-31 (its start, UTC) or RFC 3339.
	Expires string `yaml:"expires,omitempty"`
}

// BasicAuth is a user name, and the bcrypt hash of a password or a file with it.
type BasicAuth struct {
	Username     string `yaml:"username,omitempty"`
	PasswordHash string `yaml:"password_hash,omitempty"`
	PasswordFile string `yaml:"password_file,omitempty"`
}

// Scraper may scrape the agents whose names a pattern covers: all without patterns.
type Scraper struct {
	Credential `yaml:",inline"`
	Agents     []string `yaml:"agents,omitempty"`
}

// Agent may be an agent of a name that a pattern of Agents covers, answer for the
// hosts of Hosts, and relay pushes for the jobs of PushJobs. Without Agents, an
// entry with ClientCert alone may be what stands in the certificate itself.
type Agent struct {
	Credential `yaml:",inline"`
	Agents     []string `yaml:"agents,omitempty"`
	Hosts      []string `yaml:"hosts,omitempty"`
	PushJobs   []string `yaml:"push_jobs,omitempty"`
	// RequireKey refuses agents that show no key of their own: see Pins.
	RequireKey bool `yaml:"require_key,omitempty"`
}

// Pusher may push for the jobs that a regular expression matches as a whole.
type Pusher struct {
	Credential `yaml:",inline"`
	Jobs       []string `yaml:"jobs"`
}

// Operator may do everything.
type Operator struct {
	Credential `yaml:",inline"`
}

// UnmarshalYAML refuses fields without a value. A list that is empty by mistake would
// widen what an entry may do.
func (c *Config) UnmarshalYAML(unmarshal func(any) error) error {
	type plain Config
	if err := unmarshal((*plain)(c)); err != nil {
		return err
	}
	var fields map[string][]map[string]any
	if unmarshal(&fields) != nil {
		return nil // merged keys and the like: the typed reading has seen to it
	}
	for role, entries := range fields {
		for i, entry := range entries {
			for field, value := range entry {
				if list, isList := value.([]any); value == nil || isList && len(list) == 0 {
					return fmt.Errorf("roles.%s[%d].%s has no value: give it one, or leave the field away", role, i, field)
				}
			}
		}
	}
	return nil
}

// role is one of the four.
type role string

const (
	roleScraper  role = "scrapers"
	roleAgent    role = "agents"
	rolePusher   role = "pushers"
	roleOperator role = "operators"
)

// proof is the fingerprint of a secret as the configuration knows it: it is equal
// for the same secret before and after a reload, and no use to anybody else.
type proof [sha256.Size]byte

// entry is one checked entry of the configuration.
type entry struct {
	role    role
	name    string
	expires time.Time // zero: never
	user    *user
	token   *proof
	certs   patterns

	anyAgent bool     // of scrapers: without patterns
	ownName  bool     // of agents: the names in the certificate
	agents   patterns // of scrapers and agents
	hosts    patterns

	requireKey bool // of agents
	jobs       jobs // of agents and pushers
}

// user is a user name with the hash of a password, or a password.
type user struct {
	name     string
	hash     []byte // of bcrypt
	password *proof // the SHA-256 of it where there is no hash
	proof    proof
}

func (e *entry) expired(now time.Time) bool { return !e.expires.IsZero() && !now.Before(e.expires) }

func (e *entry) String() string { return fmt.Sprintf("roles.%s %q", e.role, e.name) }

// Roles is a checked configuration. The zero value, and nil, leave everything open.
type Roles struct {
	closed  bool // there is a configuration
	entries []*entry
	users   map[string][]*entry
	tokens  map[proof][]*entry // by the keyed hash of the token's SHA-256
	proofs  map[proof][]*entry
	exact   map[string][]*entry // of agents, by the patterns that are names
	wild    []*entry            // of agents, those that have other patterns
	checked *cache

	tokensFile, stamp string
}

// Compile checks a configuration and reads its files; relative names count from dir.
// An error names the entry and the field. Nil configuration: everything is open.
func (c *Config) Compile(dir string) (*Roles, error) {
	r := &Roles{users: map[string][]*entry{}, tokens: map[proof][]*entry{}, proofs: map[proof][]*entry{}, exact: map[string][]*entry{}, checked: newCache()}
	if c == nil {
		return r, nil
	}
	r.closed = true
	for i, s := range c.Scrapers {
		e, err := r.add(roleScraper, i, s.Credential, dir)
		if err == nil {
			e.anyAgent = s.Agents == nil
			e.agents, err = compilePatterns(e, "agents", s.Agents)
		}
		if err != nil {
			return nil, err
		}
	}
	agents := c.Agents
	if c.AgentTokens != "" {
		r.tokensFile = join(dir, c.AgentTokens)
		r.stamp = r.Stamp() // before it is read: a change in between is seen later
		more, err := ReadAgentTokens(r.tokensFile)
		if err != nil {
			return nil, fmt.Errorf("roles.agent_tokens: %w", err)
		}
		agents = append(agents[:len(agents):len(agents)], more...)
	}
	for i, a := range agents {
		e, err := r.add(roleAgent, i, a.Credential, dir)
		if err == nil {
			e.agents, err = compilePatterns(e, "agents", a.Agents)
		}
		if err == nil {
			e.hosts, err = compilePatterns(e, "hosts", a.Hosts)
		}
		if err == nil {
			e.jobs, err = compileJobs(e, "push_jobs", a.PushJobs)
		}
		if err != nil {
			return nil, err
		}
		isWild := false
		for _, p := range e.agents {
			if p.re == nil && p.tail == "" {
				r.exact[p.text] = append(r.exact[p.text], e)
			} else if !isWild {
				isWild = true
				r.wild = append(r.wild, e)
			}
		}
		e.requireKey = a.RequireKey
		if e.ownName = len(a.Agents) == 0; e.ownName && (e.user != nil || e.token != nil) {
			return nil, fmt.Errorf("%s: agents is missing: say which names an agent with this credential may have, as in agents: ['*.example.net']", e)
		}
	}
	for i, p := range c.Pushers {
		e, err := r.add(rolePusher, i, p.Credential, dir)
		if err == nil {
			e.jobs, err = compileJobs(e, "jobs", p.Jobs)
		}
		if err == nil && len(p.Jobs) == 0 {
			err = fmt.Errorf("%s: jobs is missing: say which jobs it may push for, as in jobs: ['backup-.*']", e)
		}
		if err != nil {
			return nil, err
		}
	}
	for i, o := range c.Operators {
		if _, err := r.add(roleOperator, i, o.Credential, dir); err != nil {
			return nil, err
		}
	}
	return r, nil
}

// Open reports whether everything is open to everybody.
func (r *Roles) Open() bool { return r == nil || !r.closed }

// Entries returns how many entries there are.
func (r *Roles) Entries() int { return len(r.entries) }

// add checks what all entries have.
func (r *Roles) add(in role, index int, c Credential, dir string) (*entry, error) {
	e := &entry{role: in, name: c.Name}
	if c.Name == "" || !utf8.ValidString(c.Name) || strings.ContainsFunc(c.Name, func(c rune) bool { return c < ' ' }) || len(c.Name) > 200 {
		return nil, fmt.Errorf("roles.%s[%d].name: %q: give each entry a name of up to 200 printable characters", in, index, c.Name)
	}
	for _, other := range r.entries {
		if other.role == in && other.name == c.Name {
			return nil, fmt.Errorf("%s: the name is there twice; each name may be once in a role", e)
		}
	}
	fail := func(field, format string, args ...any) (*entry, error) {
		return nil, fmt.Errorf("%s: %s: %w", e, field, fmt.Errorf(format, args...))
	}
	if b := c.BasicAuth; b != nil {
		e.user = &user{name: b.Username}
		switch {
		case b.Username == "" || strings.Contains(b.Username, ":"):
			return fail("basic_auth.username", "%q: use at least one character, and no colon", b.Username)
		case (b.PasswordHash == "") == (b.PasswordFile == ""):
			return fail("basic_auth", "give one of password_hash and password_file")
		case b.PasswordHash != "":
			cost, err := bcrypt.Cost([]byte(b.PasswordHash))
			if err != nil || len(b.PasswordHash) != 60 {
				return fail("basic_auth.password_hash", "this is no bcrypt hash; htpasswd -nBC 10 '' makes one")
			}
			if cost > maxBcryptCost {
				return fail("basic_auth.password_hash", "a bcrypt cost of %d takes seconds for each check; use at most %d", cost, maxBcryptCost)
			}
			e.user.hash = []byte(b.PasswordHash)
			e.user.proof = fingerprint("hash", b.Username, b.PasswordHash)
		default:
			password, err := readSecret(dir, b.PasswordFile, 1)
			if err != nil {
				return fail("basic_auth.password_file", "%w", err)
			}
			sum := proof(sha256.Sum256([]byte(password)))
			e.user.password, e.user.proof = &sum, fingerprint("password", b.Username, password)
		}
		r.users[b.Username] = append(r.users[b.Username], e)
		r.proofs[e.user.proof] = append(r.proofs[e.user.proof], e)
	}
	switch {
	case c.TokenHash != "" && c.TokenFile != "":
		return fail("token_hash", "there is token_file too; give one of them")
	case c.TokenHash != "":
		sum, err := hex.DecodeString(strings.TrimPrefix(c.TokenHash, "sha256:"))
		if err != nil || len(sum) != sha256.Size {
			return fail("token_hash", "%q is no SHA-256 in 64 hexadecimal digits; printf %%s TOKEN | sha256sum makes one", c.TokenHash)
		}
		e.token = (*proof)(sum)
	case c.TokenFile != "":
		token, err := readSecret(dir, c.TokenFile, 16)
		if err != nil {
			return fail("token_file", "%w", err)
		}
		sum := proof(sha256.Sum256([]byte(token)))
		e.token = &sum
	}
	if e.token != nil {
		key := r.checked.keyed("token", string(e.token[:]), "")
		r.tokens[key] = append(r.tokens[key], e)
		r.proofs[*e.token] = append(r.proofs[*e.token], e)
	}
	var err error
	if e.certs, err = compilePatterns(e, "client_cert", c.ClientCert); err != nil {
		return nil, err
	}
	if e.user == nil && e.token == nil && len(e.certs) == 0 {
		return nil, fmt.Errorf("%s: no credential: give basic_auth, token_hash, token_file or client_cert", e)
	}
	if c.Expires != "" {
		if e.expires, err = time.Parse(time.RFC3339, c.Expires); err != nil {
			e.expires, err = time.Parse(time.DateOnly, c.Expires)
		}
		if err != nil {
			return fail("expires", "%q: write a day or a time, as in 2027-01-31 or 2027-01-31T12:00:00Z", c.Expires)
		}
	}
	r.entries = append(r.entries, e)
	return e, nil
}

// maxBcryptCost is about a second.
const maxBcryptCost = 14

// fingerprint joins parts of which none can run into the next.
func fingerprint(parts ...string) proof {
	h := sha256.New()
	for _, part := range parts {
		fmt.Fprintf(h, "%d:%s,", len(part), part)
	}
	return proof(h.Sum(nil))
}

// maxSecretFile bounds a file with a password or a token, in bytes.
const maxSecretFile = 64 << 10

// readSecret reads a regular file, without its last line break.
func readSecret(dir, name string, least int) (string, error) {
	name = join(dir, name)
	info, err := os.Stat(name) // opening a pipe would wait for its writer
	if err != nil {
		return "", err
	}
	if !info.Mode().IsRegular() {
		return "", fmt.Errorf("%s is no regular file", name)
	}
	f, err := os.Open(name)
	if err != nil {
		return "", err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxSecretFile+1))
	if err != nil {
		return "", err
	}
	secret := strings.TrimSuffix(strings.TrimSuffix(string(text), "\n"), "\r")
	switch {
	case len(text) > maxSecretFile:
		return "", fmt.Errorf("%s is larger than %d bytes", name, maxSecretFile)
	case strings.ContainsAny(secret, "\r\n"):
		return "", fmt.Errorf("%s has more than one line", name)
	case len(secret) < least:
		return "", fmt.Errorf("%s: %w", name, errShort(least))
	}
	return secret, nil
}

func join(dir, name string) string {
	if filepath.IsAbs(name) {
		return name
	}
	return filepath.Join(dir, name)
}

func errShort(least int) error {
	if least == 1 {
		return errors.New("the file is empty")
	}
	return fmt.Errorf("the secret is too easy to guess: use at least %d random characters", least)
}
