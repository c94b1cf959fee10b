package protocol_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/culvert-io/culvert/protocol"
)

// FuzzRegistration: what passes Check can be stored, routed and discovered.
func FuzzRegistration(f *testing.F) {
	f.Add([]byte(`{"version":"1","capabilities":["x"],"targets":[{"name":"router","path":"/snmp","params":{"module":["a"]},"labels":{"a":"b"}}],"hosts":["db","*.lan"],"labels":{"site":"b"},"later":1}`))
	f.Add([]byte(`{"targets":[{"name":"agent","path":"/"},{"name":"9100","path":"/"},{"name":"A","path":"/"}]}`))
	f.Add([]byte(`{"hosts":["web-1","agent.web-1","*.","*"],"labels":{"__x":"y","a":"\ud800"}}`))
	f.Add([]byte(`null`))
	f.Fuzz(func(t *testing.T, text []byte) {
		var r protocol.Registration
		if json.Unmarshal(text, &r) != nil || r.Check("web-1") != nil {
			return
		}
		routes := map[string]bool{"web-1": true, "agent.web-1": true}
		for _, target := range r.Targets {
			if err := protocol.CheckName(target.Name + ".web-1"); err != nil || strings.Contains(target.Name, ".") {
				t.Errorf("target %q: %v", target.Name, err)
			}
			if !strings.HasPrefix(target.ScrapePath(), "/") {
				t.Errorf("path %q", target.Path)
			}
			if full := target.Name + ".web-1"; routes[full] {
				t.Errorf("%q leads to two things", full)
			} else {
				routes[full] = true
			}
		}
		for _, host := range r.Hosts {
			if err := protocol.CheckName(strings.TrimPrefix(host, "*.")); err != nil || protocol.NormalizeName(host) != host {
				t.Errorf("host %q: %v", host, err)
			}
			if routes[host] {
				t.Errorf("%q leads to two things", host)
			}
			routes[host] = true
		}
		again, err := json.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		var back protocol.Registration
		if err := json.Unmarshal(again, &back); err != nil || back.Check("web-1") != nil {
			t.Errorf("it came back as %s: %v", again, err)
		}
		if third, _ := json.Marshal(back); !bytes.Equal(third, again) {
			t.Errorf("%s became %s", again, third)
		}
	})
}

// FuzzAllows: a path that is allowed stays below the prefix, however a target
// reads it.
func FuzzAllows(f *testing.F) {
	for _, p := range []string{"/x/a", "/x/../y", "/x/%2e%2e/y", "/x/%252e%252e/y", "/x/..%2fy", `/x/..\y`, "/x/..%255cy", "/x//a/%20"} {
		f.Add(p)
	}
	f.Fuzz(func(t *testing.T, asked string) {
		if !(protocol.Target{Name: "t", Path: "/x/*"}).Allows(asked) {
			return
		}
		seen := asked
		for decodings := range 3 {
			for _, reading := range []string{seen, strings.ReplaceAll(seen, `\`, "/")} {
				if clean := path.Clean(reading); clean != "/x" && !strings.HasPrefix(clean, "/x/") {
					t.Fatalf("%q is %q after %d decodings", asked, clean, decodings)
				}
			}
			next, err := url.PathUnescape(seen)
			if err != nil {
				return
			}
			seen = next
		}
	})
}

func FuzzSplitAuthority(f *testing.F) {
	for _, a := range []string{"web-1:9100", "Web-1.:9100", "[::1]:9100", "[::1]", "::1", "[fe80::1%25eth0]:1", ":", "[", "]", "[]:", "a:b:c", "[a]b:1"} {
		f.Add(a)
	}
	f.Fuzz(func(t *testing.T, authority string) {
		name, port := protocol.SplitAuthority(authority)
		if strings.ContainsAny(name, "ABCDEFGHIJKLMNOPQRSTUVWXYZ") || strings.ContainsAny(port, ":[]") {
			t.Errorf("%q became %q, %q", authority, name, port)
		}
		if protocol.CheckName(name) != nil {
			return
		}
		if host, p, err := net.SplitHostPort(authority); err == nil && (p != port || protocol.NormalizeName(host) != name) {
			t.Errorf("%q became %q, %q; the standard library says %q, %q", authority, name, port, host, p)
		}
		if n, p := protocol.SplitAuthority(net.JoinHostPort(name, port)); n != name || p != port {
			t.Errorf("%q became %q, %q, then %q, %q", authority, name, port, n, p)
		}
	})
}

func FuzzUpgradeRequest(f *testing.F) {
	f.Add([]byte(upgradeRequest))
	f.Add([]byte("GET /tunnel HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\nSec-WebSocket-Protocol: culvert.v1\r\n\r\n"))
	f.Add([]byte("GET /tunnel HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: culvert/\xff, ,\r\n\r\n"))
	f.Fuzz(func(t *testing.T, raw []byte) {
		r, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(raw)))
		if err != nil {
			return
		}
		transport, refusal := protocol.CheckUpgrade(r)
		switch {
		case refusal == nil:
			if transport != "upgrade" && transport != "websocket" {
				t.Errorf("accepted as %q", transport)
			}
			return
		case transport != "" || refusal.Code == "":
			t.Errorf("%q, %v", transport, refusal)
		}
		// The refusal quotes the request: it must not write into the response.
		w := httptest.NewRecorder()
		refusal.Write(w)
		head := "HTTP/1.1 400 " + refusal.Reason() + "\r\nContent-Length: 0\r\n\r\n"
		resp, err := http.ReadResponse(bufio.NewReader(strings.NewReader(head)), nil)
		if err != nil || len(resp.Header) != 1 || len(refusal.Reason()) > 400 {
			t.Errorf("%q: %v", head, err)
		}
	})
}

// FuzzFrames sends bytes to the proxy's end of a session, by both transports,
// and then nothing more.
func FuzzFrames(f *testing.F) {
	open := frame(typeWindow, flagSYN, 1, 0)
	f.Add([]byte{}, false)
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"), true)
	f.Add(frames(open, frame(typeData, 0, 1, 5, []byte("hello")...), frame(typeWindow, flagFIN, 1, 0)), true)
	f.Add(frames(open, open), false)
	f.Add(frames(open, frame(typeData, flagFIN, 1, 1<<31)), true)
	f.Add(frames(frame(typePing, flagSYN, 0, 1), frame(typeGoAway, 0, 0, 0), open), false)
	f.Add(frames(frame(typeData, 0, 7, 4, []byte("none")...), frame(typeWindow, flagRST|flagACK, 7, 1)), false)
	const deadAfter = 50 * time.Millisecond
	server, accepted := tunnel{proxy: protocol.SessionConfig{DeadAfter: deadAfter, MaxStreams: 16}}.serve(f)
	f.Fuzz(func(t *testing.T, sent []byte, webSocket bool) {
		var conn io.ReadWriteCloser
		if webSocket {
			ws, _, err := websocket.Dial(t.Context(), server.URL+"/tunnel", &websocket.DialOptions{Subprotocols: []string{"culvert.v1"}})
			if err != nil {
				t.Fatal(err)
			}
			defer ws.CloseNow()
			conn = websocket.NetConn(t.Context(), ws, websocket.MessageBinary)
		} else {
			c, err := net.Dial("tcp", server.Listener.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			io.WriteString(c, upgradeRequest)
			conn = c
		}
		s := session(t, accepted)
		serve(t, s, echo)
		read := make(chan struct{})
		go func() { defer close(read); io.Copy(io.Discard, conn) }()
		conn.Write(sent)
		select {
		case <-s.Done():
		case <-time.After(deadAfter + patience):
			t.Fatalf("the session is alive %s after the last byte", patience)
		}
		if s.Err() == nil {
			t.Error("the session ended without an error")
		}
		s.Close()
		conn.Close()
		<-read
	})
}

// TestRegistrationIgnoresUnknownFields: an older proxy takes a newer agent.
func TestRegistrationIgnoresUnknownFields(t *testing.T) {
	var r protocol.Registration
	err := json.Unmarshal([]byte(`{"later":{"a":[1]},"targets":[{"name":"a","path":"/","later":true}],"capabilities":["later"]}`), &r)
	want := protocol.Registration{Targets: []protocol.Target{{Name: "a", Path: "/"}}, Capabilities: []string{"later"}}
	if err != nil || !reflect.DeepEqual(r, want) || r.Check("web-1") != nil {
		t.Errorf("%+v, %v", r, err)
	}
}
