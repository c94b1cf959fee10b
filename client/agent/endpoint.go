package agent

import (
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/common/route"

	"github.com/culvert-io/culvert/client/spool"
	"github.com/culvert-io/culvert/gateway"
)

// scopeParameter is the query parameter that says whose a group is.
const scopeParameter = "scope"

// kept are the header fields that go to the proxies with a push.
var kept = []string{"Content-Type", "Content-Encoding", gateway.HeaderTTL, gateway.HeaderInterval, gateway.HeaderFailureTime, gateway.HeaderUnlessPushedSince}

// routes are those of the Pushgateway's API, by the router that the Pushgateway has, so
// that all other answers (404, 405 with Allow, OPTIONS, redirects) are the same.
func (p *pushes) routes() http.Handler {
	r := route.New()
	r.Get("/metrics", p.agent.Handler().ServeHTTP)
	for _, path := range []string{"/metrics/job/:job", "/metrics/job/:job/*labels", "/metrics/job@base64/:job", "/metrics/job@base64/:job/*labels"} {
		r.Put(path, p.serveGroup)
		r.Post(path, p.serveGroup)
		r.Del(path, p.serveGroup)
	}
	r.Put("/api/v1/push", p.serveBatch)
	r.Post("/api/v1/push", p.serveBatch)
	r.Get("/api/v1/metrics", func(w http.ResponseWriter, r *http.Request) {
		if g := p.gateway.Load(); g != nil {
			g.ServeQuery(w, r)
			return
		}
		p.refuse(w, &p.groups)
	})
	r.Get("/api/v1/", http.NotFound) // the router redirects from /api/v1
	r.Options("/api/v1/*any", func(w http.ResponseWriter, _ *http.Request) { gateway.SetAPIHeaders(w.Header()) })
	r.Get("/-/healthy", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "OK") })
	r.Get("/-/ready", func(w http.ResponseWriter, _ *http.Request) {
		if err := p.Err(); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprint(w, "OK")
	})
	mux := http.NewServeMux()
	mux.Handle("/", r) // it redirects from paths with "//", "." and ".."
	return mux
}

// serveGroup answers PUT, POST and DELETE of a group.
func (p *pushes) serveGroup(w http.ResponseWriter, r *http.Request) {
	rest := strings.TrimPrefix(r.URL.Path, "/metrics/job")
	key, err := gateway.ParsePath(rest)
	machine := false
	if err == nil {
		instance, _ := key.Get("instance")
		machine, err = scopeOf(r, instance != "")
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	switch g := p.gateway.Load(); {
	case machine && g == nil:
		p.refuse(w, &p.groups)
	case machine && r.Method == http.MethodDelete:
		g.ServeDelete(w, r, rest)
	case machine:
		g.ServePush(w, r, rest)
	case r.Method == http.MethodDelete:
		p.pass(w, r, func(w http.ResponseWriter, to gateway.Pass) { p.reader.ServePassDelete(w, r, rest, to) })
	default:
		p.pass(w, r, func(w http.ResponseWriter, to gateway.Pass) { p.reader.ServePass(w, r, rest, to) })
	}
}

// serveBatch answers a push to many groups.
func (p *pushes) serveBatch(w http.ResponseWriter, r *http.Request) {
	names := strings.Split(r.URL.Query().Get("group_by"), ",")
	machine, err := scopeOf(r, slices.ContainsFunc(names, func(name string) bool { return strings.TrimSpace(name) == "instance" }))
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	switch g := p.gateway.Load(); {
	case machine && g == nil:
		p.refuse(w, &p.groups)
	case machine:
		g.ServeBatch(w, r)
	default:
		p.pass(w, r, func(w http.ResponseWriter, to gateway.Pass) { p.reader.ServePassBatch(w, r, to) })
	}
}

// refuse answers while a file is not open.
func (p *pushes) refuse(w http.ResponseWriter, file *pushFile) {
	reason := errors.New("it is being opened")
	if err := file.err.Load(); err != nil {
		reason = *err
	}
	w.Header().Set("Retry-After", strconv.Itoa(int(reopenEvery/time.Second)))
	http.Error(w, fmt.Sprintf("pushes can't be taken now: %v", reason), http.StatusServiceUnavailable)
}

// scopeOf tells whether a push is the machine's, which the request may say.
func scopeOf(r *http.Request, byKey bool) (machine bool, err error) {
	switch scope := r.URL.Query()[scopeParameter]; {
	case scope == nil:
		return byKey, nil
	case slices.Equal(scope, []string{"machine"}):
		return true, nil
	case slices.Equal(scope, []string{"service"}):
		return false, nil
	default:
		return false, fmt.Errorf("scope=%q is not known; write scope=machine, scope=service, or leave it out: a group with an instance is the machine's", strings.Join(scope, ","))
	}
}

// pass answers a request that is for the proxies: it goes to the spool.
func (p *pushes) pass(w http.ResponseWriter, r *http.Request, serve func(http.ResponseWriter, gateway.Pass)) {
	counted := &statusWriter{ResponseWriter: w, status: http.StatusOK}
	defer func() {
		p.agent.metrics.spoolRequests.WithLabelValues(strconv.Itoa(counted.status)).Inc()
	}()
	queue := p.spool.Load()
	if queue == nil {
		p.refuse(counted, &p.queue)
		return
	}
	serve(counted, gateway.Pass{Reserved: proxyPrefix, Take: func(at time.Time, body []byte) error {
		if at.IsZero() { // the push says that it never was
			at = time.Unix(0, 0)
		}
		push := &spool.Push{Received: at, Method: r.Method, Target: targetOf(r.URL), Header: http.Header{}, Body: body}
		for _, name := range kept {
			if value := r.Header.Get(name); value != "" {
				push.Header.Set(name, value)
			}
		}
		err := queue.Append(r.Context(), push)
		if errors.Is(err, spool.ErrTooLarge) {
			err = fmt.Errorf("%w: %w", gateway.ErrBodyTooLarge, err)
		}
		return err
	}})
}

// statusWriter keeps the status of an answer.
type statusWriter struct {
	http.ResponseWriter
	status int
}

func (w *statusWriter) WriteHeader(status int) {
	w.status = status
	w.ResponseWriter.WriteHeader(status)
}

// Unwrap is for http.ResponseController.
func (w *statusWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// targetOf returns path and query without what is between the pusher and this agent.
func targetOf(u *url.URL) string {
	out := url.URL{Path: u.Path, RawPath: u.RawPath, RawQuery: u.RawQuery}
	if query := u.Query(); query.Has(scopeParameter) {
		query.Del(scopeParameter)
		out.RawQuery = query.Encode()
	}
	return out.RequestURI()
}
