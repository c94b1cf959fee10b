package jobrun

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/culvert-io/culvert/gateway"
)

const (
	contentTypeText        = "text/plain; version=0.0.4; charset=utf-8"
	contentTypeOpenMetrics = "application/openmetrics-text; version=1.0.0; charset=utf-8"
)

// MaxMetricsFile is how many bytes the file of MetricsFileVariable may have.
const MaxMetricsFile = 16 << 20

// ownPrefix is what the names of the run's own metrics start with.
const ownPrefix = "culvert_job_"

// outcomes are all that Result.Outcome can be. The counter has a series of each from
// the first run on: of one that appears with its first failure, increase() would
// not see that.
var outcomes = []string{"success", "failure", "signal", "start_error"}

// exposition returns the run's own metrics in text format 0.0.4, and those of them
// that may be pushed twice: without the counter of runs, to which a push adds.
func (r *Result) exposition() (all, again []byte) {
	var b bytes.Buffer
	family := func(name, kind, help string) {
		fmt.Fprintf(&b, "# HELP %s%s %s\n# TYPE %[1]s%[2]s %[4]s\n", ownPrefix, name, help, kind)
	}
	sample := func(name, labels string, value float64) {
		fmt.Fprintf(&b, "%s%s%s %s\n", ownPrefix, name, labels, strconv.FormatFloat(value, 'g', -1, 64))
	}
	gauge := func(name, help string, value float64) {
		family(name, "gauge", help)
		sample(name, "", value)
	}
	gauge("start_time_seconds", "When the last run started, in Unix time.", unixSeconds(r.Start))
	gauge("duration_seconds", "How long the last run took.", r.Duration.Seconds())
	gauge("exit_code", "Exit code of the last run: 128+n where the signal n ended it, 127 where the command was not found, 126 where it can't be executed.", float64(r.ExitCode))
	if r.Outcome == "success" {
		gauge("last_success_time_seconds", "When a run ended with exit code 0 last, in Unix time.", unixSeconds(r.Start.Add(r.Duration)))
	}
	family("cpu_seconds", "gauge", "CPU time of the last run and of the processes that it waited for, by mode.")
	sample("cpu_seconds", `{mode="user"}`, r.User.Seconds())
	sample("cpu_seconds", `{mode="system"}`, r.System.Seconds())
	if r.PeakMemory > 0 {
		gauge("peak_memory_bytes", "Largest resident memory of one process of the last run.", float64(r.PeakMemory))
	}
	again = bytes.Clone(b.Bytes())
	family("runs_total", "counter", "Runs by their outcome: success, failure (exit code not 0), signal, start_error.")
	for _, outcome := range outcomes {
		n := 0.0
		if outcome == r.Outcome {
			n = 1
		}
		sample("runs_total", `{outcome="`+outcome+`"}`, n)
	}
	return b.Bytes(), again
}

func unixSeconds(t time.Time) float64 { return float64(t.UnixNano()) / 1e9 }

// readMetricsFile returns the push of what the job wrote, nil where it wrote nothing.
func readMetricsFile(path string, group gateway.Key) (*Push, error) {
	// The job may have put anything there, a FIFO too.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if os.IsNotExist(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	switch {
	case err != nil:
		return nil, err
	case !info.Mode().IsRegular():
		return nil, fmt.Errorf("it is no regular file (%s)", info.Mode().Type())
	}
	body, err := ReadBody(f, MaxMetricsFile)
	if err != nil {
		return nil, err
	}
	if len(body) == 0 {
		return nil, nil
	}
	contentType, names, err := CheckBody(group, body)
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		if strings.HasPrefix(name, ownPrefix) {
			return nil, fmt.Errorf("metric %q: names that start with %s are those of culvert-client run; choose another one", name, ownPrefix)
		}
	}
	return &Push{Method: "POST", ContentType: contentType, Body: body}, nil
}

// ReadBody reads what is to be pushed, at most limit bytes.
func ReadBody(r io.Reader, limit int64) ([]byte, error) {
	body, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(body)) > limit {
		return nil, fmt.Errorf("it has more than %d MiB", limit>>20)
	}
	return body, nil
}

// CheckBody checks what is to be pushed to a group as the push store will, and
// returns its content type and the names of its families. Text that ends with the
// line "# EOF" is OpenMetrics 1.0, other text the text format 0.0.4. An error of the
// syntax names the line.
func CheckBody(group gateway.Key, body []byte) (contentType string, names []string, err error) {
	switch end := bytes.TrimSuffix(body, []byte("\n")); {
	case bytes.HasSuffix(end, []byte("\n# EOF")), string(end) == "# EOF":
		contentType = contentTypeOpenMetrics
	default:
		contentType = contentTypeText
	}
	lines := bytes.Count(body, []byte("\n"))
	if at := bytes.Index(body, []byte("\r\n")); at >= 0 {
		return "", nil, fmt.Errorf("line %d ends with CR LF; lines end with LF alone", 1+bytes.Count(body[:at], []byte("\n")))
	}
	if contentType == contentTypeText && len(body) > 0 && body[len(body)-1] != '\n' {
		return "", nil, fmt.Errorf("line %d, the last one, does not end with a line feed", lines+1)
	}
	names, err = gateway.CheckBody(group, contentType, body)
	return contentType, names, err
}
