package access

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/crypto/bcrypt"
	"golang.org/x/sync/singleflight"
	"golang.org/x/time/rate"
)

// Reason is why credentials were not taken.
type Reason string

// Reasons. They are also the values of a metric's label.
const (
	Missing Reason = "missing" // there are none
	Wrong   Reason = "wrong"   // nobody has them, or they can't be read
	Expired Reason = "expired" // somebody had them until a while ago
	Slowed  Reason = "slowed"  // too many were wrong before; these were not looked at
	Busy    Reason = "busy"    // too many passwords are being checked
)

// Failure is the error of Identify.
type Failure struct {
	Reason     Reason
	Message    string
	RetryAfter time.Duration // of Slowed and Busy
}

func (f *Failure) Error() string { return f.Message }

// Authenticator tells who somebody is. All methods may be called at the same time.
type Authenticator struct {
	roles    atomic.Pointer[Roles]
	trusted  []netip.Prefix
	logger   *slog.Logger
	throttle *throttle
	failures *prometheus.CounterVec
	warnings *rate.Limiter // of lines in the log that strangers can cause
	checking chan struct{} // a token for each bcrypt check that runs
}

// New returns an authenticator with roles, which can be replaced. X-Forwarded-For
// counts only where it comes from an address of trusted.
func New(roles *Roles, trusted []netip.Prefix, registerer prometheus.Registerer, logger *slog.Logger) *Authenticator {
	a := &Authenticator{
		trusted: trusted, logger: logger, throttle: newThrottle(),
		warnings: rate.NewLimiter(rate.Every(time.Second), 10),
		checking: make(chan struct{}, max(1, runtime.GOMAXPROCS(0)/2)),
		failures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "culvert_proxy_auth_failures_total",
			Help: "Requests whose credentials were not taken, by reason: missing, wrong, expired, slowed (too many wrong ones before, so these were not looked at), busy. A rise of wrong and slowed is somebody who guesses, or somebody whose credentials were changed.",
		}, []string{"reason"}),
	}
	for _, reason := range []Reason{Missing, Wrong, Expired, Slowed, Busy} {
		a.failures.WithLabelValues(string(reason))
	}
	registerer.MustRegister(a.failures, expiryCollector{a})
	a.SetRoles(roles)
	return a
}

var expiryDesc = prometheus.NewDesc("culvert_proxy_credential_expiry_timestamp_seconds",
	"When an entry of the roles expires, of those that do. An agent whose entry has expired loses its session; make a new token, or move the date, before that.", []string{"role", "name"}, nil)

// expiryCollector tells of the roles as they are now.
type expiryCollector struct{ authenticator *Authenticator }

func (c expiryCollector) Describe(ch chan<- *prometheus.Desc) { ch <- expiryDesc }

func (c expiryCollector) Collect(ch chan<- prometheus.Metric) {
	roles := c.authenticator.Roles()
	if roles.Open() {
		return
	}
	for _, e := range roles.entries {
		if !e.expires.IsZero() {
			ch <- prometheus.MustNewConstMetric(expiryDesc, prometheus.GaugeValue, float64(e.expires.Unix()), string(e.role), e.name)
		}
	}
}

// Roles returns the current roles.
func (a *Authenticator) Roles() *Roles { return a.roles.Load() }

// SetRoles replaces the roles. What was checked against the old ones is forgotten.
func (a *Authenticator) SetRoles(roles *Roles) { a.roles.Store(roles) }

// checkTimeout is how long a request waits for its turn to have a password checked.
const checkTimeout = 5 * time.Second

// Identify tells who sent a request, by the header field that carries the
// credentials and by the client certificate. claimed is the name of who asks where
// the request tells it elsewhere than in the credentials. It returns a *Failure.
//
// Without roles everybody is anybody, whatever they show.
func (a *Authenticator) Identify(r *http.Request, field, claimed string) (*Identity, error) {
	return a.identify(r, field, claimed, false)
}

// IdentifyBasic is Identify for programs that know nothing but user names and passwords:
// with any user name, a token counts as the password.
func (a *Authenticator) IdentifyBasic(r *http.Request, field, claimed string) (*Identity, error) {
	return a.identify(r, field, claimed, true)
}

func (a *Authenticator) identify(r *http.Request, field, claimed string, tokens bool) (*Identity, error) {
	roles := a.roles.Load()
	if roles.Open() {
		return Anybody, nil
	}
	id := &Identity{roles: roles}
	if r.TLS != nil && len(r.TLS.VerifiedChains) > 0 { // others are what they say themselves
		id.names = certNames(r.TLS.VerifiedChains[0][0])
		id.entries = roles.byNames(id.names)
	}
	switch values := r.Header.Values(field); {
	case len(values) > 1:
		return nil, a.fail(r, Wrong, 0, "the header "+field+" is there more than once")
	case len(values) == 1:
		shown, ok := parseSecret(values[0])
		if !ok {
			return nil, a.fail(r, Wrong, 0, "the header "+field+" is neither Basic nor Bearer")
		}
		shown.orToken = tokens && shown.user != ""
		if claimed != "" && shown.user == "" {
			shown.claimed = claimed
		}
		found, err := a.check(r, roles, shown)
		if err != nil {
			return nil, err
		}
		id.proofs = found.proofs
		for _, e := range found.entries {
			if !slices.Contains(id.entries, e) {
				id.entries = append(id.entries, e)
			}
		}
	case len(id.entries) == 0 && len(id.names) > 0:
		return nil, a.fail(r, Wrong, 0, fmt.Sprintf("no role has a client_cert of the name %q", id.names[0]))
	case len(id.entries) == 0:
		return nil, a.fail(r, Missing, 0, "this proxy asks for credentials: send "+field+" with Basic or Bearer, or a client certificate")
	}
	if id.Empty() {
		return nil, a.fail(r, Expired, 0, fmt.Sprintf("the credential (%s) expired on %s", id, id.entries[0].expires.UTC().Format(time.RFC3339)))
	}
	return id, nil
}

func (a *Authenticator) fail(r *http.Request, reason Reason, wait time.Duration, message string) *Failure {
	a.failures.WithLabelValues(string(reason)).Inc()
	a.logger.Debug("Credentials not taken", "reason", reason, "from", a.Address(r), "message", message)
	return &Failure{Reason: reason, Message: message, RetryAfter: wait}
}

// secret is what a header field shows.
type secret struct {
	user     string // "" for bearer tokens
	password string // or the token
	claimed  string // who it says it is
	orToken  bool   // the password may be a token
}

// parseSecret reads "Basic BASE64" and "Bearer TOKEN".
func parseSecret(value string) (secret, bool) {
	scheme, rest, _ := strings.Cut(value, " ")
	rest = strings.TrimLeft(rest, " ")
	switch {
	case strings.EqualFold(scheme, "Bearer") && rest != "":
		// Who has no name is told apart by the start of the token.
		return secret{password: rest, claimed: "token " + rest[:min(8, len(rest)/4)]}, true
	case strings.EqualFold(scheme, "Basic"):
		text, err := base64.StdEncoding.DecodeString(rest)
		user, password, ok := strings.Cut(string(text), ":")
		return secret{user: user, password: password, claimed: "user " + user}, err == nil && ok && user != ""
	}
	return secret{}, false
}

// found is the outcome of a check.
type found struct {
	entries []*entry
	proofs  []proof
}

// check finds the entries of a secret: in the cache, or by comparing. Wrong ones
// cost time the more of them come from one address under one name.
func (a *Authenticator) check(r *http.Request, roles *Roles, s secret) (*found, error) {
	scheme := "bearer"
	if s.user != "" {
		scheme = "basic"
	}
	if s.orToken {
		scheme = "basic or token"
	}
	key := roles.checked.keyed(scheme, s.user, s.password)
	if f := roles.checked.get(key); f != nil {
		return f, nil
	}
	// A burst of scrapes with one new password costs one check.
	result, err, _ := roles.checked.flights.Do(string(key[:]), func() (any, error) {
		if f := roles.checked.get(key); f != nil {
			return f, nil
		}
		who := throttleKey{a.Address(r), roles.checked.keyed("claimed", s.claimed, "")}
		wait, first := a.throttle.begin(who, time.Now())
		if first && a.warnings.Allow() {
			a.logger.Warn("Wrong credentials come again and again; further tries are slowed", "from", who.address, "claimed", s.claimed)
		}
		if wait > 0 {
			return nil, a.fail(r, Slowed, wait, "too many tries with wrong credentials; wait before the next one")
		}
		f := new(found)
		if s.user == "" || s.orToken {
			roles.findToken(f, s.password)
		}
		if s.user != "" && len(f.entries) == 0 {
			select {
			case a.checking <- struct{}{}:
				roles.findUser(f, s.user, s.password)
				<-a.checking
			case <-time.After(checkTimeout):
				a.throttle.undo(who)
				return nil, a.fail(r, Busy, checkTimeout, "too many passwords are being checked now")
			}
		}
		if len(f.entries) == 0 {
			return nil, a.fail(r, Wrong, 0, "wrong credentials")
		}
		a.throttle.forget(who)
		roles.checked.put(key, f)
		return f, nil
	})
	if err != nil {
		return nil, err
	}
	return result.(*found), nil
}

// findToken compares in constant time: what the map is asked for is a keyed hash.
func (r *Roles) findToken(f *found, token string) {
	sum := proof(sha256.Sum256([]byte(token)))
	for _, e := range r.tokens[r.checked.keyed("token", string(sum[:]), "")] {
		if subtle.ConstantTimeCompare(e.token[:], sum[:]) == 1 {
			f.entries, f.proofs = append(f.entries, e), []proof{sum}
		}
	}
}

// findUser takes as long for a user that nobody has as for one whose password is
// wrong, so that the time tells nobody which users there are.
func (r *Roles) findUser(f *found, name, password string) {
	sum := sha256.Sum256([]byte(password))
	hashed := false
	entries := r.users[name]
	for i, e := range entries {
		var right bool
		if before := slices.IndexFunc(entries[:i], func(b *entry) bool { return b.user.proof == e.user.proof }); before >= 0 {
			right = slices.Contains(f.proofs, e.user.proof) // one password in several roles
		} else if e.user.hash != nil {
			hashed = true
			right = bcrypt.CompareHashAndPassword(e.user.hash, []byte(password)) == nil
		} else {
			right = subtle.ConstantTimeCompare(e.user.password[:], sum[:]) == 1
		}
		if right {
			f.entries, f.proofs = append(f.entries, e), append(f.proofs, e.user.proof)
		}
	}
	if decoy := slices.IndexFunc(r.entries, func(e *entry) bool { return e.user != nil && e.user.hash != nil }); !hashed && decoy >= 0 {
		_ = bcrypt.CompareHashAndPassword(r.entries[decoy].user.hash, []byte(password))
	}
}

// maxChecked bounds a cache. There is one entry for each credential in use; more come
// only from who knows one and varies what bcrypt doesn't look at.
const maxChecked = 10_000

// cache holds credentials that were found good. It has no secret in plain text: its
// keys are hashes under a key that only this process knows, and only while the
// roles are the same.
type cache struct {
	key     []byte
	macs    sync.Pool
	flights singleflight.Group

	mu   sync.RWMutex // protects good
	good map[proof]*found
}

func newCache() *cache {
	c := &cache{key: make([]byte, 32), good: map[proof]*found{}}
	rand.Read(c.key)
	c.macs.New = func() any { return hmac.New(sha256.New, c.key) }
	return c
}

// keyed returns the keyed hash of parts, none of which can run into the next.
func (c *cache) keyed(scheme, user, password string) (sum proof) {
	mac := c.macs.Get().(interface {
		Write([]byte) (int, error)
		Sum([]byte) []byte
		Reset()
	})
	defer c.macs.Put(mac)
	mac.Reset()
	var buf [256]byte
	b := append(buf[:0], scheme...)
	b = append(b, 0, byte(len(user)), byte(len(user)>>8), byte(len(user)>>16), byte(len(user)>>24))
	b = append(b, user...)
	b = append(b, password...)
	mac.Write(b)
	mac.Sum(sum[:0])
	return sum
}

func (c *cache) get(key proof) *found {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.good[key]
}

func (c *cache) put(key proof, f *found) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for old := range c.good { // any will do
		if len(c.good) < maxChecked {
			break
		}
		delete(c.good, old)
	}
	c.good[key] = f
}
