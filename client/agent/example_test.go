package agent_test

import (
	"context"
	"log"
	"os"
	"os/signal"

	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/culvert-io/culvert/client/agent"
)

// A program that Prometheus scrapes without a port of its own: as
// http://app.web-1/metrics, through the proxy.
func Example() {
	a, err := agent.New(agent.Config{
		Name:      "web-1",
		ProxyURLs: []string{"https://proxy.example.net"},
		Targets:   []agent.Target{{Name: "app", Handler: promhttp.Handler()}},
	})
	if err != nil {
		log.Fatal(err)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	a.Run(ctx) // until the program ends
}
