package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"time"
	"unsafe"
)

// newLink makes a network namespace and a link to it, for as long as the stage
// lasts. The delay is netem's, or that of a wire in this process where the kernel
// has no netem.
func newLink(st *stage, config linkConfig) (*link, error) {
	if os.Geteuid() != 0 {
		return nil, errMissing("network namespaces take root: run it with sudo")
	}
	for _, program := range []string{"ip", "tc"} {
		if _, err := exec.LookPath(program); err != nil {
			return nil, errMissing(program + " is not installed (Debian: apt-get install iproute2)")
		}
	}
	// 198.18.0.0/15 is for benchmarks (RFC 2544, C.2.2). Each process has four
	// addresses of it.
	pid := os.Getpid()
	subnet := fmt.Sprintf("198.18.%d.", pid>>6&255)
	l := &link{near: fmt.Sprintf("%s%d", subnet, pid&63*4+1), far: fmt.Sprintf("%s%d", subnet, pid&63*4+2)}
	namespace := fmt.Sprintf("culvert-%d", pid)
	near, far := fmt.Sprintf("cvn%d", pid), fmt.Sprintf("cvf%d", pid) // at most 15 bytes
	l.enter = []string{"ip", "netns", "exec", namespace}

	if err := command("ip netns add " + namespace); err != nil {
		return nil, errMissing("no network namespace can be made: " + err.Error())
	}
	st.onClose(func() error { return command("ip netns delete " + namespace) })

	netem := fmt.Sprintf("netem delay %dus limit %d", (config.roundTrip / 2).Microseconds(), config.queue())
	if config.rate > 0 {
		netem += fmt.Sprintf(" rate %dbit", config.rate)
	}
	err := command(fmt.Sprintf("ip link add %s type veth peer name %s netns %s", near, far, namespace))
	if err == nil {
		// Deleting one end deletes the other, and what hangs on them.
		remove := func() error { return command("ip link delete " + near) }
		if err = command("tc qdisc add dev "+near+" root "+netem, "tc -n "+namespace+" qdisc add dev "+far+" root "+netem); err == nil {
			st.onClose(remove)
			l.kind = "netem"
			// A queue of large segments would hold far more than one of packets.
			err = command("ip link set "+near+" gso_max_segs 1", "ip -n "+namespace+" link set "+far+" gso_max_segs 1")
			if err != nil {
				return nil, err
			}
		} else if err := remove(); err != nil {
			return nil, err
		}
	}
	if err != nil {
		if err := newWire(st, config, near, far, namespace); err != nil {
			return nil, errMissing("the kernel has neither netem nor TUN devices for the delay: " + err.Error())
		}
		l.kind = "delay made by loadtest itself, as this kernel has no netem"
	}
	return l, command(
		fmt.Sprintf("ip address add %s/30 dev %s", l.near, near),
		fmt.Sprintf("ip -n %s address add %s/30 dev %s", namespace, l.far, far),
		"ip link set "+near+" up",
		"ip -n "+namespace+" link set lo up",
		"ip -n "+namespace+" link set "+far+" up")
}

// startExporter starts an exporter on the far side and returns its address.
func (l *link) startExporter(ctx context.Context, st *stage, body, large size) (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", err
	}
	args := append(l.enter[1:len(l.enter):len(l.enter)], self, "exporter",
		"--web.listen-address="+net.JoinHostPort(l.far, "0"), "--body="+body.String(), "--large-body="+large.String())
	p, err := st.start("exporter", l.enter[0], args...)
	if err != nil {
		return "", err
	}
	line, err := p.awaitLog(ctx, `msg=Listening address=(\S+)`)
	if err != nil {
		return "", err
	}
	return line[1], nil
}

// command runs commands, each without spaces in its words, up to the first that
// fails. They take milliseconds, and cleaning up must not be interrupted.
func command(lines ...string) error {
	for _, line := range lines {
		words := strings.Fields(line)
		if out, err := exec.Command(words[0], words[1:]...).CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", line, err, strings.TrimSpace(string(out)))
		}
	}
	return nil
}

// newWire makes two TUN devices, one of them in the namespace, and carries packets
// between them, with the delay, rate and queue of the configuration.
func newWire(st *stage, config linkConfig, near, far, namespace string) error {
	var ends [2]*os.File
	for i, name := range []string{near, far} {
		end, err := openTUN(name)
		if err != nil {
			for _, opened := range ends[:i] {
				opened.Close()
			}
			return err
		}
		ends[i] = end
	}
	var carrying sync.WaitGroup
	st.onClose(func() error {
		ends[0].Close()
		ends[1].Close()
		carrying.Wait()
		return nil
	})
	for i := range ends {
		queue := make(chan packet, config.queue())
		carrying.Go(func() { receive(ends[i], queue, config) })
		carrying.Go(func() { deliver(ends[1-i], queue) })
	}
	return command(
		"ip link set "+far+" netns "+namespace,
		"ip link set "+near+" txqueuelen 1000",
		"ip -n "+namespace+" link set "+far+" txqueuelen 1000")
}

// packet is a packet on a wire.
type packet struct {
	data    []byte
	arrives time.Time
}

// receive takes packets off a device and queues them, until the device is closed.
func receive(device *os.File, queue chan<- packet, config linkConfig) {
	defer close(queue)
	buf := make([]byte, 64<<10)
	var sent time.Time // when the last packet has left
	for {
		n, err := device.Read(buf)
		if err != nil {
			return
		}
		now := time.Now()
		if sent.Before(now) {
			sent = now
		}
		if len(queue) == cap(queue) {
			continue // as a router drops it
		}
		if config.rate > 0 {
			sent = sent.Add(time.Duration(n) * 8 * time.Second / time.Duration(config.rate))
		}
		queue <- packet{append([]byte(nil), buf[:n]...), sent.Add(config.roundTrip / 2)}
	}
}

// deliver hands packets to a device when their time has come.
func deliver(device *os.File, queue <-chan packet) {
	for p := range queue {
		time.Sleep(time.Until(p.arrives))
		device.Write(p.data) // an error is a lost packet
	}
}

// openTUN makes a TUN device, which goes when the file is closed
// (Documentation/networking/tuntap.rst of Linux).
func openTUN(name string) (*os.File, error) {
	const (
		setInterface = 0x400454ca // TUNSETIFF
		tun, noInfo  = 0x0001, 0x1000
	)
	// Opened without blocking, or Close would not end a Read.
	fd, err := syscall.Open("/dev/net/tun", syscall.O_RDWR|syscall.O_CLOEXEC|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/net/tun: %w", err)
	}
	var request struct { // struct ifreq
		name  [16]byte
		flags uint16
		_     [22]byte
	}
	copy(request.name[:15], name)
	request.flags = tun | noInfo
	if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, uintptr(fd), setInterface, uintptr(unsafe.Pointer(&request))); errno != 0 {
		syscall.Close(fd)
		return nil, fmt.Errorf("make the TUN device %s: %w", name, errno)
	}
	return os.NewFile(uintptr(fd), "/dev/net/tun"), nil
}
