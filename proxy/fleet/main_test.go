package fleet_test

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/culvert-io/culvert/protocol"
	"github.com/culvert-io/culvert/proxy/fleet"
)

// openFile, where it is set, makes the test binary open that store and tell how
// many agents it knows: a crash is a result here, see TestDamage.
const openFile = "CULVERT_TEST_OPEN_FLEET"

func TestMain(m *testing.M) {
	if path := os.Getenv(openFile); path != "" {
		f, err := fleet.Open(fleet.Config{Path: path})
		if err != nil {
			fmt.Println("error:", err)
			return
		}
		fmt.Println("agents:", len(f.Agents()))
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		f.Run(ctx)
		return
	}
	goleak.VerifyTestMain(m)
}

const patience = 10 * time.Second

// open opens a fleet and runs it until the test ends, or stop is called.
func open(t *testing.T, config fleet.Config) (f *fleet.Fleet, stop func()) {
	t.Helper()
	if config.SettleTime == 0 {
		config.SettleTime = -1
	}
	f, err := fleet.Open(config)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); f.Run(ctx) }()
	stop = sync.OnceFunc(func() { cancel(); <-done })
	t.Cleanup(stop)
	return f, stop
}

// connect returns the proxy's end of a session that an agent opened.
func connect(t testing.TB, name, instance string) (conn *fleet.Conn, agent *protocol.Session) {
	t.Helper()
	accepted := make(chan *protocol.Session, 1)
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		transport, refusal := protocol.CheckUpgrade(r)
		if refusal != nil {
			refusal.Write(w)
			return
		}
		session, err := protocol.Accept(w, r, transport, "proxy", protocol.SessionConfig{})
		if err != nil {
			t.Error(err)
		}
		accepted <- session
	}))
	defer s.Close()
	u, _ := url.Parse(s.URL)
	agent, err := (&protocol.Dialer{ProxyURL: u, Agent: name, Instance: instance}).Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	session := <-accepted
	t.Cleanup(func() { session.Close(); agent.Close() })
	return fleet.NewConn(session), agent
}

// register adds an agent.
func register(t *testing.T, f *fleet.Fleet, name string, reg protocol.Registration) *fleet.Conn {
	t.Helper()
	conn, _ := connect(t, name, "1")
	if err := f.Register(t.Context(), conn, reg); err != nil {
		t.Fatal(err)
	}
	return conn
}

// eventually polls what has no event to wait for.
func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !f(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %s", what, patience)
		}
	}
}
