package protocol_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/culvert-io/culvert/protocol"
)

// control is what came as a control request.
type control struct {
	method, target, contentType, body string
}

// answering serves the control requests that come through a session.
func answering(t testing.TB, s *protocol.Session, answer func(http.ResponseWriter, *http.Request)) <-chan control {
	requests := make(chan control, 1)
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		if !protocol.IsControl(r) {
			t.Errorf("%s %s is no control request", r.Method, r.RequestURI)
		}
		requests <- control{r.Method, r.RequestURI, r.Header.Get("Content-Type"), string(body)}
		answer(w, r)
	})}
	served := make(chan error, 1)
	go func() { served <- server.Serve(s.Listener()) }()
	t.Cleanup(func() {
		server.Close()
		s.Close()
		<-served
	})
	return requests
}

func TestControlRequests(t *testing.T) {
	p := tunnel{}.open(t)
	fine := func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) }
	atProxy, atAgent := answering(t, p.proxy, fine), answering(t, p.agent, fine)
	registration := &protocol.Registration{
		Version:      "1.2.3",
		Capabilities: []string{"future"},
		Targets: []protocol.Target{
			{Name: "router", Path: "/snmp", Params: map[string][]string{"module": {"if_mib"}}, Labels: map[string]string{"kind": "router"}},
			{Name: "all", Path: "/exporters/*"},
		},
		Hosts:  []string{"db-2.berlin.lan", "*.berlin.lan"},
		Labels: map[string]string{"site": "berlin"},
	}
	const asJSON = `{"version":"1.2.3","capabilities":["future"],` +
		`"targets":[{"name":"router","path":"/snmp","params":{"module":["if_mib"]},"labels":{"kind":"router"}},` +
		`{"name":"all","path":"/exporters/*"}],` +
		`"hosts":["db-2.berlin.lan","*.berlin.lan"],"labels":{"site":"berlin"}}`
	for name, c := range map[string]struct {
		call func() error
		at   <-chan control
		want control
	}{
		"register": {func() error { return p.agent.Register(t.Context(), registration) }, atProxy,
			control{"PUT", "/v1/registration", "application/json", asJSON}},
		"check": {func() error { return p.agent.CheckRegistration(t.Context(), &protocol.Registration{}) }, atProxy,
			control{"PUT", "/v1/registration?check=true", "application/json", "{}"}},
		"leave": {func() error { return p.agent.Leave(t.Context()) }, atProxy,
			control{"DELETE", "/v1/registration", "application/json", "null"}},
		"the agent drains": {func() error { return p.agent.SendDrain(t.Context(), protocol.Drain{Reason: "shutdown"}) }, atProxy,
			control{"POST", "/v1/drain", "application/json", `{"reason":"shutdown"}`}},
		"the proxy drains": {func() error {
			return p.proxy.SendDrain(t.Context(), protocol.Drain{Reason: "shutdown", ReconnectAfterSeconds: 2.5})
		}, atAgent,
			control{"POST", "/v1/drain", "application/json", `{"reason":"shutdown","reconnect_after_seconds":2.5}`}},
	} {
		t.Run(name, func(t *testing.T) {
			if err := c.call(); err != nil {
				t.Fatal(err)
			}
			if got := await(t, "request", c.at); got != c.want {
				t.Errorf("got  %q\nwant %q", got, c.want)
			}
		})
	}
	var back protocol.Registration
	if err := json.Unmarshal([]byte(asJSON), &back); err != nil || !reflect.DeepEqual(&back, registration) {
		t.Errorf("the registration came back as %+v, %v", back, err)
	}
	eventually(t, "the control streams are closed", func() bool { return p.agent.NumStreams() == 0 && p.proxy.NumStreams() == 0 })
}

// TestMessagesOfTheSpecification reads the HTTP messages that SPEC.md shows.
func TestMessagesOfTheSpecification(t *testing.T) {
	text, err := os.ReadFile("SPEC.md")
	if err != nil {
		t.Fatal(err)
	}
	bodies := map[string]string{}
	for i, block := range strings.Split(string(text), "```\n") {
		first, _, _ := strings.Cut(block, "\n")
		if i%2 == 0 || !strings.HasSuffix(first, " HTTP/1.1") && !regexp.MustCompile(`^HTTP/1.1 \d`).MatchString(first) {
			continue
		}
		head, body, _ := strings.Cut(block, "\n\n")
		raw := strings.ReplaceAll(head, "\n", "\r\n") + "\r\n\r\n" + body
		r := bufio.NewReader(strings.NewReader(raw))
		var length int64
		if strings.HasPrefix(first, "HTTP/1.1") {
			resp, err := http.ReadResponse(r, nil)
			if err != nil {
				t.Fatalf("%s: %v", first, err)
			}
			length = resp.ContentLength
		} else {
			req, err := http.ReadRequest(r)
			if err != nil {
				t.Fatalf("%s: %v", first, err)
			}
			if transport, refusal := protocol.CheckUpgrade(req); req.URL.Path == protocol.PathTunnel && transport != "upgrade" {
				t.Errorf("%s: %v", first, refusal)
			}
			length = req.ContentLength
		}
		if n := len(body); length > 0 && length != int64(n) && length != int64(n-1) {
			t.Errorf("%s: Content-Length %d, the body has %d bytes", first, length, n)
		}
		bodies[first] = body
	}
	var r protocol.Registration
	if err := json.Unmarshal([]byte(bodies["PUT /v1/registration HTTP/1.1"]), &r); err != nil || r.Check("web-1") != nil || len(r.Targets) != 2 || len(r.Hosts) != 2 {
		t.Errorf("the registration is %+v, %v, %v", r, err, r.Check("web-1"))
	}
	var d protocol.Drain
	if err := json.Unmarshal([]byte(bodies["POST /v1/drain HTTP/1.1"]), &d); err != nil || d.ReconnectAfterSeconds != 2.5 {
		t.Errorf("the drain is %+v, %v", d, err)
	}
}

func TestControlRefusals(t *testing.T) {
	p := tunnel{}.open(t)
	want := protocol.Refusal{Status: http.StatusConflict, Code: protocol.CodeTaken, Message: `the name "web-1" is taken`}
	answering(t, p.proxy, func(w http.ResponseWriter, _ *http.Request) { want.Write(w) })
	refusal, ok := protocol.AsRefusal(p.agent.Register(t.Context(), &protocol.Registration{}))
	if !ok || *refusal != want {
		t.Errorf("got %v, want %v", refusal, &want)
	}
}

// TestControlWithoutAnswer: callers bound control requests by their context.
func TestControlWithoutAnswer(t *testing.T) {
	p := tunnel{}.open(t)
	hang := make(chan struct{})
	t.Cleanup(func() { close(hang) })
	requests := answering(t, p.proxy, func(http.ResponseWriter, *http.Request) { <-hang })
	cause := errors.New("no time left")
	ctx, cancel := context.WithTimeoutCause(t.Context(), 100*time.Millisecond, cause)
	defer cancel()
	if err := p.agent.Register(ctx, &protocol.Registration{}); !errors.Is(err, cause) {
		t.Errorf("%v, want %v", err, cause)
	}
	await(t, "request", requests)
	p.proxy.Close()
	awaitEnd(t, p.agent, protocol.ErrPeerClosed)
	if err := p.agent.Register(t.Context(), &protocol.Registration{}); !protocol.IsSessionEnd(err) {
		t.Errorf("after the end: %v", err)
	}
}

func TestIsControl(t *testing.T) {
	for target, want := range map[string]bool{
		"/v1/drain": true, "/": true, "//web-1/metrics": true,
		"http://web-1/metrics": false, "web-1:9100": false, "*": false,
	} {
		if got := protocol.IsControl(&http.Request{RequestURI: target}); got != want {
			t.Errorf("IsControl(%q) is %v", target, got)
		}
	}
}

func TestRefusalWrite(t *testing.T) {
	w := httptest.NewRecorder()
	r := protocol.Refusef(http.StatusUpgradeRequired, protocol.CodeVersion, "we speak %d", 1)
	r.RetryAfter = 1500 * time.Millisecond
	r.Write(w)
	for name, want := range map[string]string{
		"Culvert-Error": "version", "Culvert-Message": "we speak 1", "Upgrade": "culvert/1", "Connection": "Upgrade", "Retry-After": "2",
		"Content-Type": "text/plain; charset=utf-8", "X-Content-Type-Options": "nosniff",
	} {
		if got := w.Header().Get(name); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	if w.Code != 426 || w.Body.String() != "we speak 1\n" {
		t.Errorf("%d %q", w.Code, w.Body)
	}
}
