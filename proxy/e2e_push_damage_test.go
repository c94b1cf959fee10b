package main_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"
)

// A damaged file is left as it is, and whoever pushes is told what to do; once it
// is gone pushes work, without a restart. Scrapes go on all the time.
func TestPushDamaged(t *testing.T) {
	t.Parallel()
	whole, key, value := storedPushes(t)
	garbage := make([]byte, len(whole))
	for i := range garbage {
		garbage[i] = byte(rand.Uint32())
	}
	// In what is no longer used, too: that is harmless.
	flipped := func(part []byte) []byte {
		damaged := bytes.Clone(part)
		damaged[len(damaged)/2] ^= 1
		if bytes.Equal(whole, bytes.ReplaceAll(whole, part, damaged)) {
			t.Fatalf("the file has no %q", part)
		}
		return bytes.ReplaceAll(whole, part, damaged)
	}
	type damaged struct {
		*pushed
		name, path   string
		content      []byte
		stopScraping func()
	}
	var all []*damaged
	// All of them at once: it takes seconds until a store tries again.
	for name, content := range map[string][]byte{
		"garbage":                   garbage,
		"cut to a quarter":          whole[:len(whole)/4],
		"cut to a byte":             whole[:1],
		"a bit of a record flipped": flipped(value),
		"a bit of a key flipped":    flipped(key),
	} {
		storage := t.TempDir()
		d := &damaged{name: name, content: content, path: filepath.Join(storage, "push.db")}
		if err := os.WriteFile(d.path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		d.pushed = startPushed(t, storage)
		d.stopScraping = d.scrape()
		all = append(all, d)
	}
	for _, d := range all {
		t.Log(d.name)
		d.expectRefused(100, []string{"job/new", "job/1"}, d.path, "damaged", "move it away")
		for _, r := range []struct{ method, path string }{
			{http.MethodPost, groupPath("job/1")},
			{http.MethodDelete, groupPath("job/1")},
			{http.MethodPost, "/api/v1/push?group_by=job"},
			{http.MethodDelete, "/api/v1/groups?match[]={job=\"job\"}"},
			{http.MethodGet, "/api/v1/metrics"},
			{http.MethodGet, "/metrics?only=groups"},
		} {
			a, err := send(direct, r.method, d.url+r.path, "e2e_value{job=\"job\"} 1\n")
			if err != nil || a.status != http.StatusServiceUnavailable || !strings.Contains(a.body, d.path) || a.header.Get("Retry-After") == "" {
				t.Errorf("%s: %s %s: %d %s %v, want 503 and a reason", d.name, r.method, r.path, a.status, a.body, err)
			}
		}
		if a := get(t, d.url+"/metrics"); !strings.Contains(a.body, "\nculvert_proxy_build_info{") {
			t.Errorf("%s: the proxy's own metrics are not there: %s", d.name, a.body)
		}
	}
	for _, d := range all {
		if now, err := os.ReadFile(d.path); err != nil || !bytes.Equal(now, d.content) {
			t.Errorf("%s: the file was changed: %v", d.name, err)
		}
		if err := os.Rename(d.path, d.path+".damaged"); err != nil {
			t.Fatal(err)
		}
	}
	for _, d := range all {
		d.awaitRecovery(15 * time.Second)
		d.expectStored()
		d.stopScraping()
		d.restart(func(p *process) { p.stop() }, nil)
		d.expectStored()
		if now, err := os.ReadFile(d.path + ".damaged"); err != nil || !bytes.Equal(now, d.content) {
			t.Errorf("%s: the file that was moved away was changed: %v", d.name, err)
		}
	}
}

// Damage that no checksum of a record tells of is noticed, or does no harm:
// neither to scrapes, nor to what is acknowledged later.
func TestPushDamagedPages(t *testing.T) {
	t.Parallel()
	whole, _, _ := storedPushes(t)
	// Of bbolt's page header: 2 bytes of flags at 8, 2 of the number of elements at
	// 10, 4 of overflow at 12; the elements follow.
	const leaf, freelist = 0x02, 0x10
	changed := func(flags byte, at int, change func(byte) byte) []byte {
		damaged := bytes.Clone(whole)
		for page := 0; page < len(damaged); page += os.Getpagesize() {
			if damaged[page+8] == flags && damaged[page+10] > 1 {
				damaged[page+at] = change(damaged[page+at])
			}
		}
		return damaged
	}
	bit := func(n int) func(byte) byte { return func(b byte) byte { return b ^ 1<<n } }
	fewer := func(b byte) byte { return b & (b - 1) }
	type damaged struct {
		*pushed
		name         string
		stopScraping func()
	}
	var all []*damaged
	for name, content := range map[string][]byte{
		"the overflow of the free list":    changed(freelist, 12, bit(0)),
		"the first free page":              changed(freelist, 16, bit(0)),
		"the first free page, far off":     changed(freelist, 17, bit(0)),
		"the second free page":             changed(freelist, 24, bit(1)),
		"the number of elements of leaves": changed(leaf, 10, fewer),
	} {
		if bytes.Equal(content, whole) {
			t.Fatalf("%s: the file has no such page", name)
		}
		storage := t.TempDir()
		write(t, storage, "push.db", string(content))
		d := &damaged{name: name, pushed: startPushed(t, storage)}
		d.stopScraping = d.scrape()
		all = append(all, d)
	}
	for _, d := range all {
		t.Log(d.name)
		stored := func(when string, acked map[string]int) {
			t.Helper()
			shown, err := scrapeStamped(direct, d.url, "")
			if _, refused := errors.AsType[*invalid](err); refused {
				t.Logf("%s: noticed %s: %v", d.name, when, err)
				return
			}
			if err != nil {
				t.Errorf("%s: %s: %v", d.name, when, err)
				return
			}
			for _, line := range differences(acked, shown.stamps) {
				t.Errorf("%s: %s the group %s", d.name, when, line)
			}
		}
		acked := map[string]int{}
		for n := 1; n <= 50; n++ {
			if n != 3 {
				acked[fmt.Sprintf("job/%d", n)] = n
			}
		}
		stored("at start", acked)
		for n := 1; n <= 60; n++ {
			group := fmt.Sprintf("new/%d", n%20)
			a, err := send(direct, http.MethodPut, d.url+groupPath(group), stamped(n, "")+noise(n*100))
			switch {
			case err == nil && a.status == http.StatusOK:
				acked[group] = n
			case err == nil && a.status == http.StatusServiceUnavailable:
			default:
				t.Fatalf("%s: push %d: %d %s %v", d.name, n, a.status, a.body, err)
			}
		}
		d.stopScraping()
		d.kill()
		d.proxyProcess = startProxy(t, d.args...)
		stored("after a restart", acked)
	}
}

// storedPushes returns a push store's file, and one of the keys and records in it.
func storedPushes(t *testing.T) (file, key, value []byte) {
	t.Helper()
	storage := t.TempDir()
	proxy := startProxy(t, "--storage.path="+storage)
	for n := 1; n <= 50; n++ {
		push(t, http.StatusOK, http.MethodPut, proxy.url+groupPath(fmt.Sprintf("job/%d", n)), stamped(n, ""))
	}
	push(t, http.StatusAccepted, http.MethodDelete, proxy.url+groupPath("job/3"), "")
	proxy.stop()
	path := filepath.Join(storage, "push.db")
	file, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	db, err := bolt.Open(path, 0o600, &bolt.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	err = db.View(func(tx *bolt.Tx) error {
		return tx.ForEach(func(_ []byte, b *bolt.Bucket) error {
			return b.ForEach(func(k, v []byte) error {
				key, value = bytes.Clone(k), bytes.Clone(v)
				return nil
			})
		})
	})
	if err != nil {
		t.Fatal(err)
	}
	return file, key, value
}

// Two processes don't share a storage path.
func TestPushSecondProcess(t *testing.T) {
	t.Parallel()
	storage := t.TempDir()
	proxy := startProxy(t, "--storage.path="+storage)
	push(t, http.StatusOK, http.MethodPut, proxy.url+groupPath("job"), stamped(1, ""))
	second := start(t, "second culvert-proxy", filepath.Join(programDir, "culvert-proxy"), "--storage.path="+storage, "--web.listen-address=127.0.0.1:0")
	select {
	case <-second.exited:
	case <-time.After(30 * time.Second):
		t.Fatal("the second process does not end")
	}
	if code := second.cmd.ProcessState.ExitCode(); code != 1 {
		t.Errorf("the second process ended with %s, want exit code 1", second.cmd.ProcessState)
	}
	for _, want := range []string{storage, "another process", "--storage.path"} {
		if !strings.Contains(second.log(), want) {
			t.Errorf("the log of the second process lacks %q: %s", want, second.log())
		}
	}
	if shown, err := scrapeStamped(direct, proxy.url, ""); err != nil || shown.stamps["job"] != 1 {
		t.Errorf("the groups of the first process are %v, %v", shown.stamps, err)
	}
	push(t, http.StatusOK, http.MethodPut, proxy.url+groupPath("job"), stamped(2, ""))
}
