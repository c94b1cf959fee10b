package gateway_test

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/culvert-io/culvert/gateway"
	"github.com/culvert-io/culvert/gateway/boltstore"
)

func BenchmarkPush(b *testing.B) {
	for _, groups := range []int{100, 10000} {
		b.Run(fmt.Sprint(groups), func(b *testing.B) {
			backend, err := boltstore.Open(b.TempDir() + "/push.db")
			if err != nil {
				b.Fatal(err)
			}
			store, err := gateway.OpenStore(gateway.StoreConfig{Logger: slog.New(slog.DiscardHandler)}, backend)
			if err != nil {
				b.Fatal(err)
			}
			ctx, cancel := context.WithCancel(context.Background())
			done := make(chan error, 1)
			go func() { done <- store.Run(ctx) }()
			defer func() { cancel(); <-done }()
			g := gateway.New(gateway.Config{}, store)
			var body strings.Builder
			for i := range 50 {
				fmt.Fprintf(&body, "# TYPE bench_metric_%02d gauge\nbench_metric_%02d{kind=\"some_value\"} %d\n", i, i, 1)
			}
			push := func(n int) {
				r := httptest.NewRequest(http.MethodPut, "/", strings.NewReader(body.String()))
				w := httptest.NewRecorder()
				g.ServePush(w, r, fmt.Sprintf("/bench/instance/host-%05d", n))
				if w.Code != 200 {
					b.Fatal(w.Body)
				}
			}
			for n := range groups {
				push(n)
			}
			var next atomic.Int64
			b.SetParallelism(4)
			b.ReportAllocs()
			b.ResetTimer()
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					push(int(next.Add(7919)) % groups)
				}
			})
		})
	}
}
