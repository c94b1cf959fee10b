package access_test

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.yaml.in/yaml/v2"
	"golang.org/x/crypto/bcrypt"

	"github.com/culvert-io/culvert/protocol"
	"github.com/culvert-io/culvert/proxy/access"
)

// secretHash is the bcrypt hash of "secret", at the least cost.
var secretHash = sync.OnceValue(func() string {
	hash, err := bcrypt.GenerateFromPassword([]byte("secret"), bcrypt.MinCost)
	if err != nil {
		panic(err)
	}
	return string(hash)
})

func hashOf(token string) string {
	sum := sha256.Sum256([]byte(token))
	return hex.EncodeToString(sum[:])
}

func compile(text, dir string) (*access.Roles, error) {
	var c access.Config
	if err := yaml.UnmarshalStrict([]byte(text), &c); err != nil {
		return nil, err
	}
	return c.Compile(dir)
}

func mustCompile(t testing.TB, text string) *access.Roles {
	t.Helper()
	r, err := compile(text, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// newAuthenticator returns one with the roles, and what it counts.
func newAuthenticator(t testing.TB, text string, trusted ...netip.Prefix) (*access.Authenticator, *prometheus.Registry) {
	t.Helper()
	registry := prometheus.NewRegistry()
	return access.New(mustCompile(t, text), trusted, registry, slog.New(slog.DiscardHandler)), registry
}

func basic(user, password string) string {
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(user+":"+password))
}

func request(from, authorization string) *http.Request {
	r := httptest.NewRequest("GET", "/metrics", nil)
	r.RemoteAddr = from
	if authorization != "" {
		r.Header.Set("Authorization", authorization)
	}
	return r
}

func withCert(r *http.Request, verified bool, commonName string, dnsNames ...string) *http.Request {
	cert := &x509.Certificate{Subject: pkix.Name{CommonName: commonName}, DNSNames: dnsNames}
	r.TLS = &tls.ConnectionState{PeerCertificates: []*x509.Certificate{cert}}
	if verified {
		r.TLS.VerifiedChains = [][]*x509.Certificate{{cert}}
	}
	return r
}

func reason(err error) access.Reason {
	if f, ok := errors.AsType[*access.Failure](err); ok {
		return f.Reason
	}
	return ""
}

func TestCompileErrors(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for name, text := range map[string]string{"short": "tiny\n", "empty": "\n", "two": "a-token-of-enough-length\nand more\n", "large": strings.Repeat("x", 70_000)} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	costly := "$2a$20$" + secretHash()[7:]
	for _, c := range []struct{ text, want string }{
		{"scrapers: [{}]", `roles.scrapers[0].name: "": give each entry a name`},
		{"scrapers: [{name: \"a\\nb\", client_cert: [x]}]", "printable"},
		{"scrapers: [{name: a}]", `roles.scrapers "a": no credential`},
		{"scrapers: [{name: a, client_cert: [x]}, {name: a, client_cert: [y]}]", `roles.scrapers "a": the name is there twice`},
		{"scrapers: [{name: a, client_cert: [x], agents: }]", "roles.scrapers[0].agents has no value"},
		{"scrapers: [{name: a, client_cert: [x], agents: []}]", "roles.scrapers[0].agents has no value"},
		{"scrapers: [{name: a, client_cert: [x], agents: [a..b]}]", `roles.scrapers "a": agents[0]: pattern "a..b"`},
		{"scrapers: [{name: a, client_cert: [x], jobs: [b]}]", "field jobs not found"},
		{"operators: [{name: a, basic_auth: {password_hash: x}}]", `roles.operators "a": basic_auth.username: ""`},
		{"operators: [{name: a, basic_auth: {username: 'a:b', password_hash: x}}]", "no colon"},
		{"operators: [{name: a, basic_auth: {username: a}}]", `basic_auth: give one of password_hash and password_file`},
		{"operators: [{name: a, basic_auth: {username: a, password_hash: secret}}]", "basic_auth.password_hash: this is no bcrypt hash"},
		{"operators: [{name: a, basic_auth: {username: a, password_hash: '" + costly + "'}}]", "cost of 20"},
		{"operators: [{name: a, basic_auth: {username: a, password_file: empty}}]", "basic_auth.password_file: " + filepath.Join(dir, "empty") + ": the file is empty"},
		{"operators: [{name: a, token_file: nowhere}]", `roles.operators "a": token_file: stat`},
		{"operators: [{name: a, token_file: /dev/null}]", "no regular file"},
		{"operators: [{name: a, token_file: short}]", "at least 16 random characters"},
		{"operators: [{name: a, token_file: two}]", "more than one line"},
		{"operators: [{name: a, token_file: large}]", "larger than"},
		{"operators: [{name: a, token_hash: abc}]", `roles.operators "a": token_hash: "abc" is no SHA-256`},
		{"operators: [{name: a, token_hash: " + hashOf("x") + ", token_file: short}]", "there is token_file too"},
		{"operators: [{name: a, client_cert: ['a b']}]", `roles.operators "a": client_cert[0]`},
		{"operators: [{name: a, client_cert: [x], expires: tomorrow}]", `roles.operators "a": expires: "tomorrow"`},
		{"agents: [{name: a, token_hash: " + hashOf("x") + "}]", `roles.agents "a": agents is missing`},
		{"agents: [{name: a, client_cert: [x], hosts: ['*.']}]", `roles.agents "a": hosts[0]`},
		{"agents: [{name: a, client_cert: [x], push_jobs: ['(']}]", `roles.agents "a": push_jobs[0]: "("`},
		{"pushers: [{name: a, client_cert: [x]}]", `roles.pushers "a": jobs is missing`},
		{"pushers: [{name: a, client_cert: [x], jobs: ['a)|(?s:b']}]", `roles.pushers "a": jobs[0]`},
		{"pushers: [{name: a, client_cert: [x], jobs: ['" + strings.Repeat("(", 999) + strings.Repeat(")", 999) + "']}]", "jobs[0]"},
		{"watchers: []", "field watchers not found"},
	} {
		if _, err := compile(c.text, dir); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s:\ngot  %v\nwant %s", c.text, err, c.want)
		}
	}
}

func TestReach(t *testing.T) {
	t.Parallel()
	roles := `
scrapers:
- {name: all, token_hash: ` + hashOf("all") + `}
- {name: berlin, token_hash: ` + hashOf("berlin") + `, agents: ['*.berlin.example.net']}
agents:
- {name: webs, token_hash: ` + hashOf("webs") + `, agents: ['web-*.example.net'], hosts: [db-1.lan, '*.deep.lan'], push_jobs: [backup-.*, a|b]}
- {name: any, token_hash: ` + hashOf("any") + `, agents: ['*'], hosts: ['*']}
pushers:
- {name: backups, token_hash: ` + hashOf("backups") + `, jobs: [backup-.*, x|y]}
- {name: both, token_hash: ` + hashOf("all") + `, jobs: [z]}
operators:
- {name: root, token_hash: ` + hashOf("root") + `}
- {name: late, token_hash: ` + hashOf("late") + `, expires: 2020-01-31}
- {name: soon, token_hash: ` + hashOf("soon") + `, expires: 2999-01-31T12:00:00+01:00}
`
	a, _ := newAuthenticator(t, roles)
	who := func(token string) *access.Identity {
		id, err := a.Identify(request("192.0.2.1:1", "Bearer "+token), "Authorization", "")
		if err != nil {
			t.Fatalf("%s: %v", token, err)
		}
		return id
	}
	all, berlin, webs, anyName, backups, root := who("all"), who("berlin"), who("webs"), who("any"), who("backups"), who("root")
	for _, c := range []struct {
		what      string
		got, want bool
	}{
		{"all scrapes", all.MayScrape("x"), true},
		{"all reads", all.Scraper(), true},
		{"all operates", all.Operator(), false},
		{"all pushes z, by its other entry", all.MayPush("z"), true},
		{"all pushes zz", all.MayPush("zz"), false},
		{"all connects", all.Agent() || all.MayBe("x"), false},
		{"berlin scrapes its own", berlin.MayScrape("a.b.berlin.example.net"), true},
		{"berlin scrapes the bare domain", berlin.MayScrape("berlin.example.net"), false},
		{"berlin scrapes a lookalike", berlin.MayScrape("xberlin.example.net"), false},
		{"berlin pushes", berlin.Pusher() || berlin.MayPush("backup-1"), false},
		{"webs is web-1", webs.MayBe("web-1.example.net"), true},
		{"webs is web-", webs.MayBe("web-.example.net"), true},
		{"webs is db-1", webs.MayBe("db-1.example.net"), false},
		{"webs is web-1.evil", webs.MayBe("web-1.evil.example.net"), false},
		{"webs is behind it", webs.MayBe("web-1.example.net.evil"), false},
		{"webs answers for db-1.lan", webs.MayAnswerFor("web-1.example.net", "db-1.lan"), true},
		{"webs answers for db-2.lan", webs.MayAnswerFor("web-1.example.net", "db-2.lan"), false},
		{"webs answers as somebody else", webs.MayAnswerFor("db-1.example.net", "db-1.lan"), false},
		{"webs answers for *.deep.lan", webs.MayAnswerFor("web-1.example.net", "*.deep.lan"), true},
		{"webs answers for *.more.deep.lan", webs.MayAnswerFor("web-1.example.net", "*.more.deep.lan"), true},
		{"webs answers for *.lan", webs.MayAnswerFor("web-1.example.net", "*.lan"), false},
		{"webs answers for deep.lan", webs.MayAnswerFor("web-1.example.net", "deep.lan"), false},
		{"webs relays backup-1", webs.MayRelay("web-1.example.net", "backup-1"), true},
		{"webs relays ab", webs.MayRelay("web-1.example.net", "ab"), false},
		{"webs relays a line more", webs.MayRelay("web-1.example.net", "a\nx"), false},
		{"webs pushes", webs.MayPush("backup-1"), false},
		{"webs scrapes", webs.MayScrape("web-1.example.net") || webs.Scraper(), false},
		{"any is anything", anyName.MayBe("x"), true},
		{"any answers for *.x", anyName.MayAnswerFor("x", "*.x"), true},
		{"any relays", anyName.MayRelay("x", "y"), false},
		{"backups pushes", backups.MayPush("backup-1"), true},
		{"backups pushes the second half", backups.MayPush("xy"), false},
		{"backups relays", backups.MayRelay("x", "backup-1"), false},
		{"backups reads", backups.Scraper() || backups.MayScrape("x"), false},
		{"root", root.Operator() && root.Scraper() && root.MayScrape("x") && root.MayPush("x") && root.MayBe("x") && root.MayAnswerFor("x", "y") && root.MayRelay("x", "y"), true},
		{"soon", who("soon").Operator(), true},
	} {
		if c.got != c.want {
			t.Errorf("%s: got %v", c.what, c.got)
		}
	}
	for token, want := range map[string]access.Reason{"late": access.Expired, "nobody": access.Wrong} {
		if _, err := a.Identify(request("192.0.2.1:1", "Bearer "+token), "Authorization", ""); reason(err) != want {
			t.Errorf("%s: got %v, want %s", token, err, want)
		}
	}
}

func TestIdentify(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	os.WriteFile(filepath.Join(dir, "password"), []byte("from a file\r\n"), 0o600)
	os.WriteFile(filepath.Join(dir, "token"), []byte("a-token-of-enough-length\n"), 0o600)
	roles, err := compile(`
scrapers:
- {name: hashed, basic_auth: {username: prom, password_hash: '`+secretHash()+`'}}
- {name: filed, basic_auth: {username: filed, password_file: password}, token_file: token}
- {name: certified, client_cert: [prom.example.net, '*.scrapers.lan']}
agents:
- {name: own, client_cert: ['*.agents.lan']}
operators:
- {name: rotated, basic_auth: {username: prom, password_hash: '`+secretHash()+`'}}
`, dir)
	if err != nil {
		t.Fatal(err)
	}
	a := access.New(roles, nil, prometheus.NewRegistry(), slog.New(slog.DiscardHandler))
	for _, c := range []struct {
		name string
		r    *http.Request
		want access.Reason
	}{
		{"hashed", request("", basic("prom", "secret")), ""},
		{"hashed, from the cache", request("", basic("prom", "secret")), ""},
		{"lower case scheme", request("", "bASIC"+basic("prom", "secret")[5:]), ""},
		{"file", request("", basic("filed", "from a file")), ""},
		{"token file", request("", "Bearer a-token-of-enough-length"), ""},
		{"common name", withCert(request("", ""), true, "Prom.Example.Net"), ""},
		{"DNS name", withCert(request("", ""), true, "", "other", "a.scrapers.lan"), ""},
		{"none", request("", ""), access.Missing},
		{"wrong password", request("", basic("prom", "Secret")), access.Wrong},
		{"password of another", request("", basic("prom", "from a file")), access.Wrong},
		{"nobody", request("", basic("nobody", "secret")), access.Wrong},
		{"no user", request("", basic("", "secret")), access.Wrong},
		{"the password as a token", request("", "Bearer secret"), access.Wrong},
		{"the token as a password", request("", basic("filed", "a-token-of-enough-length")), access.Wrong},
		{"no base64", request("", "Basic %%%"), access.Wrong},
		{"another scheme", request("", "Digest x"), access.Wrong},
		{"empty", request("", "Bearer "), access.Wrong},
		{"a certificate that nobody has verified", withCert(request("", ""), false, "prom.example.net"), access.Missing},
		{"another's certificate", withCert(request("", ""), true, "evil.example.net"), access.Wrong},
		{"a good certificate with a wrong password", withCert(request("", basic("prom", "x")), true, "prom.example.net"), access.Wrong},
	} {
		id, err := a.Identify(c.r, "Authorization", "")
		if reason(err) != c.want || (err == nil) != (c.want == "") {
			t.Errorf("%s: got %v, want %q", c.name, err, c.want)
		}
		if err == nil && !id.Scraper() {
			t.Errorf("%s: is no scraper", c.name)
		}
	}
	twice := request("", basic("prom", "secret"))
	twice.Header.Add("Authorization", "Bearer x")
	if _, err := a.Identify(twice, "Authorization", ""); reason(err) != access.Wrong {
		t.Errorf("two headers: %v", err)
	}
	if id, _ := a.Identify(request("", basic("prom", "secret")), "Authorization", ""); !id.Operator() {
		t.Error("the second entry of one user does not count")
	}
	token := request("", basic("whoever", "a-token-of-enough-length"))
	if _, err := a.IdentifyBasic(token, "Authorization", ""); err != nil {
		t.Errorf("where it may, the token as a password: %v", err)
	}
	if _, err := a.Identify(token, "Authorization", ""); reason(err) != access.Wrong {
		t.Errorf("the token as a password, where it counted elsewhere: %v", err)
	}
	if _, err := a.IdentifyBasic(request("", basic("prom", "secret")), "Authorization", ""); err != nil {
		t.Errorf("where a token may be one, a password: %v", err)
	}
	own, err := a.Identify(withCert(request("", ""), true, "", "web-1.agents.lan"), "Authorization", "web-1.agents.lan")
	if err != nil || !own.MayBe("web-1.agents.lan") || own.MayBe("web-2.agents.lan") {
		t.Errorf("a certificate does not stand for its own name alone: %v", err)
	}
	a.SetRoles(nil)
	if id, err := a.Identify(request("", "nonsense"), "Authorization", ""); err != nil || !id.Operator() || !id.MayBe("x") {
		t.Errorf("without roles: %v", err)
	}
}

func TestSlowed(t *testing.T) { synctest.Test(t, testSlowed) }

func testSlowed(t *testing.T) {
	a, registry := newAuthenticator(t, `
scrapers:
- {name: prom, basic_auth: {username: prom, password_hash: '`+secretHash()+`'}}
- {name: other, basic_auth: {username: other, password_hash: '`+secretHash()+`'}}
agents:
- {name: a, token_hash: `+hashOf("right")+`, agents: ['*']}
`)
	try := func(from, authorization, claimed string) access.Reason {
		_, err := a.Identify(request(from, authorization), "Authorization", claimed)
		return reason(err)
	}
	if got := try("192.0.2.1:1", basic("other", "secret"), ""); got != "" {
		t.Fatal(got)
	}
	for i := range 10 {
		if got := try("192.0.2.1:1", basic("prom", fmt.Sprint(i)), ""); got != access.Wrong {
			t.Fatalf("try %d: %s", i, got)
		}
	}
	// In this order: a credential that was right once is not slowed any more.
	for _, c := range []struct {
		what, from, authorization string
		want                      access.Reason
	}{
		{"an eleventh", "192.0.2.1:1", basic("prom", "11"), access.Slowed},
		{"the right one", "192.0.2.1:2", basic("prom", "secret"), access.Slowed},
		{"X-Forwarded-For lies", "192.0.2.1:1", basic("prom", "12"), access.Slowed},
		{"another user", "192.0.2.1:1", basic("other", "x"), access.Wrong},
		{"another, checked", "192.0.2.1:1", basic("other", "secret"), ""},
		{"the right one, from elsewhere", "192.0.2.2:1", basic("prom", "secret"), ""},
		{"the right one, checked elsewhere", "192.0.2.1:2", basic("prom", "secret"), ""},
	} {
		r := request(c.from, c.authorization)
		r.Header.Set("X-Forwarded-For", "203.0.113.9")
		if _, err := a.Identify(r, "Authorization", ""); reason(err) != c.want {
			t.Errorf("%s: got %v, want %q", c.what, err, c.want)
		}
	}
	time.Sleep(time.Second)
	if got := try("192.0.2.1:1", basic("prom", "13"), ""); got != access.Wrong {
		t.Errorf("a second later: %s", got)
	}
	time.Sleep(time.Second)
	if got := try("192.0.2.1:1", basic("prom", "14"), ""); got != access.Slowed {
		t.Errorf("the wait did not grow: %s", got)
	}
	time.Sleep(time.Second)
	if got := try("192.0.2.1:1", basic("prom", "secret"), ""); got != "" {
		t.Errorf("the right one after the wait: %s", got)
	}
	if got := try("192.0.2.1:1", basic("prom", "15"), ""); got != access.Wrong {
		t.Errorf("a wrong one after a right one: %s", got)
	}
	// Agents are told apart by the name that they claim.
	for i := range 11 {
		want := access.Wrong
		if i == 10 {
			want = access.Slowed
		}
		if got := try("192.0.2.3:1", fmt.Sprintf("Bearer wrong-token-%d", i), "web-1"); got != want {
			t.Errorf("agent's try %d: %s, want %s", i, got, want)
		}
	}
	if got := try("192.0.2.3:1", "Bearer right", "web-2"); got != "" {
		t.Errorf("another agent of that address: %s", got)
	}
	if problems, err := testutil.GatherAndLint(registry); err != nil || len(problems) > 0 {
		t.Error(problems, err)
	}
	if n, err := testutil.GatherAndCount(registry, "culvert_proxy_auth_failures_total"); n != 5 || err != nil {
		t.Errorf("%d series, %v", n, err)
	}
}

// TestSlowedTogether: guesses that come at the same time are not all free.
func TestSlowedTogether(t *testing.T) { synctest.Test(t, testSlowedTogether) }

func testSlowedTogether(t *testing.T) {
	a, _ := newAuthenticator(t, `
scrapers: [{name: prom, basic_auth: {username: prom, password_hash: '`+secretHash()+`'}}]
`)
	var wg sync.WaitGroup
	var mu sync.Mutex // protects count
	count := map[access.Reason]int{}
	for i := range 200 {
		wg.Go(func() {
			_, err := a.Identify(request("192.0.2.1:1", basic("prom", fmt.Sprint(i))), "Authorization", "")
			mu.Lock()
			defer mu.Unlock()
			count[reason(err)]++
		})
	}
	wg.Wait()
	if count[access.Wrong] != 10 || count[access.Wrong]+count[access.Slowed] != 200 {
		t.Errorf("of 200 guesses: %v", count)
	}
	// And a burst with one right password is one try.
	for range 100 {
		wg.Go(func() {
			if _, err := a.Identify(request("192.0.2.2:1", basic("prom", "secret")), "Authorization", ""); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

// TestExpiry: who expires is told of the roles as they are after a reload, and who never
// does is not.
func TestExpiry(t *testing.T) {
	t.Parallel()
	registry := prometheus.NewRegistry()
	a := access.New(nil, nil, registry, slog.New(slog.DiscardHandler))
	const family = "culvert_proxy_credential_expiry_timestamp_seconds"
	if n, err := testutil.GatherAndCount(registry, family); n != 0 || err != nil {
		t.Errorf("without roles there are %d series, %v", n, err)
	}
	a.SetRoles(mustCompile(t, `
agents:
- {name: berlin, token_hash: `+hashOf("berlin")+`, agents: ['*'], expires: 2027-01-31}
- {name: ever, token_hash: `+hashOf("ever")+`, agents: ['*']}
operators:
- {name: berlin, token_hash: `+hashOf("operator")+`, expires: 2027-01-31T12:00:00Z}
`))
	if err := testutil.GatherAndCompare(registry, strings.NewReader(`
# HELP culvert_proxy_credential_expiry_timestamp_seconds When an entry of the roles expires, of those that do. An agent whose entry has expired loses its session; make a new token, or move the date, before that.
# TYPE culvert_proxy_credential_expiry_timestamp_seconds gauge
culvert_proxy_credential_expiry_timestamp_seconds{name="berlin",role="agents"} 1.8013536e+09
culvert_proxy_credential_expiry_timestamp_seconds{name="berlin",role="operators"} 1.8013968e+09
`), family); err != nil {
		t.Error(err)
	}
	if problems, err := testutil.GatherAndLint(registry); err != nil || len(problems) > 0 {
		t.Error(problems, err)
	}
}

func TestAddress(t *testing.T) {
	t.Parallel()
	trusted, err := access.ParseTrusted("10.0.0.0/8")
	if err != nil {
		t.Fatal(err)
	}
	local, err := access.ParseTrusted("::1")
	if err != nil {
		t.Fatal(err)
	}
	a, _ := newAuthenticator(t, "{}", trusted, local)
	for _, c := range []struct{ peer, forwarded, want string }{
		{"192.0.2.1:80", "", "192.0.2.1/32"},
		{"192.0.2.1:80", "203.0.113.1", "192.0.2.1/32"}, // a stranger's word
		{"10.0.0.1:80", "203.0.113.1", "203.0.113.1/32"},
		{"10.0.0.1:80", "198.51.100.1, 203.0.113.1", "203.0.113.1/32"}, // the first is the client's word
		{"10.0.0.1:80", "198.51.100.1, 203.0.113.1,10.2.3.4", "203.0.113.1/32"},
		{"10.0.0.1:80", "nonsense", "10.0.0.1/32"},
		{"10.0.0.1:80", "203.0.113.1, nonsense", "10.0.0.1/32"},
		{"10.0.0.1:80", "", "10.0.0.1/32"},
		{"[::1]:80", "203.0.113.1:4711", "203.0.113.1/32"},
		{"[::1]:80", "[2001:db8:1:2:3::4]:4711", "2001:db8:1:2::/64"},
		{"[2001:db8:1:2:3::4]:80", "", "2001:db8:1:2::/64"},
		{"[::ffff:10.0.0.1]:80", "203.0.113.1", "203.0.113.1/32"},
	} {
		r := request(c.peer, "")
		if c.forwarded != "" {
			r.Header.Set("X-Forwarded-For", c.forwarded)
		}
		if got := a.Address(r).String(); got != c.want {
			t.Errorf("%s, %s: got %s, want %s", c.peer, c.forwarded, got, c.want)
		}
	}
	if _, err := access.ParseTrusted("10.0.0"); err == nil {
		t.Error("10.0.0 is taken")
	}
}

func TestCheckRegistration(t *testing.T) {
	t.Parallel()
	roles := mustCompile(t, `
agents:
- {name: webs, token_hash: `+hashOf("webs")+`, agents: ['*.web.lan'], hosts: [db.lan]}
- {name: root, token_hash: `+hashOf("root")+`, agents: [web.lan]}
- {name: other, token_hash: `+hashOf("other")+`, agents: [node.db.web.lan]}
- {name: wide, token_hash: `+hashOf("wide")+`, agents: ['*.lan', lan]}
`)
	a := access.New(roles, nil, prometheus.NewRegistry(), slog.New(slog.DiscardHandler))
	for _, c := range []struct {
		token, agent string
		targets      []string
		hosts        []string
		want         string
	}{
		{"webs", "a.web.lan", []string{"node"}, []string{"db.lan"}, ""},
		{"webs", "web.lan", nil, nil, "does not cover this name"},
		{"webs", "db.lan", nil, nil, "does not cover this name"},
		{"webs", "a.web.lan", nil, []string{"b.web.lan"}, `host "b.web.lan"`},
		{"webs", "a.web.lan", nil, []string{"*.db.lan"}, `host "*.db.lan"`},
		{"webs", "db.web.lan", []string{"node"}, nil, ""}, // it may have that name itself
		{"root", "web.lan", []string{"a"}, nil, `target "a" would have the name "a.web.lan"`},
		{"root", "web.lan", nil, nil, ""},
		{"wide", "lan", []string{"node"}, nil, ""},
		{"wide", "web.lan", []string{"a"}, nil, ""},
	} {
		id, err := a.Identify(request("", "Bearer "+c.token), "Authorization", c.agent)
		if err != nil {
			t.Fatal(err)
		}
		reg := &protocol.Registration{Hosts: c.hosts}
		for _, name := range c.targets {
			reg.Targets = append(reg.Targets, protocol.Target{Name: name})
		}
		err = roles.CheckRegistration(id, c.agent, reg)
		if refusal, ok := protocol.AsRefusal(err); c.want == "" && err != nil || c.want != "" && (!ok || refusal.Status != 403 || !strings.Contains(refusal.Message, c.want)) {
			t.Errorf("%s as %s, targets %v, hosts %v: got %v, want %q", c.token, c.agent, c.targets, c.hosts, err, c.want)
		}
	}
}

func TestRenew(t *testing.T) {
	t.Parallel()
	const before = `
agents:
- {name: a, token_hash: %[1]s, agents: [web-1]}
- {name: b, basic_auth: {username: b, password_hash: '%[2]s'}, agents: [web-2]}
- {name: c, client_cert: [c.lan], agents: [web-3]}
`
	old := fmt.Sprintf(before, hashOf("a"), secretHash())
	a, _ := newAuthenticator(t, old)
	ids := map[string]*access.Identity{}
	for name, r := range map[string]*http.Request{
		"web-1": request("", "Bearer a"), "web-2": request("", basic("b", "secret")), "web-3": withCert(request("", ""), true, "c.lan"),
	} {
		id, err := a.Identify(r, "Authorization", name)
		if err != nil {
			t.Fatal(err)
		}
		ids[name] = id
	}
	for what, c := range map[string]struct {
		roles string
		kept  string
	}{
		"the same":            {old, "web-1 web-2 web-3"},
		"a renamed":           {strings.Replace(old, "name: a", "name: z", 1), "web-1 web-2 web-3"},
		"a has another token": {strings.Replace(old, hashOf("a"), hashOf("z"), 1), "web-2 web-3"},
		"a has another reach": {strings.Replace(old, "web-1", "web-9", 1), "web-2 web-3"},
		"a has expired":       {strings.Replace(old, "name: a,", "name: a, expires: 2020-01-01,", 1), "web-2 web-3"},
		"b is another user":   {strings.Replace(old, "username: b", "username: z", 1), "web-1 web-3"},
		"c is gone":           {strings.Replace(old, "c.lan", "d.lan", 1), "web-1 web-2"},
		"nobody":              {"{}", ""},
	} {
		roles := mustCompile(t, c.roles)
		for name, id := range ids {
			if got, want := roles.Renew(id).MayBe(name), strings.Contains(c.kept, name); got != want {
				t.Errorf("%s: %s is kept: %v", what, name, got)
			}
		}
	}
	if !(*access.Roles)(nil).Renew(ids["web-1"]).MayBe("x") {
		t.Error("without roles not all is open")
	}
}

// TestReloadForgets: what was checked against old roles does not count any more.
func TestReloadForgets(t *testing.T) {
	t.Parallel()
	const role = "scrapers: [{name: p, token_hash: %s}]"
	a, _ := newAuthenticator(t, fmt.Sprintf(role, hashOf("old")))
	try := func(token string) access.Reason {
		_, err := a.Identify(request("", "Bearer "+token), "Authorization", "")
		return reason(err)
	}
	if try("old") != "" {
		t.Fatal("old")
	}
	a.SetRoles(mustCompile(t, fmt.Sprintf(role, hashOf("new"))))
	if try("old") != access.Wrong || try("new") != "" {
		t.Error("the old token still counts, or the new one does not")
	}
}

// FuzzLoad: no configuration panics or takes long, and none that is taken lets in
// who shows nothing.
func FuzzLoad(f *testing.F) {
	f.Add("scrapers: [{name: a, basic_auth: {username: a, password_hash: '" + secretHash() + "'}, agents: ['*.a.net', 'web-*']}]")
	f.Add("agents: [{name: a, token_hash: " + hashOf("a") + ", agents: ['*'], hosts: ['*.b'], push_jobs: ['a|b'], expires: 2027-01-01}]")
	f.Add("pushers: [{name: a, client_cert: [x], jobs: ['(?i)a.*']}]\noperators: [{name: b, token_file: /etc/hostname}]")
	f.Add("scrapers: [{name: a, agents: }]")
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, text string) {
		roles, err := compile(text, dir)
		if err != nil {
			return
		}
		a := access.New(roles, nil, prometheus.NewRegistry(), slog.New(slog.DiscardHandler))
		if _, err := a.Identify(request("192.0.2.1:1", ""), "Authorization", ""); reason(err) != access.Missing {
			t.Errorf("nothing was shown, and the answer is %v", err)
		}
		a.Identify(request("192.0.2.1:1", "Bearer x"), "Authorization", strings.Repeat("x", 300))
	})
}

func BenchmarkIdentify(b *testing.B) {
	a, _ := newAuthenticator(b, `
scrapers: [{name: prom, basic_auth: {username: prom, password_hash: '`+secretHash()+`'}}]
`)
	r := request("192.0.2.1:1", basic("prom", "secret"))
	for b.Loop() {
		if _, err := a.Identify(r, "Authorization", ""); err != nil {
			b.Fatal(err)
		}
	}
}
