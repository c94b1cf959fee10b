// Package jobrun runs a batch job and pushes how it went: when it started, how long
// it took, how it ended, what it used, and the metrics that it wrote itself.
//
// The job keeps what it would have without: its standard files, its environment,
// its signals and its end. Whatever becomes of the push, the job is not touched.
//
// One push at the end brings the run's own metrics:
//
//	culvert_job_start_time_seconds         gauge    Unix time of the start
//	culvert_job_duration_seconds           gauge
//	culvert_job_exit_code                  gauge    Result.ExitCode
//	culvert_job_last_success_time_seconds  gauge    Unix time of the end of the last run with exit code 0
//	culvert_job_cpu_seconds{mode}          gauge    of the last run; mode is user or system
//	culvert_job_peak_memory_bytes          gauge    Result.PeakMemory, where the system tells
//	culvert_job_runs_total{outcome}        counter  Result.Outcome
//
// The push store adds the counter to what it has and replaces the gauges
// (aggregate=sum, gauge=last): a store that doesn't know that, as the Pushgateway,
// has the last run alone in the counter. A failed run doesn't name the time of the
// last success, which so stays. A second push replaces those families that the job
// wrote to $CULVERT_METRICS_FILE.
//
// A push to which an answer is lost may have been made. It is not made again, but
// its gauges are: a run counts once or, seldom, not at all, and never twice.
package jobrun

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"
)

// MetricsFileVariable is the environment variable that tells the job where it can
// write metrics of its own.
const MetricsFileVariable = "CULVERT_METRICS_FILE"

// The exit codes of commands that can't be run, as shells have them.
const (
	CodeNotExecutable = 126
	CodeNotFound      = 127
)

// whatIsLeft is how long pushing may go on once a signal has come meanwhile. The
// signal may have been meant for the job, which ended by it a moment before.
const whatIsLeft = 2 * time.Second

// Job is a job to be run.
type Job struct {
	// Command is the program, looked up in PATH, and its arguments.
	Command []string
	// Pusher takes the metrics. Nil means none are pushed.
	Pusher *Pusher
	// PushTimeout bounds all of pushing, the tries and the waits.
	PushTimeout time.Duration
	// Warn is told in one line what went wrong that is not the job's.
	Warn func(message string)
}

// Result tells how a run went.
type Result struct {
	Start    time.Time
	Duration time.Duration
	// Outcome is "success", "failure" (the exit code was not 0), "signal" (it died by
	// one), or "start_error" (there was nothing to be run).
	Outcome string
	// ExitCode is the exit code as a shell tells it: 128+n for the signal n, 127 where
	// the command was not found, and 126 where it can't be executed.
	ExitCode int
	// Signal is what the job died by, 0 if it did not.
	Signal syscall.Signal
	// User and System are the CPU time of the job and of those of its descendants
	// that were waited for.
	User, System time.Duration
	// PeakMemory is the largest resident set, in bytes, of the job or one of those
	// descendants; 0 where the system doesn't tell. On Linux it is at least what
	// culvert-client itself takes, because the job's process starts as a copy of it.
	PeakMemory int64
}

// Run runs the job with this process's standard files, waits for its end, and
// pushes. It passes on the signals SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1 and
// SIGUSR2; those of them that are ignored stay ignored, for the job too, as far as
// the Go runtime tells (SIGHUP and SIGINT: nohup works). SIGINT and SIGQUIT are not
// passed on while the job is in the terminal's foreground with this process: then
// they come from the terminal, which sends them to both.
//
// Windows has no such signals: there the console tells the job itself.
func Run(job Job) Result {
	// Caught, not ignored, so that the job starts with the default: a push must be
	// possible where nobody reads standard error any more.
	pipes := make(chan os.Signal, 1)
	for _, s := range brokenPipe {
		signal.Notify(pipes, s)
	}
	defer signal.Stop(pipes)
	signals := make(chan os.Signal, 16)
	for _, s := range passedOn {
		if !signal.Ignored(s) {
			signal.Notify(signals, s)
		}
	}
	defer signal.Stop(signals)

	cmd := exec.Command(job.Command[0], job.Command[1:]...)
	if errors.Is(cmd.Err, exec.ErrDot) && runtime.GOOS != "windows" {
		cmd.Err = nil // PATH says so, and it is the user's
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = withoutVariable(os.Environ(), MetricsFileVariable)
	var metricsFile string
	if job.Pusher != nil {
		dir, err := os.MkdirTemp("", "culvert-client-run-")
		if err != nil {
			job.Warn(fmt.Sprintf("the job has no %s: %v", MetricsFileVariable, err))
		} else {
			defer os.RemoveAll(dir) // what can't be removed is left to whoever cleans TMPDIR
			metricsFile = filepath.Join(dir, "metrics.prom")
			cmd.Env = append(cmd.Env, MetricsFileVariable+"="+metricsFile)
		}
	}

	result := Result{Start: time.Now()}
	if err := cmd.Start(); err != nil {
		result.Outcome, result.ExitCode = "start_error", CodeNotExecutable
		if errors.Is(err, exec.ErrNotFound) || errors.Is(err, fs.ErrNotExist) || errors.Is(err, exec.ErrDot) {
			result.ExitCode = CodeNotFound
		}
		if errors.Is(err, syscall.ENOEXEC) {
			err = fmt.Errorf("%w; a script needs a first line like #!/bin/sh", err)
		}
		job.Warn(fmt.Sprintf("the job can't be run: %v", err))
	} else {
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			_ = cmd.Wait() // its state tells all
		}()
		for running := true; running; {
			select {
			case s := <-signals:
				if !sentToBoth(s, cmd.Process.Pid) {
					_ = cmd.Process.Signal(s) // an error now is the job's end
				}
			case <-ended:
				running = false
			}
		}
		result.ended(cmd.ProcessState)
	}
	result.Duration = time.Since(result.Start)
	if job.Pusher == nil {
		return result
	}

	ctx, cancel := context.WithTimeout(context.Background(), job.PushTimeout)
	defer cancel()
	ctx, giveUp := context.WithCancelCause(ctx)
	pushed := make(chan struct{})
	go func() {
		defer close(pushed)
		job.push(ctx, result, metricsFile)
	}()
	var soon <-chan time.Time
	var last os.Signal
	for {
		select {
		case s := <-signals:
			if soon != nil {
				giveUp(fmt.Errorf("signal: %v", s))
			} else {
				soon, last = time.After(whatIsLeft), s
			}
		case <-soon:
			giveUp(fmt.Errorf("signal: %v", last))
		case <-pushed:
			giveUp(nil)
			return result
		}
	}
}

// withoutVariable returns the environment without a variable: the one of an outer
// run is not for this job.
func withoutVariable(env []string, name string) []string {
	out := make([]string, 0, len(env)+1)
	for _, pair := range env {
		if !strings.HasPrefix(pair, name+"=") {
			out = append(out, pair)
		}
	}
	return out
}

// ended takes what the system tells of the job's end.
func (r *Result) ended(state *os.ProcessState) {
	r.User, r.System = state.UserTime(), state.SystemTime()
	r.PeakMemory = peakMemory(state)
	r.ExitCode = state.ExitCode()
	switch status, ok := state.Sys().(syscall.WaitStatus); {
	case ok && status.Signaled():
		r.Outcome, r.Signal, r.ExitCode = "signal", status.Signal(), 128+int(status.Signal())
	case r.ExitCode != 0:
		r.Outcome = "failure"
	default:
		r.Outcome = "success"
	}
}

// push pushes the run's own metrics, then those that the job wrote. In this order
// a refusal of the latter is what the group's push_failure_time_seconds tells last.
func (job *Job) push(ctx context.Context, result Result, metricsFile string) {
	all, again := result.exposition()
	uncertain, err := job.Pusher.Push(ctx, Push{Method: "POST", ContentType: contentTypeText, Body: all, Instead: again})
	switch {
	case err != nil:
		job.Warn(err.Error())
	case uncertain:
		job.Warn("an answer to the push was lost, and this run may be missing in culvert_job_runs_total; the other metrics are pushed")
	}
	if metricsFile == "" {
		return
	}
	push, err := readMetricsFile(metricsFile, job.Pusher.group)
	if err == nil && push != nil {
		if ctx.Err() != nil {
			err = errors.New("no time is left to push it")
		} else {
			_, err = job.Pusher.Push(ctx, *push)
		}
	}
	if err != nil {
		job.Warn(fmt.Sprintf("the job's own metrics (%s) are not pushed: %v", MetricsFileVariable, err))
	}
}
