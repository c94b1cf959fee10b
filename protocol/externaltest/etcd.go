package externaltest

import (
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// Etcd is a member of an etcd of its own. It keeps its address and its data when it is
// stopped and started again.
type Etcd struct {
	URL     string // of the member for clients
	Address string // the same as host:port
	Dir     string // of its data, which may be changed while it is stopped

	args   []string
	health string // a URL that needs no credentials

	mu      sync.Mutex // protects what follows
	process *exec.Cmd  // nil while it is stopped
	log     *bytes.Buffer
	exited  chan struct{}
}

// etcdPatience is how long a member may take until it answers.
const etcdPatience = 30 * time.Second

// StartEtcd starts an etcd of one member, which ends with the test. With --cert-file among
// the flags it talks TLS.
func StartEtcd(t testing.TB, flags ...string) *Etcd {
	t.Helper()
	return StartEtcdCluster(t, 1, flags...)[0]
}

// StartEtcdCluster starts an etcd of n members, which end with the test. Their log is shown
// where the test failed.
func StartEtcdCluster(t testing.TB, n int, flags ...string) []*Etcd {
	t.Helper()
	program := Program(t, "etcd", "etcd-server")
	members, err := LaunchEtcd(program, t.TempDir(), n, flags...)
	t.Cleanup(func() {
		for i, m := range members {
			m.Stop()
			if t.Failed() {
				t.Logf("log of member %d of etcd:\n%s", i, m.log)
			}
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return members
}

// LaunchEtcd starts an etcd of n members that outlives a test: they have to be stopped,
// also where there is an error. Their data is in the directory.
func LaunchEtcd(program, dir string, n int, flags ...string) ([]*Etcd, error) {
	scheme := "http://"
	for _, flag := range flags {
		if strings.HasPrefix(flag, "--cert-file=") {
			scheme = "https://"
		}
	}
	var cluster []string
	members := make([]*Etcd, n)
	for i := range members {
		var addresses [3]string
		for j := range addresses {
			address, err := freeAddress()
			if err != nil {
				return nil, err
			}
			addresses[j] = address
		}
		name, client, peer, health := fmt.Sprint("m", i), scheme+addresses[0], "http://"+addresses[1], "http://"+addresses[2]
		cluster = append(cluster, name+"="+peer)
		members[i] = &Etcd{URL: client, Address: addresses[0], health: health + "/health", Dir: filepath.Join(dir, name), args: append([]string{
			program, "--name=" + name, "--data-dir=" + filepath.Join(dir, name), "--unsafe-no-fsync", "--logger=zap", "--log-level=error",
			"--listen-client-urls=" + client, "--advertise-client-urls=" + client, "--listen-metrics-urls=" + health,
			"--listen-peer-urls=" + peer, "--initial-advertise-peer-urls=" + peer,
			"--heartbeat-interval=50", "--election-timeout=500"}, flags...)}
	}
	for _, m := range members {
		m.args = append(m.args, "--initial-cluster="+strings.Join(cluster, ","))
		if err := m.begin(); err != nil {
			return members, err
		}
	}
	for _, m := range members {
		if err := m.await(); err != nil {
			return members, err
		}
	}
	return members, nil
}

// begin starts the process.
func (e *Etcd) begin() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	process, log, exited := exec.Command(e.args[0], e.args[1:]...), &bytes.Buffer{}, make(chan struct{})
	process.Stdout, process.Stderr = log, log
	if err := process.Start(); err != nil {
		return err
	}
	go func() { defer close(exited); _ = process.Wait() }()
	e.process, e.log, e.exited = process, log, exited
	return nil
}

// await waits until the member answers.
func (e *Etcd) await() error {
	client := &http.Client{Timeout: time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	for deadline := time.Now().Add(etcdPatience); ; {
		resp, err := client.Get(e.health)
		if err == nil {
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return nil
			}
			err = errors.New(resp.Status)
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("etcd does not answer: %w", err)
		}
		select {
		case <-e.exited:
			return fmt.Errorf("etcd has ended: %s", e.log)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// Start starts a member that was stopped, and waits until it answers.
func (e *Etcd) Start(t testing.TB) {
	t.Helper()
	err := e.begin()
	if err == nil {
		err = e.await()
	}
	if err != nil {
		t.Fatal(err)
	}
}

// Stop kills the process, and waits for its end.
func (e *Etcd) Stop() {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.process == nil {
		return
	}
	_ = e.process.Process.Kill()
	<-e.exited
	e.process = nil
}

// Signal sends a signal to the process.
func (e *Etcd) Signal(t testing.TB, signal os.Signal) {
	t.Helper()
	e.mu.Lock()
	defer e.mu.Unlock()
	if err := e.process.Process.Signal(signal); err != nil {
		t.Fatal(err)
	}
}
