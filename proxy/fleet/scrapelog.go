package fleet

import (
	"cmp"
	"math"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"
	"unique"

	"github.com/culvert-io/culvert/protocol"
)

// Limits of scrape logs: what scrapers ask for must not fill the memory.
const (
	// maxLogged bounds the targets of one agent that are logged.
	maxLogged = 32
	// maxHistory bounds the scrapes that are kept of one target.
	maxHistory = 20
	// maxReasons bounds the failed scrapes of a target of which the reason is kept. While
	// an agent is away, each has one of its own.
	maxReasons = 3
	// maxDoubtful bounds the targets of all agents together that nobody has ever scraped
	// with success, unless the agent declares them.
	maxDoubtful = 20_000
	// maxLoggedText bounds a URL and a reason, in bytes.
	maxLoggedText = 200
)

// How long a target that nobody scrapes any more is logged.
const (
	doubtfulFor = 15 * time.Minute // it never answered: somebody tried a port, perhaps
	failingFor  = time.Hour        // then its last failure says nothing of the agent
	loggedFor   = 24 * time.Hour
)

// Scrape is a scrape that has passed through this proxy, or failed to.
type Scrape struct {
	Host, Port string // as asked for, the host in its normal form; the port may be missing
	URL        string // as asked for; user and password are not kept
	Mode       string // "proxy", "path" or "connect"
	At         time.Time
	Took       time.Duration
	Status     int    // of HTTP, 0: there was none
	Outcome    string // "ok", or what went wrong: there are few
	Reason     string // of a failure, for people
	Bytes      int64  // of the response's body that were passed on
	// Failed and Answered say what the outcome means: of a scrape that was given up
	// neither is true.
	Failed, Answered bool
}

// scrapeLog keeps what came of the last scrapes of an agent: by target, and by path, for
// an exporter may have several. An agent that nobody scrapes has none.
type scrapeLog struct {
	// health has how many targets are logged, and, in the upper half, how many of them
	// failed at their last scrape.
	health atomic.Uint64

	mu      sync.Mutex // protects what follows; the fleet's mu may be taken while it is held
	targets []*loggedTarget
	bytes   int64
}

type loggedTarget struct {
	host, port, path string // what tells targets apart
	name             string // for people
	url, mode        string // of the last scrape
	declared         bool
	answered         bool // ever
	failing          bool
	scrapes          uint64
	failures         uint64
	runs             []run // the last ones; the n-th scrape is at n modulo maxHistory
	reasons          []reason
}

// run is one scrape, small: there are as many as agents, targets and maxHistory.
type run struct {
	at      int64 // Unix nanoseconds
	bytes   int64
	outcome unique.Handle[string]
	took    float32 // seconds
	status  uint16
}

type reason struct {
	scrape uint64 // its number
	text   string
}

// Logged is a scrape in the log of its agent.
type Logged struct {
	log    *scrapeLog
	target *loggedTarget // nil: it was not kept
	scrape uint64
}

// LogScrape notes a scrape of an agent. It costs a fraction of a microsecond. Where the
// log is full, the target goes whose last scrape is the longest ago: of those that never
// answered, where there are such; and one that doesn't answer replaces no other.
func (f *Fleet) LogScrape(a *Agent, s Scrape) Logged {
	log := a.log.Load()
	if log == nil {
		if log = new(scrapeLog); !a.log.CompareAndSwap(nil, log) {
			log = a.log.Load()
		}
	}
	_, path, _ := strings.Cut(s.URL, "://")
	if slash := strings.IndexByte(path, '/'); slash >= 0 {
		path, _, _ = strings.Cut(path[slash:], "?")
	} else {
		path = ""
	}
	log.mu.Lock()
	log.bytes += s.Bytes
	t := log.find(s.Host, s.Port, path)
	if t == nil {
		if t = f.logTarget(a, log, s, path); t == nil {
			log.mu.Unlock()
			return Logged{log: log}
		}
	}
	number := t.scrapes
	t.scrapes++
	if t.url != s.URL {
		t.url = clipText(withoutUser(s.URL))
	}
	t.mode = s.Mode
	if s.Answered {
		t.answered = true
	}
	if s.Failed {
		t.failures++
		r := reason{number, clipText(s.Reason)}
		if len(t.reasons) < maxReasons {
			t.reasons = append(t.reasons, r)
		} else {
			copy(t.reasons, t.reasons[1:])
			t.reasons[maxReasons-1] = r
		}
	}
	r := run{at: s.At.UnixNano(), bytes: s.Bytes, outcome: unique.Make(s.Outcome), took: float32(s.Took.Seconds()), status: uint16(s.Status)}
	if n := number % maxHistory; int(n) < len(t.runs) {
		t.runs[n] = r
	} else {
		if len(t.runs) == cap(t.runs) { // append would take more than ever is needed
			t.runs = slices.Grow(t.runs, min(max(len(t.runs), 4), maxHistory-len(t.runs)))
		}
		t.runs = append(t.runs, r)
	}
	if s.Failed || s.Answered {
		t.failing = s.Failed
	}
	changed := log.count()
	log.mu.Unlock()
	if changed {
		f.showHealth(a)
	}
	return Logged{log, t, number}
}

// Passed adds bytes that went through a tunnel to the scrape that opened it.
func (l Logged) Passed(bytes int64) {
	if l.log == nil {
		return
	}
	l.log.mu.Lock()
	defer l.log.mu.Unlock()
	l.log.bytes += bytes
	if t := l.target; t != nil && t.scrapes-l.scrape <= maxHistory {
		t.runs[l.scrape%maxHistory].bytes += bytes
	}
}

func (l *scrapeLog) find(host, port, path string) *loggedTarget {
	for _, t := range l.targets {
		if t.path == path && t.port == port && t.host == host {
			return t
		}
	}
	return nil
}

// logTarget adds a target to a log, or returns nil where there is no room for it. It is
// called with the log's mu held.
func (f *Fleet) logTarget(a *Agent, log *scrapeLog, s Scrape, path string) *loggedTarget {
	if len(path) > maxLoggedText {
		return nil
	}
	t := &loggedTarget{host: strings.Clone(s.Host), port: strings.Clone(s.Port), path: strings.Clone(path), answered: s.Answered}
	switch name, own := strings.CutSuffix(t.host, "."+a.Name); {
	case t.host == a.Name:
		t.name = cmp.Or(t.port, "80")
	case own && !strings.Contains(name, "."):
		t.name, t.declared = name, f.declares(a, name)
	default:
		t.name = t.host + ":" + cmp.Or(t.port, "80")
	}
	kept := t.declared || t.answered
	if !kept && f.doubtful.Load() >= maxDoubtful {
		return nil
	}
	if len(log.targets) >= maxLogged {
		oldest := -1
		for i, other := range log.targets {
			if otherKept := other.declared || other.answered; otherKept && !kept {
				continue
			} else if oldest < 0 || cmp.Or(boolCompare(otherKept, log.targets[oldest].declared || log.targets[oldest].answered), cmp.Compare(other.last(), log.targets[oldest].last())) < 0 {
				oldest = i
			}
		}
		if oldest < 0 {
			return nil
		}
		log.targets = slices.Delete(log.targets, oldest, oldest+1)
	}
	if !kept {
		f.doubtful.Add(1) // sweepLogs sets it right
	}
	log.targets = append(log.targets, t)
	return t
}

func boolCompare(a, b bool) int {
	switch {
	case a == b:
		return 0
	case b:
		return -1
	}
	return 1
}

func (f *Fleet) declares(a *Agent, target string) bool {
	if target == protocol.AgentTarget {
		return true
	}
	f.mu.RLock()
	defer f.mu.RUnlock()
	return slices.ContainsFunc(a.registration.Targets, func(t protocol.Target) bool { return t.Name == target })
}

// last returns when the last scrape was, in Unix nanoseconds.
func (t *loggedTarget) last() int64 {
	if t.scrapes == 0 {
		return 0
	}
	return t.runs[(t.scrapes-1)%maxHistory].at
}

// count brings the log's health up to date, and reports whether it is another one now.
// It is called with mu held.
func (l *scrapeLog) count() bool {
	health := uint64(len(l.targets))
	for _, t := range l.targets {
		if t.failing {
			health += 1 << 32
		}
	}
	return l.health.Swap(health) != health
}

// healthOf returns how many targets of an agent are logged, and how many of them failed
// at their last scrape.
func (a *Agent) healthOf() (scraped, failing int) {
	log := a.log.Load()
	if log == nil {
		return 0, 0
	}
	health := log.health.Load()
	return int(uint32(health)), int(health >> 32)
}

// sweepLogs lets go of targets that nobody scrapes any more.
func (f *Fleet) sweepLogs(now time.Time) {
	f.mu.RLock()
	var logged []*Agent
	for _, a := range f.agents {
		if a.log.Load() != nil {
			logged = append(logged, a)
		}
	}
	f.mu.RUnlock()
	doubtful := int64(0)
	for _, a := range logged {
		log := a.log.Load()
		log.mu.Lock()
		log.targets = slices.DeleteFunc(log.targets, func(t *loggedTarget) bool {
			unused := now.Sub(time.Unix(0, t.last()))
			if unused > failingFor {
				t.failing = false
			}
			return unused > loggedFor || unused > doubtfulFor && !t.answered
		})
		for _, t := range log.targets {
			if !t.declared && !t.answered {
				doubtful++
			}
		}
		changed := log.count()
		log.mu.Unlock()
		if changed {
			f.showHealth(a)
		}
	}
	f.doubtful.Store(doubtful)
}

// showHealth says that what Info tells of an agent's health is another.
func (f *Fleet) showHealth(a *Agent) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.agents[a.Name] == a {
		f.shows(a)
	}
}

// TargetLog is what came of the scrapes of one target, as the API shows it.
type TargetLog struct {
	// Target is a port of the agent's host, a named target, or HOST:PORT.
	Target   string `json:"target"`
	URL      string `json:"url"` // of the last scrape, as asked for, but for user and password
	Mode     string `json:"mode"`
	Scrapes  uint64 `json:"scrapes"`
	Failures uint64 `json:"failures"`
	// History has the last scrapes, the oldest first.
	History []ScrapeEntry `json:"history,omitempty"`
}

// ScrapeEntry is one scrape of a TargetLog.
type ScrapeEntry struct {
	At      time.Time `json:"at"`
	Seconds float64   `json:"seconds"`
	Status  int       `json:"status,omitempty"`
	Outcome string    `json:"outcome"`
	Bytes   int64     `json:"bytes"`
	Error   string    `json:"error,omitempty"` // of the last failures alone
}

// Scrapes returns what came of the scrapes of an agent that passed through this proxy,
// sorted by target, and how many bytes of responses that were. It returns false where
// nobody has the name.
func (f *Fleet) Scrapes(name string) (logs []TargetLog, bytes int64, ok bool) {
	f.mu.RLock()
	a := f.agents[name]
	f.mu.RUnlock()
	if a == nil {
		return nil, 0, false
	}
	log := a.log.Load()
	if log == nil {
		return []TargetLog{}, 0, true
	}
	log.mu.Lock()
	logs, bytes = make([]TargetLog, 0, len(log.targets)), log.bytes
	for _, t := range log.targets {
		l := TargetLog{Target: t.name, URL: t.url, Mode: t.mode, Scrapes: t.scrapes, Failures: t.failures, History: make([]ScrapeEntry, 0, len(t.runs))}
		for n := t.scrapes - uint64(len(t.runs)); n < t.scrapes; n++ {
			r := t.runs[n%maxHistory]
			e := ScrapeEntry{At: time.Unix(0, r.at).UTC(), Seconds: math.Round(float64(r.took)*1e6) / 1e6, Status: int(r.status), Outcome: r.outcome.Value(), Bytes: r.bytes}
			if i := slices.IndexFunc(t.reasons, func(why reason) bool { return why.scrape == n }); i >= 0 {
				e.Error = t.reasons[i].text
			}
			l.History = append(l.History, e)
		}
		logs = append(logs, l)
	}
	log.mu.Unlock()
	slices.SortFunc(logs, func(a, b TargetLog) int {
		return cmp.Or(cmp.Compare(a.Target, b.Target), cmp.Compare(a.URL, b.URL))
	})
	return logs, bytes, true
}

// withoutUser takes a user and a password out of a URL: the log is for others too.
func withoutUser(u string) string {
	scheme, rest, ok := strings.Cut(u, "://")
	if !ok {
		return u
	}
	end := strings.IndexAny(rest, "/?#")
	if end < 0 {
		end = len(rest)
	}
	return scheme + "://" + rest[strings.LastIndexByte(rest[:end], '@')+1:]
}

// clipText copies text, for what it is a part of may be much larger, and shortens it.
func clipText(text string) string {
	if len(text) <= maxLoggedText {
		return strings.Clone(text)
	}
	end := maxLoggedText - len("…")
	for !utf8.RuneStart(text[end]) {
		end--
	}
	return text[:end] + "…"
}
