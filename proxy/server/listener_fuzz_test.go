package server_test

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/culvert-io/culvert/protocol"
	"github.com/culvert-io/culvert/proxy/server"
)

// FuzzListener sends bytes to a listener of a proxy, and then ends its half of the
// connection: to the front door where agents come in too, or to one with roles. The proxy
// answers in HTTP or says nothing, closes the connection, and panics nowhere.
func FuzzListener(f *testing.F) {
	const hello = "GET /tunnel HTTP/1.1\r\nHost: x\r\n" + upgrade + "\r\n"
	stream := func(request string) string {
		n := len(request)
		return "\x00\x01\x00\x01\x00\x00\x00\x01\x00\x00\x00\x00" + "\x00\x00\x00\x04\x00\x00\x00\x01\x00\x00" + string([]byte{byte(n >> 8), byte(n)}) + request
	}
	f.Add([]byte(hello), false)
	f.Add([]byte(hello+stream("PUT /v1/registration HTTP/1.1\r\nHost: x\r\nContent-Length: 47\r\n\r\n"+`{"targets":[{"name":"a","path":"/"}],"hosts":[]}`)), false)
	f.Add([]byte(hello+stream("DELETE /v1/registration HTTP/1.1\r\nHost: x\r\n\r\n")+"\x00\x02\x00\x01\x00\x00\x00\x00\x00\x00\x00\x07"), false)
	f.Add([]byte(hello+stream("POST /v1/drain HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n")), false)
	f.Add([]byte(hello+stream("PUT /metrics/job/x HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nCulvert-Push-Id: aaaaaaaaaaaaaaaa/1\r\n\r\nm 1\n")), false)
	f.Add([]byte("GET http://web-1:9100/metrics HTTP/1.1\r\nHost: x\r\nProxy-Authorization: Basic eDp5\r\n\r\n"), true)
	f.Add([]byte("CONNECT agent.web-1:80 HTTP/1.1\r\nHost: x\r\n\r\nGET / HTTP/1.1\r\n\r\n"), false)
	f.Add([]byte("PUT /metrics/job@base64/eA==/a/b?interval=1h HTTP/1.1\r\nHost: x\r\nContent-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n\r\n"), false)
	f.Add([]byte("GET /scrape/web-1/9100/%2e%2e/x?y HTTP/1.0\r\n\r\nGET /targets?match[]={a=\"b\"} HTTP/1.1\r\nHost: y\r\n\r\n"), false)
	f.Add([]byte("GET /clients HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer x\r\n\r\n"), true)
	logs := &logBuffer{}
	start := func(settings string) *server.Server {
		config := server.Config{
			ListenAddresses: []string{"127.0.0.1:0"}, ReconnectWait: -1, ShutdownTimeout: time.Second,
			Logger: slog.New(slog.NewTextHandler(logs, &slog.HandlerOptions{Level: slog.LevelError})),
		}
		config.Fleet.SettleTime, config.Fleet.MaxKnown = -1, 10
		config.Push.MaxGroups = 10
		if settings != "" {
			config.ConfigFile = filepath.Join(f.TempDir(), "culvert.yml")
			writeFile(f, config.ConfigFile, settings)
		}
		s, err := server.New(config)
		if err != nil {
			f.Fatal(err)
		}
		if err := s.Listen(); err != nil {
			f.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan struct{})
		go func() { defer close(done); s.Run(ctx) }()
		f.Cleanup(func() { cancel(); <-done })
		return s
	}
	open, closed := start(""), start(everyRole())
	f.Fuzz(func(t *testing.T, sent []byte, roles bool) {
		addr := open.Addr()
		if roles {
			addr = closed.Addr()
		}
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(long))
		go func() {
			conn.Write(sent)
			conn.(*net.TCPConn).CloseWrite()
		}()
		got, err := io.ReadAll(conn)
		if err != nil && !isBroken(err) {
			t.Fatalf("the connection is still open: %v", err)
		}
		if text := logs.String(); strings.Contains(text, "panic") {
			t.Fatal(text)
		}
		r := bufio.NewReader(bytes.NewReader(got))
		for {
			if _, err := r.Peek(1); err != nil {
				return
			}
			method := http.MethodGet
			if bytes.HasPrefix(sent, []byte("HEAD ")) {
				method = http.MethodHead
			}
			resp, err := http.ReadResponse(r, &http.Request{Method: method})
			if err != nil {
				t.Fatalf("the answer is no HTTP: %v\n%q", err, got)
			}
			if resp.StatusCode == http.StatusSwitchingProtocols || bytes.Contains(sent, []byte("HEAD ")) || resp.Header.Get("Connection") == "close" {
				return // frames follow, or nothing that can be told apart
			}
			if strings.ContainsAny(resp.Header.Get(protocol.HeaderMessage), "\r\n") {
				t.Errorf("the header %v", resp.Header)
			}
			if _, err := io.Copy(io.Discard, resp.Body); err != nil {
				return // the proxy broke it off
			}
		}
	})
}
