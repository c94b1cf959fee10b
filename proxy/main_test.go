package main

import (
	"os"
	"strings"
	"testing"
	"time"
)

func TestParseFlags(t *testing.T) {
	c, _, err := parseFlags([]string{"--web.listen-address=:1", "--web.listen-address=:2", "--registration.timeout=10m", "--agent.settle-time=0", "--scrape.max-timeout=1.5h", "--pushprox.enabled=false", "--web.external-url=https://culvert.example.net/x"})
	if err != nil {
		t.Fatal(err)
	}
	if len(c.ListenAddresses) != 2 || c.Fleet.ForgetAfter != 10*time.Minute || c.Fleet.SettleTime >= 0 ||
		c.MaxTimeout != 90*time.Minute || c.ExternalURL.Host != "culvert.example.net" || c.StoragePath != "data/" || !c.DisablePushProx {
		t.Errorf("got %+v", c)
	}
	c, _, err = parseFlags([]string{"--cluster.etcd-endpoints=http://a:2379, http://b:2379", "--cluster.etcd-endpoints=http://c:2379"})
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(c.Cluster.Endpoints, " "); got != "http://a:2379 http://b:2379 http://c:2379" || c.Cluster.TTL != 10*time.Second || c.Cluster.ListenAddress != ":8081" {
		t.Errorf("got %q, %+v", got, c.Cluster)
	}
	c, _, err = parseFlags(nil)
	if err != nil {
		t.Fatal(err)
	}
	if c.Fleet.ForgetAfter != 7*24*time.Hour || c.Fleet.SettleTime != time.Minute || c.ReconnectWait != 2*time.Second || c.Fleet.MaxKnown != 20_000 || c.DisablePushProx || c.ListenAddresses[0] != ":8080" {
		t.Errorf("defaults: %+v", c)
	}
}

func TestParseFlagsErrors(t *testing.T) {
	for flag, want := range map[string]string{
		"--scrape.max-timeout=5x":      "is not a duration",
		"--scrape.max-timeout=-5s":     "is not a duration",
		"--scrape.default-timeout=0":   "more than 0",
		"--scrape.max-concurrent=0":    "at least 1",
		"--web.external-url=proxy:80":  "whole URL",
		"--web.external-url=/culvert":  "whole URL",
		"--no-such-flag":               "--no-such-flag",
		"--pushprox.enabled=maybe":     "true",
		"--agent.max-handshakes=many":  "many",
		"--agent.max-known=0":          "at least 1",
		"--connect.max-concurrent=-1":  "at least 1",
		"--agent.forget-after=forever": "forever",
		"--cluster.ttl=1s":             "2s to 1h",
	} {
		_, _, err := parseFlags([]string{flag})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want an error with %q", flag, err, want)
		}
	}
}

// TestREADMEHasAllFlags keeps the README's table complete.
func TestREADMEHasAllFlags(t *testing.T) {
	text, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, ok := strings.Cut(string(text), "\n## culvert-proxy\n")
	section, _, _ = strings.Cut(section, "\n## ")
	if !ok {
		t.Fatal("README.md has no section culvert-proxy")
	}
	for _, flag := range new(flags).app().Model().Flags {
		if !flag.Hidden && !strings.Contains(section, "`--"+flag.Name+"`") {
			t.Errorf("README.md lacks --%s", flag.Name)
		}
	}
}
