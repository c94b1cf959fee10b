package protocol_test

import (
	"bufio"
	"bytes"
	"crypto/sha1"
	"encoding/base64"
	"errors"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/culvert-io/culvert/protocol"
)

// acceptGUID is the constant of the WebSocket handshake (RFC 6455, section 1.3).
const acceptGUID = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"

// FuzzDial answers the handshake with bytes and then ends the connection. $ACCEPT
// stands for what Sec-WebSocket-Accept has to be. Whatever it is, Dial comes back, with
// a session that ends or an error that is fit to be shown.
func FuzzDial(f *testing.F) {
	f.Add([]byte("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: culvert/1\r\nCulvert-Proxy: 1\r\n\r\n"))
	f.Add([]byte("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: culvert/1\r\n\r\n\x00\x02\x00\x01\x00\x00\x00\x00\x00\x00\x00\x01"))
	f.Add([]byte("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: $ACCEPT\r\nSec-WebSocket-Protocol: culvert.v1\r\n\r\n\x82\x0c\x00\x02\x00\x01\x00\x00\x00\x00\x00\x00\x00\x01"))
	f.Add([]byte("HTTP/1.1 101 Switching Protocols\r\nUpgrade: h2c\r\n\r\n"))
	f.Add([]byte("HTTP/1.1 429 Busy\r\nCulvert-Error: busy\r\nRetry-After: 99999999999999999999\r\nContent-Length: 5\r\n\r\nwait\n"))
	f.Add([]byte("HTTP/1.1 400 no-upgrade\r\nCulvert-Error: no-upgrade\r\nTransfer-Encoding: chunked\r\n\r\nffffffff\r\nx"))
	f.Add([]byte("HTTP/1.1 302 Found\r\nLocation: http://evil/\x1b[2J\r\nServer: \x1b[2J\r\n\r\n"))
	f.Add([]byte("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 426 Upgrade Required\r\nUpgrade: culvert/2\r\n\r\n"))
	f.Add([]byte("HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\n\x1f\x8b"))
	f.Add([]byte{})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { l.Close() })
	answers := make(chan []byte, 1)
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			answer := <-answers
			answers <- answer // for the next try of the same Dial
			conn.SetDeadline(time.Now().Add(patience))
			if r, err := http.ReadRequest(bufio.NewReader(conn)); err == nil {
				sum := sha1.Sum([]byte(r.Header.Get("Sec-WebSocket-Key") + acceptGUID))
				conn.Write(bytes.ReplaceAll(answer, []byte("$ACCEPT"), []byte(base64.StdEncoding.EncodeToString(sum[:]))))
				conn.(*net.TCPConn).CloseWrite()
				io.Copy(io.Discard, conn) // a close with unread bytes would be a reset
			}
			conn.Close()
		}
	}()
	u := &url.URL{Scheme: "http", Host: l.Addr().String()}
	f.Fuzz(func(t *testing.T, answer []byte) {
		answers <- answer
		defer func() { <-answers }()
		d := &protocol.Dialer{ProxyURL: u, Agent: "web-1", Instance: "1", Timeout: patience, Session: protocol.SessionConfig{DeadAfter: patience}}
		s, err := d.Dial(t.Context())
		if err != nil {
			handshake, ok := errors.AsType[*protocol.HandshakeError](err)
			if !ok {
				t.Fatalf("%T %v is no *HandshakeError", err, err)
			}
			for e := handshake; e != nil; e = e.Before {
				refusal, ok := protocol.AsRefusal(e.Err)
				if ok && (refusal.RetryAfter < 0 || refusal.RetryAfter > time.Hour || len(refusal.Message) > 9000 || strings.Contains(refusal.Message, "\n")) {
					t.Errorf("the refusal %+v", refusal)
				}
			}
			return
		}
		defer s.Close()
		select {
		case <-s.Done():
		case <-time.After(patience):
			t.Fatal("the connection has ended, and the session has not")
		}
		if s.Err() == nil {
			t.Error("the session ended without an error")
		}
	})
}
