package server

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"time"

	"github.com/culvert-io/culvert/gateway"
	"github.com/culvert-io/culvert/protocol"
	"github.com/culvert-io/culvert/proxy/fleet"
	"github.com/culvert-io/culvert/proxy/ui"
)

// pageUpdate is what the page shows: all of it, or what changed since the update of a
// token.
type pageUpdate struct {
	Token      string       `json:"token"`
	Full       bool         `json:"full"`
	Agents     []ui.Agent   `json:"agents"`
	AgentsGone []string     `json:"agents_gone"`
	Groups     []ui.Group   `json:"groups"`
	GroupsGone []string     `json:"groups_gone"` // their paths
	Summary    ui.Summary   `json:"summary"`
	Warnings   []ui.Warning `json:"warnings"`
	Draining   bool         `json:"draining"`
	Proxy      string       `json:"proxy"`
	Version    string       `json:"version"`
	May        mayDo        `json:"may"`
}

// mayDo tells the page which actions to offer.
type mayDo struct {
	Operate bool `json:"operate"`
	Push    bool `json:"push"`
}

func newAgentRow(info fleet.Info) ui.Agent {
	row := ui.Agent{
		Name: info.Name, Kind: info.Kind, Connected: info.Connected, Since: info.Since, FirstSeen: info.FirstSeen,
		LostReason: info.LostReason, Version: clip(info.Registration.Version, 100), Labels: info.Registration.Labels, Hosts: info.Registration.Hosts,
		RemoteAddr: info.RemoteAddr, Transport: info.Transport, RTTSeconds: info.RTTSeconds,
		Health: healthOf(info), Failing: info.Failing, Scraped: info.Scraped,
	}
	for _, t := range info.Registration.Targets {
		row.Targets = append(row.Targets, t.Name)
	}
	for _, holder := range info.Proxies {
		row.Proxies = append(row.Proxies, holder.ID)
	}
	return row
}

// healthOf says how the last scrapes of an agent's targets ended: "ok", "failing" where one
// of them failed, "none" where there were none.
func healthOf(info fleet.Info) string {
	switch {
	case info.Failing > 0:
		return "failing"
	case info.Scraped > 0:
		return "ok"
	}
	return "none"
}

func newGroupRow(info gateway.GroupInfo) ui.Group {
	row := ui.Group{
		Path: gateway.PathOf(info.Key), Labels: info.Key.Map(), Series: info.Series, Pushed: utc(info.Pushed), Failed: utc(info.Failed),
		TTL: info.TTL.Seconds(), Interval: info.Interval.Seconds(), Expires: utc(info.Expires), Expired: info.Expired, State: "ok",
	}
	if info.Interval > 0 {
		row.Up = &info.Up
	}
	switch {
	case info.Expired:
		row.State = "expired"
	case info.Failed.After(info.Pushed):
		row.State = "failed"
	case info.Interval > 0 && !info.Up:
		row.State = "late"
	}
	return row
}

func utc(t time.Time) time.Time {
	if t.IsZero() {
		return t
	}
	return t.UTC()
}

// pageState is up to where who asks knows everything, and what the summary was then.
type pageState struct {
	Agents, Groups uint64 // fleet.Update.Change, gateway.GroupUpdate.Change
	Summary        ui.Summary
}

// pageSeal makes tokens of states. They are encrypted, for the state of one who sees some
// agents alone tells when others change; and bound to who asks and to what it may see,
// and to this process.
type pageSeal struct{ aead cipher.AEAD }

func newPageSeal() pageSeal {
	key := make([]byte, 16)
	rand.Read(key)
	block, err := aes.NewCipher(key)
	if err != nil {
		panic(err) // the key's length is right
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		panic(err)
	}
	return pageSeal{aead}
}

func (p pageSeal) token(state pageState, whose string) string {
	plain, _ := binary.Append(nil, binary.BigEndian, state) // its size is fixed
	return base64.RawURLEncoding.EncodeToString(p.aead.Seal(nil, nil, plain, []byte(whose)))
}

// open returns no state where the token is not this one's.
func (p pageSeal) open(token, whose string) (state pageState) {
	sealed, err := base64.RawURLEncoding.DecodeString(token)
	if err != nil || len(sealed) > 200 {
		return state
	}
	plain, err := p.aead.Open(nil, nil, sealed, []byte(whose))
	if err != nil {
		return state
	}
	if _, err := binary.Decode(plain, binary.BigEndian, &state); err != nil {
		return pageState{}
	}
	return state
}

// servePageUpdate answers GET /api/v1/page?since=TOKEN. Each open page asks every few
// seconds: where nothing has changed, nothing is looked through.
func (s *Server) servePageUpdate(w http.ResponseWriter, r *http.Request) {
	id := s.identity(r)
	whose := fmt.Sprintf("%d %s", s.settings.Load().generation, id)
	state := s.pageSeal.open(r.URL.Query().Get("since"), whose)
	store := s.push.current()
	if state.Agents == 0 || store == nil && state.Groups > 0 {
		state = pageState{} // one list is not told in full without the other
	}
	agents, agentsChanged := s.fleet.Since(state.Agents, id.MayScrape)
	var groups gateway.GroupUpdate
	groupsChanged := false
	if store != nil {
		groups, groupsChanged = gateway.Since(store, state.Groups)
	}
	full := agents.Whole || groups.Whole && state.Groups > 0
	if full && !agents.Whole {
		agents, agentsChanged = s.fleet.Since(0, id.MayScrape)
	}
	if full && !groups.Whole && store != nil {
		groups, groupsChanged = gateway.Since(store, 0)
	}
	sum := &state.Summary
	if agentsChanged {
		state.Agents = agents.Change
		sum.Agents, sum.Connected, sum.Lost, sum.Failing = uint32(agents.Connected+agents.Lost), uint32(agents.Connected), uint32(agents.Lost), uint32(agents.Failing)
	}
	if groupsChanged {
		state.Groups = groups.Change
		sum.Groups, sum.GroupsLate, sum.GroupsFailed = uint32(groups.Count), uint32(groups.Late), uint32(groups.Failed)
	}
	update := pageUpdate{
		Token: s.pageSeal.token(state, whose), Full: full,
		Agents: make([]ui.Agent, len(agents.Agents)), AgentsGone: append([]string{}, agents.Gone...),
		Groups: make([]ui.Group, len(groups.Groups)), GroupsGone: make([]string, len(groups.Gone)),
		Summary: *sum, Warnings: s.warnings(id.Operator()), Draining: s.draining.Load(), Proxy: s.id, Version: protocol.BuildVersion(),
		May: mayDo{Operate: id.Operator(), Push: id.Pusher()},
	}
	for i, info := range agents.Agents {
		update.Agents[i] = newAgentRow(info)
	}
	for i, info := range groups.Groups {
		update.Groups[i] = newGroupRow(info)
	}
	for i, key := range groups.Gone {
		update.GroupsGone[i] = gateway.PathOf(key)
	}
	s.writeLongJSON(w, r, update)
}

// warnings returns what speaks against leaving this proxy alone. Details that may tell of
// files are for operators.
func (s *Server) warnings(operator bool) []ui.Warning {
	found := []ui.Warning{}
	add := func(code, format string, args ...any) {
		found = append(found, ui.Warning{Code: code, Text: fmt.Sprintf(format, args...)})
	}
	if s.draining.Load() {
		add("draining", "This proxy is going away: it lets running scrapes end and sends its agents to other proxies, or has them wait for its next start.")
	}
	switch roles := s.access.Roles(); {
	case roles.Open():
		add("open-access", "No roles are configured: whoever reaches this proxy may scrape through it, register as an agent, push, delete and reload. Add roles to --config.file.")
	case roles.Entries() == 0:
		add("no-access", "The roles in --config.file have no entry: nobody may do anything. Add entries, or leave the section away.")
	}
	if err := s.push.Err(); err != nil {
		text := "Pushes are refused now"
		if operator {
			text = fmt.Sprintf("Pushes are refused now: %v", err)
		}
		switch {
		case s.cluster != nil:
			add("push-store", "%s. They are taken again by themselves when etcd (--cluster.etcd-endpoints) answers; agents keep what they relay until then.", text)
		case errors.Is(err, errNoPushStore):
			add("push-store", "%s. Look at push.db in --storage.path: repair it, put a backup in its place, or move it away to start with an empty store; the proxy tries again every %s.", text, reopenEvery)
		case errors.Is(err, gateway.ErrBusy):
			add("push-store", "%s. More is pushed than the disk of --storage.path takes: push less often, or use a faster disk.", text)
		default:
			add("push-store", "%s. Make --storage.path writable, or free space there; the proxy tries again every few seconds.", text)
		}
	}
	if s.cluster != nil {
		if up, heard := s.cluster.Up(); !up {
			last := "has not answered since this proxy started"
			if !heard.IsZero() {
				last = "answered " + since(heard) + " ago for the last time"
			}
			add("cluster", "etcd %s: what this proxy knows of agents that other proxies hold may be outdated. Scrapes of its own agents go on. Look at --cluster.etcd-endpoints and at the network in between.", last)
		}
		if n, oldest := s.cluster.Unwritten(); n > 0 && time.Since(oldest) > lagging {
			add("cluster", "%d changes of agents wait for etcd, the oldest for %s: other proxies don't know them yet. etcd is slow; look at its disk.", n, since(oldest))
		}
	}
	switch {
	case s.cluster != nil: // etcd has both
	case s.config.StoragePath == "":
		add("storage", "Storage is off (--storage.path): after a restart lost agents are unknown, and nothing alerts for them; groups are gone.")
	case !s.fleetStored:
		add("storage", "The list of known agents can't be stored, so lost agents are unknown after a restart. Look at fleet.db in --storage.path and at this proxy's log, then restart it.")
	}
	if failure := s.reloadFailure.Load(); failure != nil {
		text := "the log tells why"
		if operator {
			text = failure.err.Error()
		}
		add("reload", "The last reload of --config.file failed %s ago, and the configuration before it stays: %s. Correct the file and reload again.", since(failure.at), text)
	}
	if settled, latest := s.fleet.Settled(); !settled {
		add("settling", "The list of agents is not complete yet, so discovery answers 503: until %s at the latest (--agent.settle-time).", latest.UTC().Format("15:04:05 UTC"))
	}
	return found
}

// lagging is for how long changes may wait to be written before that is worth a warning.
const lagging = 5 * time.Second

// writeLongJSON is writeJSON for answers that are long, or asked for often: compressed
// where that is welcome.
func (s *Server) writeLongJSON(w http.ResponseWriter, r *http.Request, data any) {
	body, err := json.Marshal(map[string]any{"status": "success", "data": data})
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("Cache-Control", "no-store")
	h.Set("Vary", "Accept-Encoding")
	const worthwhile = 1 << 10
	if len(body) > worthwhile && gateway.AcceptsGzip(r.Header) {
		h.Set("Content-Encoding", "gzip")
		body = zipped(body)
	}
	h.Set("Content-Length", strconv.Itoa(len(body)))
	if _, err := w.Write(body); err != nil {
		s.logger.Debug("An answer was not read to its end", "err", err)
	}
}
