package main_test

import (
	"bytes"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-io/culvert/protocol/externaltest"
)

// recovery is how long a store may take to find out that it can write again: it
// tries every 5 s.
const recovery = 10 * time.Second

// A full disk takes no pushes, loses none that it took, and touches no scrape.
// Once there is room again pushes work, without a restart.
func TestPushDiskFull(t *testing.T) {
	t.Parallel()
	disk := mountTmpfs(t, "size=4m")
	filler := write(t, disk, "filler", strings.Repeat("x", 5<<19))
	p := startPushed(t, filepath.Join(disk, "state"))
	stopScraping := p.scrape()

	// On a full disk there may be room for a small push within the file, from time to
	// time; never for the huge one.
	const large, huge = 100_000, 2 << 20
	next := 1
	fill := func() {
		t.Helper()
		for ; next < 1000; next++ {
			a := p.put(fmt.Sprintf("disk/%d", next), next, large)
			if a.status == http.StatusServiceUnavailable {
				t.Logf("the disk is full, push %d is refused: %s", next, a.body)
				next++
				return
			}
			if a.status != http.StatusOK {
				t.Fatalf("push %d to a full disk: %d %s", next, a.status, a.body)
			}
		}
		t.Fatal("the disk is never full")
	}
	full := func() {
		t.Helper()
		fill()
		p.expectRefused(huge, []string{"disk/new", "disk/1"}, "no space left on device")
		p.expectStored()
	}

	full()
	a, err := send(direct, http.MethodDelete, p.url+groupPath("disk/2"), "")
	switch {
	case err == nil && a.status == http.StatusAccepted:
		delete(p.acked, "disk/2")
	case err == nil && a.status == http.StatusServiceUnavailable:
	default:
		t.Errorf("deletion on a full disk: %d %s %v", a.status, a.body, err)
	}
	t.Logf("a deletion on the full disk got %d", a.status)
	p.expectStored()
	stopScraping()
	p.restart((*process).kill, nil)
	p.expectStored()

	stopScraping = p.scrape()
	full()
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	p.awaitRecovery(recovery)
	p.expectStored()
	stopScraping()
	p.restart(func(p *process) { p.stop() }, nil)
	p.expectStored()
}

// A disk that is full when the store is made leaves nothing that keeps it from
// being made later.
func TestPushDiskFullFirst(t *testing.T) {
	t.Parallel()
	type first struct {
		proxy  *proxyProcess
		filler string
		room   int
	}
	var all []first
	for _, room := range []int{0, 16, 28, 32, 36, 40} { // KiB, of 64 that the files take
		disk := mountTmpfs(t, "size=1m")
		f := first{filler: write(t, disk, "filler", strings.Repeat("x", 1<<20-room<<10)), room: room}
		f.proxy = startProxy(t, "--storage.path="+filepath.Join(disk, "state"))
		a, err := send(direct, http.MethodPut, f.proxy.url+groupPath("job"), stamped(1, ""))
		if err != nil || a.status != http.StatusServiceUnavailable || !strings.Contains(a.body, "no space left on device") {
			t.Errorf("push with %d KiB of room: %d %s %v", room, a.status, a.body, err)
		}
		all = append(all, f)
	}
	for _, f := range all {
		if err := os.Remove(f.filler); err != nil {
			t.Fatal(err)
		}
	}
	freed := time.Now()
	for _, f := range all {
		err := try(max(time.Until(freed.Add(15*time.Second)), time.Second), func() error {
			a, err := send(direct, http.MethodPut, f.proxy.url+groupPath("job"), stamped(1, ""))
			if err == nil && a.status != http.StatusOK {
				err = fmt.Errorf("%d %s", a.status, a.body)
			}
			return err
		})
		if err != nil {
			t.Errorf("push after the start with %d KiB of room, once there is more: %v", f.room, err)
		}
	}
}

// A proxy that starts on a read-only disk carries scrapes, and takes pushes as
// soon as it can write.
func TestPushReadOnlyStart(t *testing.T) {
	t.Parallel()
	disk := mountTmpfs(t, "size=4m")
	p := startPushed(t, filepath.Join(disk, "state"))
	for n := 1; n <= 20; n++ {
		p.expectPush(fmt.Sprintf("disk/%d", n), n)
	}
	p.restart(func(p *process) { p.stop() }, func() { remount(t, disk, syscall.MS_RDONLY) })
	stopScraping := p.scrape()
	p.expectRefused(100, []string{"disk/new", "disk/1"}, "read-only file system", "push.db")
	// All groups, or no answer: an empty one would delete the series.
	if a := get(t, p.url+"/metrics?only=groups"); a.status != http.StatusServiceUnavailable {
		p.expectStored()
	}
	remount(t, disk, 0)
	p.awaitRecovery(15 * time.Second)
	p.expectStored()
	stopScraping()
	p.restart((*process).kill, nil)
	p.expectStored()
}

// A store that can't write any more still has its groups scraped. A disk can't be
// remounted read-only while a file on it is open for writing; but a file can be
// made immutable, and a file system that finds itself damaged turns read-only by
// itself.
func TestPushReadOnly(t *testing.T) {
	t.Parallel()
	disk := mountLoop(t, 16<<20)
	p := startPushed(t, filepath.Join(disk.dir, "state"))
	for n := 1; n <= 20; n++ {
		p.expectPush(fmt.Sprintf("disk/%d", n), n)
	}
	stopScraping := p.scrape()
	files, err := filepath.Glob(filepath.Join(disk.dir, "state", "push.db*"))
	if err != nil {
		t.Fatal(err)
	}
	groups := []string{"disk/new", "disk/1"}
	command(t, "chattr", append([]string{"+i"}, files...)...)
	p.expectRefused(100, groups, "operation not permitted")
	for path, method := range map[string]string{
		groupPath("disk/1"):                     http.MethodDelete,
		"/api/v1/groups?match[]={job=\"disk\"}": http.MethodDelete,
		"/api/v1/push?group_by=job,instance":    http.MethodPut,
		groupPath("disk/2") + "?aggregate=sum":  http.MethodPost,
	} {
		a, err := send(direct, method, p.url+path, stamped(999, `job="disk",instance="1"`))
		if err != nil || a.status != http.StatusServiceUnavailable || a.header.Get("Retry-After") == "" {
			t.Errorf("%s %s: %d %s %v, want 503 and Retry-After", method, path, a.status, a.body, err)
		}
	}
	p.expectStored()
	command(t, "chattr", append([]string{"-i"}, files...)...)
	p.awaitRecovery(recovery)
	p.expectStored()

	disk.fail()
	p.expectRefused(100, groups, "read-only file system")
	p.expectStored()
	stopScraping()
	p.restart(func(p *process) { p.stop() }, disk.repair)
	p.expectStored()
	p.expectPush("disk/new", 3)
	p.expectStored()
}

// mayMount skips the test where it can't mount for lack of rights.
func mayMount(t *testing.T) {
	t.Helper()
	const sysAdmin = 1 << 21 // CAP_SYS_ADMIN
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(status), "CapEff:")
	text, _, _ := strings.Cut(rest, "\n")
	capabilities, err := strconv.ParseUint(strings.TrimSpace(text), 16, 64)
	if err != nil {
		t.Fatal(err)
	}
	if capabilities&sysAdmin == 0 {
		t.Skip("this test mounts a disk of its own: run it as root, with CAP_SYS_ADMIN")
	}
}

// mountTmpfs mounts a disk in memory and returns its directory.
func mountTmpfs(t *testing.T, options string) string {
	t.Helper()
	mayMount(t)
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, options); err != nil {
		externaltest.Missing(t, fmt.Sprintf("this test mounts a disk of its own: %v", err))
	}
	unmountLater(t, dir)
	return dir
}

func remount(t *testing.T, dir string, flags uintptr) {
	t.Helper()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", syscall.MS_REMOUNT|flags, ""); err != nil {
		t.Fatalf("remount: %v", err)
	}
}

func unmountLater(t *testing.T, dir string) {
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, 0); err != nil {
			t.Errorf("unmount: %v", err)
			syscall.Unmount(dir, syscall.MNT_DETACH)
		}
	})
}

// loopDisk is an ext4 in a file.
type loopDisk struct {
	t          *testing.T
	image, dir string
}

func mountLoop(t *testing.T, size int64) *loopDisk {
	t.Helper()
	mayMount(t)
	if _, err := os.Stat("/dev/loop-control"); err != nil {
		t.Skipf("this test mounts a disk of its own: there are no loop devices: %v", err)
	}
	d := &loopDisk{t, write(t, t.TempDir(), "image", ""), t.TempDir()}
	if err := os.Truncate(d.image, size); err != nil {
		t.Fatal(err)
	}
	program, err := exec.LookPath("mkfs.ext4")
	if err != nil {
		externaltest.Missing(t, fmt.Sprintf("this test makes a file system: apt-get install e2fsprogs: %v", err))
	}
	command(t, program, "-q", d.image)
	if err := d.mount(); err != nil {
		externaltest.Missing(t, fmt.Sprintf("this test mounts a disk of its own: %v", err))
	}
	unmountLater(t, d.dir)
	return d
}

func (d *loopDisk) mount() error {
	out, err := exec.Command("mount", "-t", "ext4", "-o", "loop,errors=remount-ro", d.image, d.dir).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%w: %s", err, bytes.TrimSpace(out))
	}
	return nil
}

// fail makes the kernel think that it found damage on the disk.
func (d *loopDisk) fail() {
	d.t.Helper()
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		d.t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if fields := strings.Fields(line); fields[1] == d.dir {
			trigger := filepath.Join("/sys/fs/ext4", filepath.Base(fields[0]), "trigger_fs_error")
			if err := os.WriteFile(trigger, []byte("1"), 0); err != nil {
				d.t.Fatal(err)
			}
			return
		}
	}
	d.t.Fatalf("%s is not mounted", d.dir)
}

// repair mounts the disk anew, for writing. Whoever made a mount namespace meanwhile
// holds the disk as it was until that ends.
func (d *loopDisk) repair() {
	d.t.Helper()
	err := try(20*time.Second, func() error {
		if err := syscall.Unmount(d.dir, 0); err != nil {
			return fmt.Errorf("unmount: %w", err)
		}
		if err := d.mount(); err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(d.dir, "repaired"), nil, 0o600)
	})
	if err != nil {
		d.t.Fatal(err)
	}
}

func command(t *testing.T, program string, args ...string) {
	t.Helper()
	if out, err := exec.Command(program, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %q: %v: %s", program, args, err, out)
	}
}
