package server_test

import (
	"bufio"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"

	"github.com/culvert-io/culvert/client/agent"
	"github.com/culvert-io/culvert/proxy/server"
)

// TestNothingHidden: of bytes that two readers of HTTP may take for one request or for
// two, the proxy refuses those that are no good HTTP, and of the others the second is never
// what the target gets, nor a control request. The hidden request carries credentials for
// all, so what keeps it from counting is the reading alone.
func TestNothingHidden(t *testing.T) {
	t.Parallel()
	var mu sync.Mutex // protects seen
	var seen []string
	_, port := newTarget(t, func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		mu.Lock()
		defer mu.Unlock()
		seen = append(seen, r.Method+" "+r.URL.Path)
		if v := r.Header.Values("Transfer-Encoding"); len(v) > 0 || r.Trailer["Transfer-Encoding"] != nil || r.Trailer["Content-Length"] != nil {
			t.Errorf("%s has %v, trailers %v", r.URL.Path, v, r.Trailer)
		}
		fmt.Fprintln(w, "up 1")
	})
	file := newRolesFile(t, everyRole())
	p := newProxy(t, func(c *server.Config) { c.ConfigFile, c.EnableLifecycle = file.path, true })
	newAgent(t, p, func(c *agent.Config) { c.Name, c.TokenFile = "web-1.example.net", tokenFile(t, "agent"); allowAll(c) })
	credentials := "Proxy-Authorization: " + basic("prom", "secret") + "\r\nAuthorization: " + basic("root", "secret") + "\r\n"
	host := "web-1.example.net:" + port
	hidden := "GET http://" + host + "/hidden HTTP/1.1\r\nHost: x\r\n" + credentials + "\r\n"
	reload := "POST /-/reload HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n" + credentials + "\r\n"
	post := "POST http://" + host + "/shown HTTP/1.1\r\nHost: " + host + "\r\n" + credentials
	get := "GET http://" + host + "/shown HTTP/1.1\r\nHost: " + host + "\r\n" + credentials
	for what, request := range map[string]string{
		"length with a sign":             post + "Content-Length: +4\r\n\r\nabcd",
		"length in hexadecimal":          post + "Content-Length: 0x4\r\n\r\nabcd",
		"list of lengths":                post + "Content-Length: 4, 5\r\n\r\nabcd",
		"length with an underscore":      post + "Content-Length: 1_0\r\n\r\nabcd",
		"length beyond 64 bits":          post + "Content-Length: 18446744073709551620\r\n\r\nabcd",
		"coding behind a tab":            post + "Content-Length: 4\r\nTransfer-Encoding:\tchunked\r\n\r\n0\r\n\r\n",
		"coding with a vertical tab":     post + "Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
		"coding twice":                   post + "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
		"coding in quotes":               post + "Transfer-Encoding: \"chunked\"\r\n\r\n0\r\n\r\n",
		"coding in a folded line":        post + "X-A: b\r\n Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
		"field without a colon":          post + "Content-Length 4\r\n\r\n",
		"field without a name":           post + ": 4\r\n\r\n",
		"field with an underscore":       post + "Content_Length: 4\r\nContent-Length: 0\r\n\r\n",
		"field that begins with a blank": "GET http://" + host + "/shown HTTP/1.1\r\n Host: x\r\n" + credentials + "\r\n",
		"two hosts":                      get + "Host: ghost\r\n\r\n",
		"no host":                        "GET http://" + host + "/shown HTTP/1.1\r\n" + credentials + "\r\n",
		"host with a blank":              "GET /clients HTTP/1.1\r\nHost: a b\r\n" + credentials + "\r\n",
		"size of a chunk with a sign":    post + "Transfer-Encoding: chunked\r\n\r\n+4\r\nabcd\r\n0\r\n\r\n",
		"size of a chunk beyond 64 bits": post + "Transfer-Encoding: chunked\r\n\r\n10000000000000004\r\nabcd\r\n0\r\n\r\n",
		"size of a chunk with a blank":   post + "Transfer-Encoding: chunked\r\n\r\n4 \r\nabcd\r\n0\r\n\r\n",
		"extension with a line end":      post + "Transfer-Encoding: chunked\r\n\r\n4;a\nb\r\nabcd\r\n0\r\n\r\n",
		"chunk longer than it says":      post + "Transfer-Encoding: chunked\r\n\r\n4\r\nabcde\r\n0\r\n\r\n",
		"chunk without its end":          post + "Transfer-Encoding: chunked\r\n\r\n4\r\nabcd0\r\n\r\n",
		"trailers":                       post + "Trailer: X-A\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nabcd\r\n0\r\nX-A: b\r\nTransfer-Encoding: chunked\r\nContent-Length: 99\r\n\r\n",
		"line ends without CR":           strings.ReplaceAll(get, "\r\n", "\n") + "\n",
		"three words too many":           "GET http://" + host + "/shown HTTP/1.1 HTTP/1.1\r\nHost: x\r\n" + credentials + "\r\n",
		"tabs for blanks":                "GET\thttp://" + host + "/shown\tHTTP/1.1\r\nHost: x\r\n" + credentials + "\r\n",
		"two blanks":                     "GET  http://" + host + "/shown HTTP/1.1\r\nHost: x\r\n" + credentials + "\r\n",
		"another version":                "GET http://" + host + "/shown HTTP/1.2\r\nHost: x\r\n" + credentials + "\r\n",
		"HTTP/0.9":                       "GET http://" + host + "/shown\r\n",
		"HTTP/2":                         "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
		"coding in HTTP/1.0":             "POST http://" + host + "/shown HTTP/1.0\r\nHost: x\r\n" + credentials + "Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
		"upgrade to HTTP/2":              get + "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n",
		"a length that is a hop's":       post + "Connection: Content-Length\r\nContent-Length: 4\r\n\r\nabcd",
		"a coding that is a hop's":       post + "Connection: Transfer-Encoding, Host\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nabcd\r\n0\r\n\r\n",
		"a request as the body":          post + fmt.Sprintf("Content-Length: %d\r\n\r\n", len(hidden)+len(reload)) + hidden + reload,
		"a request as a chunk":           post + fmt.Sprintf("Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n", len(reload), reload),
		"a request in the path":          "GET http://" + host + "/shown%20HTTP/1.1%0d%0aHost:%20x%0d%0a%0d%0aGET%20/hidden HTTP/1.1\r\nHost: x\r\n" + credentials + "\r\n",
		"a host in the user":             "GET http://ghost@" + host + "/shown HTTP/1.1\r\nHost: x\r\n" + credentials + "\r\n",
		"a host behind a #":              "GET http://ghost#@" + host + "/shown HTTP/1.1\r\nHost: x\r\n" + credentials + "\r\n",
		"a host behind a slash":          `GET http://ghost\@` + host + "/shown HTTP/1.1\r\nHost: x\r\n" + credentials + "\r\n",
		"early data of CONNECT":          "CONNECT " + host + " HTTP/1.1\r\nHost: ghost\r\nContent-Length: 3\r\n" + credentials + "\r\nGET /shown HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
	} {
		conn := rawConn(t, p.addr)
		io.WriteString(conn, request)
		conn.(interface{ CloseWrite() error }).CloseWrite()
		answers, r := 0, bufio.NewReader(conn)
		for {
			method, _, _ := strings.Cut(request, " ")
			if answers > 0 {
				method = "GET"
			}
			a := readAnswer(r, method)
			if a.code == 0 {
				if a.err != io.ErrUnexpectedEOF && a.err != io.EOF && !isBroken(a.err) {
					t.Errorf("%s: %v", what, a.err)
				}
				break
			}
			answers++
		}
		if most := 1 + strings.Count(request, "CONNECT"); answers > most {
			t.Errorf("%s: %d answers to one request", what, answers)
		}
		conn.Close()
	}
	if n := p.logs.count("Configuration reloaded"); n != 0 {
		t.Errorf("%d hidden requests reached the control", n)
	}
	mu.Lock()
	defer mu.Unlock()
	for _, request := range seen {
		if !strings.HasSuffix(request, "/shown") && !strings.Contains(request, "/shown HTTP/1.1\r\n") {
			t.Errorf("the target got %q", request)
		}
	}
	if len(seen) == 0 {
		t.Error("the target got nothing at all")
	}
}
