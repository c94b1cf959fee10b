package server

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/exporter-toolkit/web"
	"go.yaml.in/yaml/v2"
	"golang.org/x/time/rate"
)

// listener is one bound address with its server.
type listener struct {
	net.Listener
	server  *http.Server
	tls     bool
	purpose string
}

type rawConnKey struct{}

// listening has connections end whose other side is gone without a word within half a
// minute: the polls of PushProx clients say nothing for hours.
var listening = net.ListenConfig{KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 15 * time.Second, Interval: 5 * time.Second, Count: 3}}

// listen binds addresses for a purpose that the log tells, with the TLS and the headers of a web configuration.
//
// The file is exporter-toolkit's, checked by its code. Its own Serve is not used:
// it reads the file anew for every request, offers HTTP/2 if asked to, and its
// basic_auth_users would claim the Authorization that belongs to the target.
func (s *Server) listen(purpose string, addresses []string, webConfig string, handler http.Handler) ([]*listener, error) {
	config, err := loadWebConfig(webConfig)
	if err != nil {
		return nil, err
	}
	if len(config.HTTPConfig.Header) > 0 || config.RateLimiterConfig.Interval != 0 {
		handler = decorate(handler, config)
	}
	var listeners []*listener
	for _, address := range addresses {
		l, err := listening.Listen(context.Background(), "tcp", address)
		if err != nil {
			for _, l := range listeners {
				l.Close()
			}
			return nil, fmt.Errorf("listen on %q: %w", address, err)
		}
		out := &listener{Listener: l, purpose: purpose}
		if config.TLSConfig.IsEnabled() {
			out.tls = true
			out.Listener = tls.NewListener(l, reloadingTLS(webConfig))
		}
		out.server = s.newServer(handler)
		out.server.ConnState = s.pushProx.connState
		out.server.ConnContext = func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, rawConnKey{}, c)
		}
		listeners = append(listeners, out)
	}
	return listeners, nil
}

// What slow and silent clients can hold, on each listener and on the streams of agents.
const (
	// headTimeout is how long a TLS handshake may take, and the head of a request from
	// its first byte on; the first one from the connection's start.
	headTimeout = 10 * time.Second
	// maxHead bounds the head of a request, in bytes. Beyond it the answer is 431.
	maxHead = 64 << 10
	// idleTimeout is how long a connection may wait for its next request: longer than
	// common scrape intervals.
	idleTimeout = 10 * time.Minute
	// answerTimeout is how long an answer may take that has no longer time of its own.
	answerTimeout = time.Minute
	// restTimeout is how long what is left of a request's body may take to come at the
	// end, of which net/http reads up to 256 KiB before it answers; and then as long
	// again, the end of the answer to be read.
	restTimeout = 5 * time.Second
)

// newServer returns a server with these limits. Handlers call finish at their end, and
// extend the time for what they know to take longer.
func (s *Server) newServer(handler http.Handler) *http.Server {
	return &http.Server{
		Handler:           handler,
		ReadHeaderTimeout: headTimeout,
		WriteTimeout:      answerTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHead,
		ErrorLog:          errorLog(s.logger),
	}
}

// finish gives a client the time to take the rest of an answer, and to send the rest of
// its request. It must not be called where the connection was taken over.
func finish(w http.ResponseWriter) {
	conn, now := http.NewResponseController(w), time.Now()
	conn.SetReadDeadline(now.Add(restTimeout))
	conn.SetWriteDeadline(now.Add(2 * restTimeout))
}

// loadWebConfig reads and checks a web configuration; "" is an empty one.
func loadWebConfig(path string) (*web.Config, error) {
	config := new(web.Config)
	if path == "" {
		return config, nil
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("web configuration: %w", err)
	}
	if err := yaml.UnmarshalStrict(text, config); err != nil {
		return nil, fmt.Errorf("web configuration %s: %w", path, err)
	}
	if len(config.Users) > 0 {
		return nil, fmt.Errorf("web configuration %s: basic_auth_users is not supported: it would claim the Authorization header that belongs to the targets; name who may do what under roles in --config.file", path)
	}
	if err := web.Validate(path); err != nil {
		return nil, fmt.Errorf("web configuration %s: %w", path, err)
	}
	config.TLSConfig.SetDirectory(filepath.Dir(path))
	return config, nil
}

// reloadingTLS takes up a file that has changed, and certificates that were renewed, with
// the next connection, as exporter-toolkit does, so that they need no restart. It
// offers HTTP/1.1 alone, whatever http2: says: with HTTP/2 Prometheus's scrapes
// through an https proxy_url fail, and there is no upgrade and no CONNECT.
func reloadingTLS(path string) *tls.Config {
	kept := keptTLS{path: path}
	return &tls.Config{
		NextProtos:         []string{"http/1.1"},
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return kept.current() },
	}
}

// keptTLS keeps what was made of a web configuration until one of its files changes. To
// read and check them for each connection costs as much as the rest of its handshake, and
// thousands of agents may come back at once.
type keptTLS struct {
	path string

	mu     sync.Mutex // protects what follows
	config *tls.Config
	files  []string
	stamp  string // of the files, before they were read
}

// errNoTLS: the web configuration has no section tls_server_config, or has lost it.
var errNoTLS = errors.New("it has no TLS")

func (k *keptTLS) current() (*tls.Config, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.config != nil && stampOf(k.files) == k.stamp {
		return k.config, nil
	}
	k.config = nil
	before := stampOf([]string{k.path})
	config, err := loadWebConfig(k.path)
	if err != nil {
		return nil, err
	}
	if !config.TLSConfig.IsEnabled() {
		return nil, fmt.Errorf("web configuration %s: %w", k.path, errNoTLS)
	}
	k.files = []string{k.path, config.TLSConfig.TLSCertPath, config.TLSConfig.TLSKeyPath, config.TLSConfig.ClientCAs}
	stamp := stampOf(k.files)
	tlsConfig, err := web.ConfigToTLSConfig(&config.TLSConfig)
	if err != nil {
		return nil, err
	}
	certificate, err := tlsConfig.GetCertificate(nil) // it would read the files anew each time
	if err != nil {
		return nil, err
	}
	tlsConfig.Certificates, tlsConfig.GetCertificate = []tls.Certificate{*certificate}, nil
	tlsConfig.NextProtos = []string{"http/1.1"}
	tlsConfig.SessionTicketsDisabled = true // each session shows its certificate
	if strings.HasPrefix(stamp, before) {
		k.config, k.stamp = tlsConfig, stamp
	}
	return tlsConfig, nil
}

// stampOf tells the current version of files, of which "" are none.
func stampOf(files []string) string {
	var stamp strings.Builder
	for _, file := range files {
		if file == "" {
			continue
		}
		info, err := os.Stat(file)
		if err != nil {
			fmt.Fprintf(&stamp, "%v;", err)
			continue
		}
		fmt.Fprintf(&stamp, "%d %d;", info.ModTime().UnixNano(), info.Size())
	}
	return stamp.String()
}

// decorate adds the response headers and the rate limit of a web configuration.
func decorate(next http.Handler, config *web.Config) http.Handler {
	limiter := rate.NewLimiter(rate.Inf, 0)
	if interval := config.RateLimiterConfig.Interval; interval != 0 {
		limiter = rate.NewLimiter(rate.Every(interval), config.RateLimiterConfig.Burst)
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !limiter.Allow() {
			http.Error(w, "the rate limit of the web configuration is reached", http.StatusTooManyRequests)
			return
		}
		for name, value := range config.HTTPConfig.Header {
			w.Header().Set(name, value)
		}
		next.ServeHTTP(w, r)
	})
}

// errorLog returns a logger for net/http. What a client did wrong is no news; a
// handler that panicked is.
func errorLog(logger *slog.Logger) *log.Logger {
	return log.New(errorWriter{logger}, "", 0)
}

type errorWriter struct{ logger *slog.Logger }

func (w errorWriter) Write(line []byte) (int, error) {
	level := slog.LevelDebug
	if bytes.HasPrefix(line, []byte("http: panic")) {
		level = slog.LevelError
	}
	w.logger.Log(context.Background(), level, string(bytes.TrimSpace(line)))
	return len(line), nil
}
