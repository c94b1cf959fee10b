// Package pushproxtest has a client that behaves on the wire as pushprox-client 0.2.0
// does, for tests of what talks to it.
package pushproxtest

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Client is one client. Its exported fields must not be changed once it runs.
type Client struct {
	// ProxyURL is --proxy-url: it may hold a path and user info. Name is --fqdn.
	ProxyURL, Name string
	// Targets performs the scrapes; http.DefaultTransport where it is nil.
	Targets http.RoundTripper
	// Proxy performs polls and pushes; a transport of the client's own where it is nil.
	Proxy http.RoundTripper
	// InitialWait and MaxWait are the pauses after polls that failed: 1 s and 5 s
	// where they are 0.
	InitialWait, MaxWait time.Duration

	// PollErrors, PushErrors and ScrapeErrors count as the client's metrics do.
	PollErrors, PushErrors, ScrapeErrors atomic.Int64
	// Scrapes counts the requests that polls brought.
	Scrapes atomic.Int64
}

const (
	timeoutHeader     = "X-Prometheus-Scrape-Timeout-Seconds"
	timeLeftHeader    = "X-Prometheus-Scrape-Timeout"
	idHeader          = "Id"
	backoffMultiplier = 1.5
)

// Run polls until ctx ends, and waits for the scrapes that run.
func (c *Client) Run(ctx context.Context) {
	var scrapes sync.WaitGroup
	defer scrapes.Wait()
	proxy := c.Proxy
	if proxy == nil {
		own := &http.Transport{MaxIdleConns: 100, IdleConnTimeout: 90 * time.Second}
		defer own.CloseIdleConnections()
		proxy = own
	}
	client := &http.Client{Transport: proxy}
	initial, longest := c.InitialWait, c.MaxWait
	if initial == 0 {
		initial = time.Second
	}
	if longest == 0 {
		longest = 5 * time.Second
	}
	wait := initial
	for ctx.Err() == nil {
		request, err := c.poll(ctx, client)
		if err == nil {
			wait = initial
			c.Scrapes.Add(1)
			scrapes.Go(func() { c.scrape(ctx, client, request) })
			continue
		}
		if ctx.Err() != nil {
			return
		}
		c.PollErrors.Add(1)
		select {
		case <-time.After(time.Duration(float64(wait) * (0.5 + rand.Float64()))):
		case <-ctx.Done():
		}
		wait = min(time.Duration(float64(wait)*backoffMultiplier), longest)
	}
}

// endpoint returns a URL below ProxyURL, of which trailing slashes don't count.
func (c *Client) endpoint(name string) string { return strings.TrimRight(c.ProxyURL, "/") + "/" + name }

// poll returns the request that is the answer's body, whatever the answer's status.
func (c *Client) poll(ctx context.Context, client *http.Client) (*http.Request, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.endpoint("poll"), strings.NewReader(c.Name))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "") // goes out, empty
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	whole, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, err
	}
	return http.ReadRequest(bufio.NewReader(bytes.NewReader(whole)))
}

// scrape performs a request and pushes what came of it.
func (c *Client) scrape(ctx context.Context, client *http.Client, req *http.Request) {
	var timeout time.Duration
	seconds, err := strconv.ParseFloat(req.Header.Get(timeoutHeader), 64)
	if err == nil {
		timeout = time.Duration(seconds * float64(time.Second))
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	var resp *http.Response
	if err == nil {
		resp, err = c.fetch(ctx, req)
	}
	if err != nil {
		c.ScrapeErrors.Add(1)
		resp = &http.Response{StatusCode: http.StatusInternalServerError, Header: http.Header{}, Body: io.NopCloser(strings.NewReader(err.Error()))}
	}
	deadline, _ := ctx.Deadline()
	resp.Header.Set(idHeader, req.Header.Get(idHeader))
	resp.Header.Set(timeLeftHeader, fmt.Sprintf("%f", time.Until(deadline).Seconds()))
	var whole bytes.Buffer
	resp.Write(&whole) // as much as the target sent
	resp.Body.Close()
	push, err := http.NewRequestWithContext(ctx, http.MethodPost, c.endpoint("push"), &whole)
	if err == nil {
		resp, err = client.Do(push)
	}
	if err != nil {
		c.PushErrors.Add(1)
		return
	}
	resp.Body.Close() // the client itself leaves the answer open, and reads none of it
}

// fetch sends the request to the target, by the client's own rules.
func (c *Client) fetch(ctx context.Context, req *http.Request) (*http.Response, error) {
	if req.URL.Hostname() != c.Name {
		return nil, errors.New("scrape target doesn't match client fqdn")
	}
	if query := req.URL.Query(); query.Get("_scheme") == "https" {
		query.Del("_scheme")
		req.URL.Scheme, req.URL.RawQuery = "https", query.Encode()
	}
	target, err := url.Parse(req.URL.String())
	if err != nil {
		return nil, err
	}
	out := req.WithContext(ctx)
	out.URL, out.RequestURI = target, ""
	return (&http.Client{Transport: c.Targets}).Do(out)
}
