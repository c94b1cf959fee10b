package server_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/culvert-io/culvert/protocol"
	"github.com/culvert-io/culvert/proxy/server"
)

// TestClaimantGoesAway: a claim to a live agent's name that is given up while the
// proxy asks the holder must not succeed, nor may a DELETE.
func TestClaimantGoesAway(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	r := newRelay(t, p)
	d := &protocol.Dialer{ProxyURL: mustParse(t, r.url), Agent: "victim", Instance: "1"}
	victim, err := d.Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { victim.Close() })
	if err := victim.Register(t.Context(), &protocol.Registration{}); err != nil {
		t.Fatal(err)
	}
	for _, method := range []string{"PUT", "DELETE"} {
		for range 20 {
			claimant := dial(t, p, "victim", "2")
			stream, err := claimant.Open(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			fmt.Fprintf(stream, "%s /v1/registration HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}", method)
			stream.Close()
			claimant.Ping(t.Context()) // the proxy has read all that
			claimant.Close()
		}
	}
	if victim.Err() != nil || !strings.Contains(p.get("/api/v1/agents/victim").body, `"connected":true`) {
		t.Errorf("the victim lost its name: %v, %s", victim.Err(), p.get("/api/v1/agents/victim").body)
	}
}

// TestPingFlood: somebody who pings and reads nothing is cut off.
func TestPingFlood(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	conn := rawConn(t, p.addr)
	fmt.Fprint(conn, "GET /tunnel HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: culvert/1\r\nCulvert-Agent: flood\r\nCulvert-Instance: 1\r\n\r\n")
	ping := []byte{0, 2, 0, 1, 0, 0, 0, 0, 0, 0, 0, 1}
	for range 10_000 {
		if _, err := conn.Write(ping); err != nil {
			return // it was cut off
		}
	}
	conn.SetReadDeadline(time.Now().Add(patience))
	if _, err := io.Copy(io.Discard, conn); err != nil && strings.Contains(err.Error(), "timeout") {
		t.Error("10,000 pings went through")
	}
}

// TestHeldPlaces: scrapers that send no body, or read none, give the agent's
// places back at their timeout.
func TestHeldPlaces(t *testing.T) {
	t.Parallel()
	p := newProxy(t, func(c *server.Config) { c.Fleet.MaxScrapes = 2 })
	_, port := newTarget(t, nil)
	_, big := newTarget(t, func(w http.ResponseWriter, _ *http.Request) {
		chunk := make([]byte, 1<<20)
		for range 64 {
			if _, err := w.Write(chunk); err != nil {
				return
			}
		}
	})
	newAgent(t, p, allowAll)
	for name, request := range map[string]string{
		"no body":    "POST http://web-1:" + port + "/ HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n" + timeoutHeader + "0.5\r\n\r\n",
		"no reading": "GET http://web-1:" + big + "/ HTTP/1.1\r\nHost: x\r\n" + timeoutHeader + "0.5\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			for range 2 {
				conn := rawConn(t, p.addr)
				conn.(*net.TCPConn).SetReadBuffer(4096)
				io.WriteString(conn, request)
			}
			eventually(t, "a place is free", func() bool {
				return p.get("http://web-1:"+port+"/metrics", timeoutHeader+"5").code == 200
			})
		})
	}
}

// TestOddStatuses: what an agent answers never becomes a success, or something
// that is no HTTP.
func TestOddStatuses(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	s := register(t, p, "odd", "1", protocol.Registration{})
	answers := make(chan string, 1)
	go func() {
		for {
			stream, err := s.Accept(context.Background())
			if err != nil {
				return
			}
			go func() {
				defer stream.Close()
				stream.Read(make([]byte, 4096))
				io.WriteString(stream, <-answers)
			}()
		}
	}()
	for _, status := range []string{"099 X", "000 X", "204 X", "200 X", "302 X", "600 X"} {
		for _, request := range []string{"GET", "CONNECT"} {
			answers <- "HTTP/1.1 " + status + "\r\nCulvert-Error: no\r\nContent-Length: 1\r\n\r\nx"
			target := "http://odd:1/metrics"
			if request == "CONNECT" {
				target = "odd:1"
				if status == "200 X" {
					<-answers // this is how a tunnel opens
					continue
				}
			}
			if a := p.send(request, target); a.code != 502 {
				t.Errorf("%s answered by %s: got %d %s", request, status, a.code, a.reason)
			}
		}
	}
	// A head without an end.
	answers <- "HTTP/1.1 200 OK\r\n" + strings.Repeat("X: "+strings.Repeat("y", 1000)+"\r\n", 200)
	if a := p.send("CONNECT", "odd:1", timeoutHeader+"5"); a.code != 502 {
		t.Errorf("a head of 200 kB: got %d %s", a.code, a.reason)
	}
}

// TestTargetResetsThroughCONNECT: a body that ends with its connection must not
// look complete when the target broke it off.
func TestTargetResetsThroughCONNECT(t *testing.T) {
	t.Parallel()
	p := newProxy(t, nil)
	newAgent(t, p, allowAll)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	sent := make(chan net.Conn, 1)
	go func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		conn.Read(make([]byte, 1024))
		io.WriteString(conn, "HTTP/1.0 200 OK\r\n\r\nhalf")
		sent <- conn
	}()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	scraper := rawConn(t, p.addr)
	fmt.Fprintf(scraper, "CONNECT web-1:%s HTTP/1.1\r\nHost: x\r\n\r\nGET / HTTP/1.0\r\n\r\n", port)
	got := make([]byte, 0, 1024)
	for !strings.HasSuffix(string(got), "half") {
		chunk := make([]byte, 1024)
		n, err := scraper.Read(chunk)
		if err != nil {
			t.Fatalf("after %q: %v", got, err)
		}
		got = append(got, chunk[:n]...)
	}
	protocol.Reset(<-sent)
	if _, err := io.ReadAll(scraper); err == nil {
		t.Error("the scraper saw a clean end")
	}
}

func mustParse(t *testing.T, raw string) *url.URL {
	t.Helper()
	u, err := url.Parse(raw)
	if err != nil {
		t.Fatal(err)
	}
	return u
}
