package main_test

import (
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/culvert-io/culvert/protocol/externaltest"
)

// cable leads to a network namespace.
type cable struct {
	t         *testing.T
	namespace string
	link      string // this end
	here      string // its address
}

// newCable makes a namespace and the cable to it, which go when the test ends.
func newCable(t *testing.T) *cable {
	t.Helper()
	n := os.Getpid() % (1 << 14)
	address := func(host int) string { return fmt.Sprintf("198.18.%d.%d", n>>6, n<<2&0xff+host) }
	c := &cable{t: t, namespace: fmt.Sprintf("culvert-e2e-%d", n), link: fmt.Sprintf("cve2e%d", n), here: address(1)}
	if out, err := exec.Command("ip", "netns", "add", c.namespace).CombinedOutput(); err != nil {
		externaltest.Missing(t, fmt.Sprintf("this test makes a network namespace: install iproute2, and run it as root: %v: %s", err, out))
	}
	t.Cleanup(func() { c.ip("netns", "del", c.namespace) }) // and the cable with it
	c.ip("link", "add", c.link, "type", "veth", "peer", "name", "eth0", "netns", c.namespace)
	c.ip("addr", "add", c.here+"/30", "dev", c.link)
	c.ip("link", "set", c.link, "up")
	c.ip("-n", c.namespace, "addr", "add", address(2)+"/30", "dev", "eth0")
	c.ip("-n", c.namespace, "link", "set", "eth0", "up")
	return c
}

func (c *cable) ip(args ...string) {
	c.t.Helper()
	if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
		c.t.Fatalf("ip %s: %v: %s", strings.Join(args, " "), err, out)
	}
}

// cut drops all packets, and mend lets them through again.
func (c *cable) cut()  { c.ip("link", "set", c.link, "down") }
func (c *cable) mend() { c.ip("link", "set", c.link, "up") }

// TestSpoolCableCut: packets between agent and proxy get lost for a while, and nobody is
// told; the agent is killed meanwhile. In the end the store has what it should have.
func TestSpoolCableCut(t *testing.T) {
	t.Parallel()
	const pushes = 10_000
	c := newCable(t)
	straight := startProxy(t)
	proxy := startProxy(t, "--storage.path="+t.TempDir(), "--web.listen-address="+c.here+":0")
	agent := startSpooling(t, proxy.url, web1, []string{"ip", "netns", "exec", c.namespace})
	agent.awaitLog(`msg=Connected`)
	run := newSpoolRun(t, pushes)
	const each = pushes / spoolPushers
	run.send(agent.client, "http://localhost", 0, each/10, wasSpooled)
	c.cut() // in the middle of what is relayed
	run.send(agent.client, "http://localhost", each/10, each/2, wasSpooled)
	agent.kill()
	agent.restart()
	run.send(agent.client, "http://localhost", each/2, each*8/10, wasSpooled)
	c.mend()
	agent.awaitLog(`msg=Connected`)
	run.send(agent.client, "http://localhost", each*8/10, each*9/10, wasSpooled)
	c.cut() // this time the session lives through it
	run.send(agent.client, "http://localhost", each*9/10, each, wasSpooled)
	run.lasted = time.Since(run.begin)
	c.mend()
	agent.awaitRelayed()

	run.send(keepAlive(t, false), straight.url, 0, each, wasStored)
	run.compare(proxy.url, straight.url)
	if a := get(t, proxy.url+"/-/ready?for=push"); a.status != http.StatusOK {
		t.Errorf("in the end the store is not well: %d %s", a.status, a.body)
	}
}

// TestSpoolDiskFull: on a full disk pushes are refused with the reason, none that was
// taken is lost, and once there is room they are taken again, without a restart.
func TestSpoolDiskFull(t *testing.T) {
	t.Parallel()
	disk := mountTmpfs(t, "size=2m")
	filler := write(t, disk, "filler", strings.Repeat("x", 1<<20))
	proxy := startProxy(t)
	proxyURL := proxy.url
	proxy.kill()
	agent := startSpooling(t, proxyURL, web1, nil, "--storage.path="+filepath.Join(disk, "state"))
	taken := 0
	push := func() answer {
		t.Helper()
		a, err := send(agent.client, http.MethodPost, "http://localhost/metrics/job/j?aggregate=sum", "# TYPE e2e_sum_total counter\ne2e_sum_total 1\n"+noise(20_000))
		if err != nil {
			t.Fatal(err)
		}
		if a.status == http.StatusAccepted {
			taken++
		}
		return a
	}
	a := push()
	for a.status == http.StatusAccepted && taken < 1000 {
		a = push()
	}
	if a.status != http.StatusServiceUnavailable || !strings.Contains(a.body, "no space left on device") || a.header.Get("Retry-After") == "" {
		t.Errorf("on a full disk: %d %s", a.status, a.body)
	}
	t.Logf("%d pushes fit, then: %s", taken, a.body)
	agent.kill()
	agent.restart()
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	eventually(t, 20*time.Second, func() error {
		if a := push(); a.status != http.StatusAccepted {
			return fmt.Errorf("%d %s", a.status, a.body)
		}
		return nil
	})
	startProxy(t, "--web.listen-address="+proxy.address)
	agent.awaitRelayed()
	if got := int(proxy.gauge(`e2e_sum_total{instance="",job="j"}`)); got != taken {
		t.Errorf("the store has %d pushes, %d were taken", got, taken)
	}
}
