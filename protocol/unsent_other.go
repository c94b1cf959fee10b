//go:build !linux && !darwin

package protocol

import "net"

// limitUnsent does nothing: this system has no such limit.
func limitUnsent(*net.TCPConn, int) {}
