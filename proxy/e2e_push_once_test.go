package main_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/culvert-io/culvert/gateway"
	"github.com/culvert-io/culvert/protocol"
	"github.com/culvert-io/culvert/protocol/externaltest"
)

// onceSender makes one push after the other, each with an ID. What had no answer is sent
// again, until it has one.
type onceSender struct {
	name    string
	tunnel  bool // as a relay in an agent's session
	op      func(n int) pushOp
	refused func(n int) bool // the n-th is refused, nil: none is

	acked    int // so many have an answer
	repeated int // of those were there already
	again    bool
}

// run sends until there is no answer, or until it is done. It calls started after the
// first answer.
func (s *onceSender) run(ctx context.Context, t *testing.T, proxyURL string, started func()) {
	defer started()
	client := &http.Client{Timeout: time.Minute}
	transport := &http.Transport{}
	defer transport.CloseIdleConnections()
	client.Transport = transport
	if s.tunnel {
		u, err := url.Parse(proxyURL)
		if err != nil {
			t.Error(err)
			return
		}
		dialer := &protocol.Dialer{ProxyURL: u, Agent: "sender-" + s.spool()[:8], Instance: "1"}
		session, err := dialer.Dial(ctx)
		if err != nil {
			return
		}
		defer session.Close()
		if err := session.Register(ctx, &protocol.Registration{}); err != nil {
			return
		}
		transport.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) { return session.Open(ctx) }
	}
	for ctx.Err() == nil {
		n := s.acked + 1
		op := s.op(n)
		a, _ := send(client, op.method, proxyURL+op.path, op.body, gateway.HeaderPushID, fmt.Sprintf("%s/%d", s.spool(), n))
		if a.status == 0 {
			s.again = true
			return
		}
		repeated := a.header.Get(gateway.HeaderPushRepeated) == "true"
		want, seq := http.StatusOK, n
		switch {
		case op.method == http.MethodDelete:
			want = http.StatusAccepted
		case s.refused != nil && s.refused(n): // sent again, too
			want, seq = http.StatusBadRequest, n-1
		}
		if a.status != want || repeated && !s.again || a.header.Get(gateway.HeaderPushSeq) != strconv.Itoa(seq) {
			t.Errorf("%s: push %d was answered %d %v %s", s.name, n, a.status, a.header, a.body)
			return
		}
		if repeated {
			s.repeated++
		}
		s.acked, s.again = n, false
		started()
	}
}

// spool is the name of the sender's spool.
func (s *onceSender) spool() string { return fmt.Sprintf("%x-0123456789", s.name) }

// Each push is made once, whenever the proxy dies, though its sender repeats all that had
// no answer.
func TestPushOnceKill(t *testing.T) {
	t.Parallel()
	storage, address := "--storage.path="+t.TempDir(), "--web.listen-address="+externaltest.FreeAddress(t)
	add := func(group string) pushOp {
		return pushOp{method: http.MethodPost, path: groupPath(group) + "?aggregate=sum", body: "# TYPE e2e_sum_total counter\ne2e_sum_total 1\n"}
	}
	large := noise(200_000)
	senders := []*onceSender{
		{name: "first sum", op: func(int) pushOp { return add("sum") }},
		{name: "second sum", op: func(int) pushOp { return add("sum") }},
		{name: "relayed sum", tunnel: true, op: func(int) pushOp { return add("sum") }},
		{name: "batch sum", tunnel: true, op: func(int) pushOp {
			op := pushOp{method: http.MethodPost, path: "/api/v1/push?group_by=job,instance&aggregate=sum", body: "# TYPE e2e_sum_total counter\n"}
			for i := range 3 {
				op.body += fmt.Sprintf("e2e_sum_total{job=\"batch\",instance=\"%d\"} 1\n", i)
			}
			return op
		}},
		{name: "deleted sum", tunnel: true, op: func(n int) pushOp {
			if n%3 == 0 {
				return pushOp{method: http.MethodDelete, path: groupPath("deleted")}
			}
			return add("deleted")
		}},
		{name: "refused sum", refused: func(n int) bool { return n%2 == 0 }, op: func(n int) pushOp {
			op := add("refused")
			if n%2 == 0 {
				op.body += "e2e_bad 1 1\n"
			}
			return op
		}},
		{name: "large put", tunnel: true, op: func(n int) pushOp {
			return pushOp{method: http.MethodPut, path: groupPath("large"), body: fmt.Sprintf("# TYPE e2e_sum_total counter\ne2e_sum_total %d\n", n) + large}
		}},
	}
	// expect compares what is shown with what was answered; of each sender one more may
	// have been made, unless all have their answers.
	expect := func(proxyURL string, complete bool) error {
		shown, err := scrapeStamped(direct, proxyURL, "")
		if err != nil {
			return err
		}
		value := func(group string) int { return int(shown.series[group]["e2e_sum_total"]) }
		var errs []error
		between := func(what string, got int, values ...int) {
			for _, want := range values {
				if got == want {
					return
				}
			}
			errs = append(errs, fmt.Errorf("%s: %d, want one of %v", what, got, values))
		}
		either := func(s *onceSender, sum func(n int) int) []int {
			if complete || !s.again {
				return []int{sum(s.acked)}
			}
			return []int{sum(s.acked), sum(s.acked + 1)}
		}
		all := func(n int) int { return n }
		sums := []int{0}
		for _, s := range senders[:3] {
			var next []int
			for _, sum := range sums {
				for _, n := range either(s, all) {
					next = append(next, sum+n)
				}
			}
			sums = next
		}
		between("the sum", value("sum"), sums...)
		for i := range 3 {
			between("a batch", value(fmt.Sprint("batch/", i)), either(senders[3], all)...)
			between("the groups of a batch", value(fmt.Sprint("batch/", i)), value("batch/0"))
		}
		between("what is deleted after every second push", value("deleted"), either(senders[4], func(n int) int { return n % 3 })...)
		between("what is refused half of the time", value("refused"), either(senders[5], func(n int) int { return (n + 1) / 2 })...)
		between("the large group", value("large"), either(senders[6], all)...)
		return errors.Join(errs...)
	}

	var proxy *proxyProcess
	const rounds = 8
	for round := range rounds {
		proxy = startProxy(t, storage, address)
		if err := expect(proxy.url, false); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		var running, first sync.WaitGroup
		for _, s := range senders {
			first.Add(1)
			running.Go(func() { s.run(t.Context(), t, proxy.url, sync.OnceFunc(first.Done)) })
		}
		first.Wait()
		time.Sleep(time.Duration(50+rand.N(400)) * time.Millisecond)
		proxy.kill()
		running.Wait()
		if t.Failed() {
			return
		}
		if round%2 == 1 { // dies while it opens the store, too
			p := start(t, "culvert-proxy that dies early", filepath.Join(programDir, "culvert-proxy"), storage, address)
			time.Sleep(rand.N(150 * time.Millisecond))
			p.kill()
		}
	}

	// At last each gets its answer.
	proxy = startProxy(t, storage, address)
	var running sync.WaitGroup
	for _, s := range senders {
		ctx, cancel := context.WithCancel(t.Context())
		running.Go(func() { s.run(ctx, t, proxy.url, cancel) })
	}
	running.Wait()
	if err := expect(proxy.url, true); err != nil {
		t.Error(err)
	}
	for _, s := range senders {
		t.Logf("%s: %d pushes were answered, %d of them had been made before a kill", s.name, s.acked, s.repeated)
	}
}
