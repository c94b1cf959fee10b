package agent_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/culvert-io/culvert/client/agent"
)

// TestLengths: bodies of all lengths around those of buffers and frames come through
// whole, on one connection, and so do answers that only tell a length.
func TestLengths(t *testing.T) {
	t.Parallel()
	text := strings.Repeat("0123456789abcdef", 20<<10)
	base, _ := newTarget(t, func(w http.ResponseWriter, r *http.Request) {
		n, _ := strconv.Atoi(r.URL.Query().Get("n"))
		w.Header().Set("Content-Length", strconv.Itoa(n))
		if r.URL.Query().Has("unchanged") {
			w.WriteHeader(http.StatusNotModified)
			return
		}
		io.WriteString(w, text[:n])
	})
	p := newProxy(t, nil)
	newAgent(t, p, func(c *agent.Config) { c.Targets = []agent.Target{{Name: "node", URL: base}} })
	conn, err := net.Dial("tcp", p.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	answers := bufio.NewReader(conn)
	for _, test := range []string{"GET ", "HEAD ", "GET unchanged&"} {
		method, query, _ := strings.Cut(test, " ")
		for _, around := range []int{0, 1 << 10, 4 << 10, 8 << 10, 60 << 10, 64 << 10, 124 << 10, 128 << 10, 300 << 10} {
			for n := max(0, around-3); n <= around+3; n++ {
				request, _ := http.NewRequest(method, fmt.Sprintf("http://node.web-1/metrics?%sn=%d", query, n), nil)
				request.WriteProxy(conn)
				resp, err := http.ReadResponse(answers, request)
				if err != nil {
					t.Fatalf("%s%d: %v", test, n, err)
				}
				body, err := io.ReadAll(resp.Body)
				want := text[:n]
				if test != "GET " {
					want = ""
				}
				if err != nil || string(body) != want {
					t.Fatalf("%s%d: %d bytes came, %v", test, n, len(body), err)
				}
			}
		}
	}
}

// TestBrokenLengths: a body that breaks off never looks whole, however little of it came.
func TestBrokenLengths(t *testing.T) {
	t.Parallel()
	const length = 200 << 10
	base, _ := newTarget(t, func(w http.ResponseWriter, r *http.Request) {
		n, _ := strconv.Atoi(r.URL.Query().Get("n"))
		w.Header().Set("Content-Length", strconv.Itoa(length))
		io.WriteString(w, strings.Repeat("x", n))
		w.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	})
	p := newProxy(t, nil)
	newAgent(t, p, func(c *agent.Config) { c.Targets = []agent.Target{{Name: "node", URL: base}} })
	for _, n := range []int{0, 1, 1000, 3900, 4096, 5000, 20_000, 60 << 10, 61 << 10, 64 << 10, 130_000} {
		conn, err := net.Dial("tcp", p.addr)
		if err != nil {
			t.Fatal(err)
		}
		conn.SetDeadline(time.Now().Add(patience))
		request, _ := http.NewRequest(http.MethodGet, fmt.Sprintf("http://node.web-1/metrics?n=%d", n), nil)
		request.WriteProxy(conn)
		resp, err := http.ReadResponse(bufio.NewReader(conn), request)
		if err == nil && resp.StatusCode == http.StatusOK {
			_, err = io.ReadAll(resp.Body)
		}
		switch timeout, _ := err.(net.Error); {
		case timeout != nil && timeout.Timeout():
			t.Errorf("%d bytes: no answer", n)
		case err == nil && resp.StatusCode != http.StatusBadGateway:
			t.Errorf("%d bytes: %s", n, resp.Status)
		}
		conn.Close()
	}
}
