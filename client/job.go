package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/alecthomas/kingpin/v2"

	"github.com/culvert-io/culvert/client/jobrun"
	"github.com/culvert-io/culvert/gateway"
)

// The exit codes of run are the job's. This one says that there was no run, as with
// env(1) and timeout(1).
const codeNoRun = 125

// The exit codes of push, besides 0.
const (
	codeNotPushed = 1 // nobody took it in time: it may be tried again
	codeBadInput  = 2 // the command line or what was to be pushed: nothing was sent
	codeRefused   = 3 // the endpoint refused it: trying again is of no use
)

// maxPush is how many bytes push takes: what a push store takes unless told else.
const maxPush = 64 << 20

// pushURLVariable is the environment variable for --push-url.
const pushURLVariable = "CULVERT_PUSH_URL"

// codedError is an error with an exit code of its own.
type codedError struct {
	error
	code int
}

func (e codedError) Unwrap() error { return e.error }

// usageCode is the exit code for a command line that can't be understood.
func usageCode(command string) int {
	switch command {
	case "run":
		return codeNoRun
	case "push":
		return codeBadInput
	}
	return 1
}

// jobFlags are those of the commands run and push.
type jobFlags struct {
	name          string
	grouping      map[string]string
	interval, ttl string
	url           string
	urlSet        bool
	user          string
	passwordFile  string
	timeout       time.Duration
	command       []string
	method, file  string
}

// agentFlagsOfJobs are the flags of the agent that run and push have a use for.
var agentFlagsOfJobs = map[string]bool{"help": true, "version": true, "tls.cacert": true, "tls.cert": true, "tls.key": true, "token-file": true}

// addTo adds the commands run and push.
func (f *jobFlags) addTo(app *kingpin.Application) {
	f.grouping = map[string]string{}
	run := app.Command("run", "Run a batch job, and push how it went. The exit code is the job's; 125: there was no run.")
	push := app.Command("push", "Push metrics from a file or standard input. Exit codes: 1 not taken in time, 2 bad input, 3 refused.")
	for _, command := range []*kingpin.CmdClause{run, push} {
		command.Flag("job", "Name of the job: the label job.").Required().StringVar(&f.name)
		command.Flag("grouping", "NAME=VALUE of a further label of the group. Repeatable. With instance, the group is the machine's.").
			PlaceHolder("NAME=VALUE").StringMapVar(&f.grouping)
		command.Flag("interval", "How often the job runs, as in 24h: push_up becomes 0 where no push comes for longer. 0: not any more.").
			StringVar(&f.interval)
		command.Flag("ttl", "After which time without a push the metrics go, as in 7d. 0: never.").
			StringVar(&f.ttl)
		command.Flag("push-url", "Where to push: http or https, or unix:PATH. "+pushURLVariable+" says it too.").
			Default(jobrun.DefaultURL).Envar(pushURLVariable).IsSetByUser(&f.urlSet).StringVar(&f.url)
		command.Flag("basic-auth.username", "User for --push-url, as the proxy's role pushers names it.").
			StringVar(&f.user)
		command.Flag("basic-auth.password-file", "File with the password of --basic-auth.username, read for each try.").
			StringVar(&f.passwordFile)
		command.Flag("push-timeout", "How long pushing may take, all tries together.").
			Default("30s").DurationVar(&f.timeout)
	}
	push.Flag("method", "put replaces all metrics of the group, post those of the same names.").
		Default("put").EnumVar(&f.method, "put", "post")
	run.Arg("command", "The command and its arguments, after --.").Required().StringsVar(&f.command)
	push.Arg("file", "File in text format 0.0.4, or in OpenMetrics with # EOF at its end. Standard input by default, or where it is -.").
		Default("-").StringVar(&f.file)
}

// onlyJobFlags returns an error for a flag of the agent that does nothing here.
func onlyJobFlags(parsed *kingpin.ParseContext) error {
	agent := map[string]bool{}
	for _, flag := range new(flags).app().Model().Flags {
		agent[flag.Name] = true
	}
	for _, element := range parsed.Elements {
		if clause, ok := element.Clause.(*kingpin.FlagClause); ok {
			if name := clause.Model().Name; agent[name] && !agentFlagsOfJobs[name] {
				return fmt.Errorf("--%s is the agent's, and does nothing here; leave it away", name)
			}
		}
	}
	return nil
}

// pusher returns what pushes to the group that the flags name. usage tells that an
// error is one of the command line, not of what it refers to.
func (f *flags) pusher() (p *jobrun.Pusher, usage bool, err error) {
	labels := maps.Clone(f.job.grouping)
	if _, ok := labels["job"]; ok {
		return nil, true, errors.New("--grouping: job is the label of --job")
	}
	labels["job"] = f.job.name
	if f.job.name == "" {
		return nil, true, errors.New("--job is empty")
	}
	group, err := gateway.NewKey(labels)
	if err != nil {
		return nil, true, fmt.Errorf("--grouping: %w", err)
	}
	if f.job.timeout <= 0 {
		return nil, true, fmt.Errorf("--push-timeout=%s: it must be more than 0", f.job.timeout)
	}
	target := jobrun.Target{URL: jobrun.DefaultURL, Group: group, Interval: f.job.interval, TTL: f.job.ttl}
	if _, err := jobrun.NewPusher(target); err != nil {
		return nil, true, err
	}
	if f.job.url != "" {
		target.URL = f.job.url
	}
	if _, err := jobrun.NewPusher(target); err != nil {
		// Where the environment says it, all jobs of a host would stand still.
		return nil, f.job.urlSet, err
	}
	if target.Authorize, usage, err = f.pushCredentials(); err != nil {
		return nil, usage, err
	}
	if target.TLS, err = f.tls.New(); err != nil {
		return nil, false, fmt.Errorf("TLS for pushes: %w", err)
	}
	p, err = jobrun.NewPusher(target)
	return p, false, err
}

// pushCredentials returns what adds the credentials of the flags to the header of a push;
// nil where there are none. usage is as in pusher.
func (f *flags) pushCredentials() (authorize func(http.Header) error, usage bool, err error) {
	var inURL bool
	if f.job.urlSet && !strings.HasPrefix(f.job.url, "unix:") {
		raw := f.job.url
		if !strings.Contains(raw, "://") {
			raw = "http://" + raw
		}
		u, err := url.Parse(raw)
		inURL = err == nil && u.User != nil
		if inURL {
			if _, has := u.User.Password(); has {
				warn("everybody on this host can read the password of --push-url in the list of processes; use --basic-auth.password-file, or " + pushURLVariable)
			}
		}
	}
	basic := f.job.user != "" || f.job.passwordFile != ""
	switch {
	case f.tokenFile != "" && basic:
		return nil, true, errors.New("there are --token-file and --basic-auth.*: give one of them")
	case inURL && (f.tokenFile != "" || basic):
		return nil, true, errors.New("there are a user in --push-url and --token-file or --basic-auth.*: give one of them")
	case basic && (f.job.user == "" || f.job.passwordFile == ""):
		return nil, true, errors.New("--basic-auth.username and --basic-auth.password-file go together")
	case strings.Contains(f.job.user, ":"):
		return nil, true, errors.New("--basic-auth.username: a user has no colon in the name")
	case f.tokenFile != "":
		authorize = func(h http.Header) error {
			token, err := readSecret(f.tokenFile)
			if err == nil && strings.ContainsFunc(token, func(c rune) bool { return c <= ' ' || c > '~' }) {
				err = fmt.Errorf("%s: a token is one word of printable ASCII", f.tokenFile)
			}
			if err != nil {
				return fmt.Errorf("--token-file: %w", err)
			}
			h.Set("Authorization", "Bearer "+token)
			return nil
		}
	case basic:
		authorize = func(h http.Header) error {
			password, err := readSecret(f.job.passwordFile)
			if err != nil {
				return fmt.Errorf("--basic-auth.password-file: %w", err)
			}
			(&http.Request{Header: h}).SetBasicAuth(f.job.user, password)
			return nil
		}
	default:
		return nil, false, nil
	}
	// Said ahead of the job, not hours later.
	return authorize, false, authorize(http.Header{})
}

// maxSecret bounds a secret in bytes: it has to go through as a header field.
const maxSecret = 4 << 10

// readSecret returns what is in a file, without white space around it. Its errors do not
// repeat that.
func readSecret(file string) (string, error) {
	info, err := os.Stat(file) // opening a pipe would wait for its writer
	if err != nil {
		return "", err
	}
	if !info.Mode().IsRegular() {
		return "", fmt.Errorf("%s is no regular file; it is read for each try", file)
	}
	f, err := os.Open(file)
	if err != nil {
		return "", err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxSecret+1))
	secret := strings.TrimSpace(string(text))
	switch {
	case err != nil:
		return "", err
	case len(text) > maxSecret:
		return "", fmt.Errorf("%s is larger than %d bytes", file, maxSecret)
	case secret == "":
		return "", fmt.Errorf("%s is empty", file)
	}
	return secret, nil
}

// warn writes one line to standard error.
func warn(message string) {
	fmt.Fprintf(os.Stderr, "culvert-client: %s\n", strings.Join(strings.Fields(message), " "))
}

// runJob runs the job, pushes, and ends the process as the job ended.
func runJob(flags *flags) {
	pusher, usage, err := flags.pusher()
	if usage {
		warn("run: " + err.Error())
		os.Exit(codeNoRun)
	}
	if err != nil {
		warn("nothing will be pushed: " + err.Error())
	}
	jobrun.Run(jobrun.Job{Command: flags.job.command, Pusher: pusher, PushTimeout: flags.job.timeout, Warn: warn}).Exit()
}

// push pushes a file or standard input. Its errors are codedErrors.
func push(ctx context.Context, stdin io.Reader, flags *flags) error {
	pusher, _, err := flags.pusher()
	if err != nil {
		return codedError{fmt.Errorf("push: %w", err), codeBadInput}
	}
	name, in := "standard input", stdin
	if flags.job.file != "" && flags.job.file != "-" {
		f, err := os.Open(flags.job.file)
		if err != nil {
			return codedError{fmt.Errorf("push: %w", err), codeBadInput}
		}
		defer f.Close()
		name, in = flags.job.file, f
	}
	// A read of standard input knows no context: it may go on until the process ends.
	var body []byte
	read := make(chan error, 1)
	go func() {
		var err error
		body, err = jobrun.ReadBody(in, maxPush)
		read <- err
	}()
	select {
	case err = <-read:
	case <-ctx.Done():
		return codedError{errors.New("push: interrupted"), codeNotPushed}
	}
	if err != nil {
		return codedError{fmt.Errorf("push: %s: %w", name, err), codeBadInput}
	}
	request, err := pusher.NewPush(strings.ToUpper(flags.job.method), body)
	if err != nil {
		return codedError{fmt.Errorf("push: %s: %w", name, err), codeBadInput}
	}
	ctx, cancel := context.WithTimeout(ctx, flags.job.timeout)
	defer cancel()
	if _, err := pusher.Push(ctx, request); errors.Is(err, jobrun.ErrRefused) {
		return codedError{err, codeRefused}
	} else if err != nil {
		return codedError{err, codeNotPushed}
	}
	return nil
}
