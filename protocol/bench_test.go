package protocol_test

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"
	"time"
)

const requestSize = 300 // as a scrape's

var longestAnswer = make([]byte, 1<<20)

// answerSizes reads requests that name the size of their response in the first
// four bytes.
func answerSizes(c net.Conn) {
	request := make([]byte, requestSize)
	for {
		if _, err := io.ReadFull(c, request); err != nil {
			return
		}
		if _, err := c.Write(longestAnswer[:binary.BigEndian.Uint32(request)]); err != nil {
			return
		}
	}
}

// ask sends one request and reads its response.
func ask(b *testing.B, c net.Conn, buf []byte, size int) {
	binary.BigEndian.PutUint32(buf, uint32(size))
	if _, err := c.Write(buf[:requestSize]); err != nil {
		b.Fatal(err)
	}
	for left := size; left > 0; {
		n, err := c.Read(buf)
		if err != nil {
			b.Fatal(err)
		}
		left -= n
	}
}

// against runs the benchmark over a plain TCP connection and over both
// transports, and reports how many times longer than over TCP it took.
func against(b *testing.B, size int, over func(b *testing.B, connect func() net.Conn, size int)) {
	var tcp float64
	run := func(name string, connect func(b *testing.B) func() net.Conn) {
		b.Run(name, func(b *testing.B) {
			c := connect(b)
			b.ReportAllocs()
			b.SetBytes(int64(size))
			over(b, c, size)
			took := float64(b.Elapsed()) / float64(b.N)
			if name == "over=tcp" {
				tcp = took
			}
			if tcp > 0 { // -bench did not leave it out
				b.ReportMetric(took/tcp, "x-tcp")
			}
		})
	}
	run("over=tcp", func(b *testing.B) func() net.Conn {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() { defer c.Close(); answerSizes(c) }()
			}
		}()
		return func() net.Conn {
			c, err := net.Dial("tcp", l.Addr().String())
			if err != nil {
				b.Fatal(err)
			}
			return c
		}
	})
	for _, transport := range transports {
		run("over="+transport, func(b *testing.B) func() net.Conn {
			p := tunnel{transport: transport}.open(b)
			serve(b, p.agent, answerSizes)
			return func() net.Conn {
				c, err := p.proxy.Open(b.Context())
				if err != nil {
					b.Fatal(err)
				}
				return c
			}
		})
	}
}

// BenchmarkReused asks over one stream, as pooled streams are used.
func BenchmarkReused(b *testing.B) {
	for _, size := range []int{1000, 100_000, 1 << 20} {
		b.Run(fmt.Sprintf("size=%d", size), func(b *testing.B) {
			against(b, size, func(b *testing.B, connect func() net.Conn, size int) {
				c := connect()
				defer c.Close()
				buf := make([]byte, 64<<10)
				for b.Loop() {
					ask(b, c, buf, size)
				}
			})
		})
	}
}

// BenchmarkOpened opens a stream, or dials a TCP connection, for each request.
func BenchmarkOpened(b *testing.B) {
	against(b, 1000, func(b *testing.B, connect func() net.Conn, size int) {
		buf := make([]byte, 64<<10)
		for b.Loop() {
			c := connect()
			ask(b, c, buf, size)
			c.Close()
		}
	})
}

// BenchmarkParallel asks over many streams of one session at once.
func BenchmarkParallel(b *testing.B) {
	const size = 100_000
	against(b, size, func(b *testing.B, connect func() net.Conn, size int) {
		b.SetParallelism(8)
		b.RunParallel(func(pb *testing.PB) {
			c := connect()
			defer c.Close()
			c.SetDeadline(time.Now().Add(10 * time.Minute))
			buf := make([]byte, 64<<10)
			for pb.Next() {
				ask(b, c, buf, size)
			}
		})
	})
}

// BenchmarkClose closes sessions that have streams in a pool: each has a reader
// that waits. slowest is the longest of all, in milliseconds.
func BenchmarkClose(b *testing.B) {
	for _, n := range []int{0, 10, 100} {
		b.Run(fmt.Sprintf("streams=%d", n), func(b *testing.B) {
			var slowest, total time.Duration
			for range b.N {
				p := tunnel{}.open(b)
				var readers sync.WaitGroup
				for range n {
					near, far := streams(b, p.proxy, p.agent)
					readers.Go(func() { near.Read(make([]byte, 1)) })
					readers.Go(func() { far.Read(make([]byte, 1)) })
				}
				start := time.Now()
				p.proxy.Close()
				<-p.agent.Done()
				readers.Wait()
				took := time.Since(start)
				total, slowest = total+took, max(slowest, took)
				p.agent.Close()
			}
			b.ReportMetric(float64(total)/float64(b.N), "ns/op")
			b.ReportMetric(float64(slowest)/1e6, "slowest-ms")
		})
	}
}
