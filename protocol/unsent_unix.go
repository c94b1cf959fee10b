//go:build linux || darwin

package protocol

import (
	"net"

	"golang.org/x/sys/unix"
)

// limitUnsent has writes to the connection wait while the kernel holds n bytes
// that it has not sent yet (TCP_NOTSENT_LOWAT of Linux's tcp(7) and of Darwin). A
// system that refuses only has small frames wait longer.
func limitUnsent(conn *net.TCPConn, n int) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return
	}
	raw.Control(func(fd uintptr) {
		unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, n)
	})
}
