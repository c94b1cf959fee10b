package gateway_test

import (
	"testing"
	"time"

	"github.com/culvert-io/culvert/gateway"
)

// A push that tells when it was made failed then: a good one may have been made since,
// and wait behind it.
func TestFailedWhenMade(t *testing.T) {
	c := newClock()
	s := start(t, gateway.StoreConfig{Now: c.now}, gateway.Memory())
	s.want(400, "PUT", "/j", "m 1 5\n", gateway.HeaderPushTime, "1899999000")
	s.want(200, "PUT", "/j", "m 1\n", gateway.HeaderPushTime, "1899999500")
	s.expectPush(`push_failure_time_seconds{instance="",job="j"} 1.899999e+09`, `push_time_seconds{instance="",job="j"} 1.8999995e+09`)
	c.advance(time.Hour)
	s.want(400, "PUT", "/j", "m 1 5\n")
	s.want(400, "PUT", "/j", "m 1 5\n", gateway.HeaderPushTime, "1899999000")
	s.expectPush(`push_failure_time_seconds{instance="",job="j"} 1.9000036e+09`, `push_time_seconds{instance="",job="j"} 1.8999995e+09`)
}
