package httpclient_test

import (
	"net/http"
	"net/url"
	"strings"
	"testing"

	"golang.org/x/net/http/httpproxy"

	"github.com/culvert-io/culvert/client/httpclient"
)

// FuzzNoProxy compares with the package that says what NO_PROXY means.
func FuzzNoProxy(f *testing.F) {
	lists := []string{
		"*", "a, *", "example.com", ".example.com", "*.example.com", "EXAMPLE.com:80", "example.com:443", ".", "*", "*.", "**", "*example.com", ":80", ",,", " ",
		"10.0.0.0/8", "10.1.2.3", "10.1.2.3:80", "10.1.2.3:443", "2001:db8::/32", "2001:db8::1", "[2001:db8::1]", "[2001:db8::1]:80", "[[2001:db8::1]]:80", "[2001:db8::1",
		"::ffff:10.1.2.3", "::ffff:10.1.2.0/120", "0.0.0.0/0", "grüße.example", "*.GRÜSSE.example", "xn--gre-6ka8i.example", "straße.example:80", "a\u0308.example", "\xff.example",
		"localhost", "com", "example.com.", "a,b , example.com", "fe80::1%eth0", "10.1.2.3/33", "日本.example,10.0.0.0/8",
	}
	urls := []string{
		"http://example.com", "https://example.com/x", "http://www.example.com:8080", "http://EXAMPLE.com", "http://example.com:443", "http://notexample.com", "http://10.1.2.3", "http://10.1.2.3:443",
		"http://[2001:db8::1]", "http://[2001:db8::1]:81", "http://[::ffff:10.1.2.3]", "http://[fe80::1%25eth0]", "http://localhost", "http://LOCALHOST", "http://127.0.0.9:1", "http://[::1]",
		"http://grüße.example", "http://www.grüße.example", "http://GRÜSSE.example", "http://xn--gre-6ka8i.example", "http://Straße.example", "http://ä.example", "http://日本.example:80", "http://example.com.", "http://%ff.example",
	}
	for _, list := range lists {
		for _, u := range urls {
			f.Add("http://proxy.example:3128", list, u)
		}
	}
	for _, proxy := range []string{"proxy.example:3128", "//proxy.example", "proxy", "https://joe:secret@proxy.example", "socks5://proxy.example"} {
		f.Add(proxy, "example.com", "http://elsewhere.example")
	}
	f.Fuzz(func(t *testing.T, proxy, list, target string) {
		through, err := url.Parse(proxy)
		if err != nil || list == "" || proxy == "" {
			return
		}
		u, err := url.Parse(target)
		if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" || strings.ContainsAny(u.Hostname(), "[]") {
			return // nobody can be reached there
		}
		want, _ := (&httpproxy.Config{HTTPProxy: through.String(), HTTPSProxy: through.String(), NoProxy: list}).ProxyFunc()(u)
		c := httpclient.Config{Proxy: httpclient.Proxy{ProxyURL: httpclient.URL{URL: through}, NoProxy: list}}
		got, err := httpclient.ProxyFor(c, &http.Request{URL: u})
		if err != nil {
			t.Fatal(err)
		}
		if (got == nil) != (want == nil) || got != nil && got.String() != want.String() {
			t.Errorf("no_proxy %q has %q go through %v, want %v", list, target, got, want)
		}
	})
}
