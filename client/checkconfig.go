package main

import (
	"errors"
	"fmt"
	"io"
	"net/url"
	"reflect"
	"regexp"
	"slices"
	"strings"

	"github.com/alecthomas/units"
	"github.com/prometheus/common/model"
	"go.yaml.in/yaml/v2"

	"github.com/culvert-io/culvert/client/agent"
	"github.com/culvert-io/culvert/client/httpclient"
)

// checkConfig reads flags and file as the agent does, and writes what the agent would
// do. Nothing is connected or listened to: that is doctor's part.
func checkConfig(out io.Writer, flags *flags) error {
	settings, err := flags.load()
	if err != nil {
		return explain(flags.configFile, err)
	}
	a, err := agent.New(settings.Agent)
	if err != nil {
		return err
	}
	c := settings.Agent
	var lines [][2]string
	width := 0
	line := func(what, format string, args ...any) {
		lines = append(lines, [2]string{what, fmt.Sprintf(format, args...)})
		width = max(width, len(what))
	}
	file := flags.configFile
	if file == "" {
		file = "no file"
	}
	line("configuration", "%s, and the flags: good", file)
	line("agent", "%s", a.Name())
	for _, l := range sortedLabels(c.Labels) {
		line("label", "__meta_culvert_label_%s", l)
	}
	for _, proxy := range a.ProxyURLs() {
		line("proxy", "%s", proxy.Redacted())
	}
	line("protocol", "%s", map[agent.Protocol]string{
		agent.ProtocolAuto:     "the tunnel, and PushProx's long polling as long as a proxy knows no tunnel, or none gets through to it",
		agent.ProtocolCulvert:  "the tunnel",
		agent.ProtocolPushProx: "PushProx's long polling",
	}[c.Protocol])
	for _, r := range c.Allow {
		ports := fmt.Sprintf("port %d", r.First)
		switch {
		case r.First <= 1 && r.Last == 65535:
			ports = "all ports"
		case r.First != r.Last:
			ports = fmt.Sprintf("ports %d to %d", r.First, r.Last)
		}
		line("allow", "%s", ports)
	}
	for _, prefix := range c.AllowAddresses {
		line("allow", "names that lead to %s", prefix)
	}
	running, size, tunnels := "any number", "any size", "any number of"
	if c.MaxConcurrent > 0 {
		running = fmt.Sprintf("at most %d", c.MaxConcurrent)
	}
	if c.MaxBodySize > 0 {
		size = "at most " + units.Base2Bytes(c.MaxBodySize).String()
	}
	if c.MaxTunnels > 0 {
		tunnels = fmt.Sprintf("at most %d", c.MaxTunnels)
	}
	line("scrapes", "%s at a time, responses of %s; %s CONNECT tunnels", running, size, tunnels)
	if c.TokenFile != "" {
		line("token", "from %s", c.TokenFile)
	}
	if c.KeyFile != "" {
		line("key", "in %s", c.KeyFile)
	}
	local := c.LocalHost
	if local == "" {
		local = "localhost"
	}
	line("host", "%s, at %s", a.Name(), local)
	for _, h := range c.Hosts {
		if h.Address == "" {
			line("host", "%s", h.Name)
			continue
		}
		line("host", "%s, at %s", h.Name, h.Address)
	}
	for _, t := range a.Registration().Targets {
		asked := &url.URL{Scheme: "http", Host: t.Name + "." + a.Name(), Path: t.ScrapePath(), RawQuery: url.Values(t.Params).Encode()}
		i := slices.IndexFunc(c.Targets, func(declared agent.Target) bool { return declared.Name == t.Name })
		if i < 0 {
			line("target", "%s: the agent itself", asked)
			continue
		}
		reached := c.Targets[i].URL
		if u, err := url.Parse(reached); err == nil {
			reached = u.Redacted()
		}
		var more strings.Builder
		if h := c.Targets[i].HTTP; h != nil {
			for what, set := range map[string]bool{"basic_auth": h.BasicAuth != nil, "authorization": h.Authorization != nil, "oauth2": h.OAuth2 != nil} {
				if set {
					more.WriteString(", with " + what)
				}
			}
		}
		if labels := sortedLabels(t.Labels); len(labels) > 0 {
			more.WriteString(", labels " + strings.Join(labels, " "))
		}
		line("target", "%s: %s%s", asked, reached, more.String())
	}
	if settings.MetricsAddress != "" {
		line("own metrics", "on %s", settings.MetricsAddress)
	} else {
		line("own metrics", "on no address of their own")
	}
	for _, dir := range c.Textfile.Directories {
		age := "however old"
		if c.Textfile.MaxAge > 0 {
			age = "at most " + model.Duration(c.Textfile.MaxAge).String() + " old"
		}
		line("textfiles", "in %s, %s", dir, age)
	}
	for _, address := range c.Push.ListenAddresses {
		line("pushes", "on %s", address)
	}
	if c.Push.StoragePath != "" {
		relay := "to each proxy"
		if c.Push.Relay == agent.RelayFirst {
			relay = "to the first proxy that is connected"
		}
		line("pushes", "with an instance: kept in %s, served by the target agent", c.Push.StoragePath)
		line("pushes", "without one: relayed %s, at most %s wait in %s", relay, units.Base2Bytes(c.Push.SpoolMaxBytes), c.Push.StoragePath)
	}
	line("reconnects", "after at most %s, growing to %s", c.RetryInitialWait, c.RetryMaxWait)
	for _, l := range lines {
		if _, err := fmt.Fprintf(out, "%-*s  %s\n", width, l[0], l[1]); err != nil {
			return err
		}
	}
	if len(c.Allow) == 0 && len(c.Targets) == 0 && c.Push.StoragePath == "" {
		fmt.Fprintln(out, "\nNothing may be scraped but the agent itself; allow ports with --allow=9100, or name targets with --target=NAME=URL.\n--allow=all opens every port, as PushProx's client does.")
	}
	return nil
}

func sortedLabels(labels map[string]string) []string {
	var out []string
	for name, value := range labels {
		out = append(out, fmt.Sprintf("%s=%q", name, value))
	}
	slices.Sort(out)
	return out
}

// What the YAML library says: it has its positions in the message alone.
var (
	yamlLine    = regexp.MustCompile(`^(?:yaml: )?line (\d+): (.*)`)
	yamlUnknown = regexp.MustCompile(`^field (\S+) not found in type \S+$`)
	yamlInto    = regexp.MustCompile("^cannot unmarshal !!(\\S+)( `.*`)? into (\\S+)$")
)

// explain turns what the YAML library says of a file into FILE:LINE: and what to do,
// one line each. Other errors it returns as they are.
func explain(file string, err error) error {
	messages := []string{err.Error()}
	if all, ok := errors.AsType[*yaml.TypeError](err); ok {
		messages = all.Errors
	} else if _, syntax, ok := strings.Cut(messages[0], ": yaml: "); ok {
		messages = []string{"yaml: " + syntax}
	}
	var lines []string
	for _, message := range messages {
		m := yamlLine.FindStringSubmatch(message)
		if m == nil {
			return err
		}
		what := m[2]
		if f := yamlUnknown.FindStringSubmatch(what); f != nil {
			what = fmt.Sprintf("%q is no field here", f[1])
			if known := closest(f[1]); known != "" {
				what += fmt.Sprintf("; did you mean %q?", known)
			} else {
				what += "; remove it, or correct its place or its name"
			}
		} else if f := yamlInto.FindStringSubmatch(what); f != nil {
			if kind := map[string]string{"seq": "a list", "map": "a map", "str": "text", "int": "a number", "bool": "a truth value", "float": "a number"}[f[1]]; kind != "" {
				what = kind + f[2] + " stands here, where the README's example has something else"
			}
		}
		lines = append(lines, fmt.Sprintf("%s:%s: %s", file, m[1], what))
	}
	return errors.New(strings.Join(lines, "\n"))
}

// closest returns the field of the configuration whose name is at most two letters
// from the given one.
func closest(name string) string {
	best, distance := "", 3
	for _, of := range []any{file{}, fileTarget{}, fileHost{}, fileTextfile{}, fileScrape{}, filePush{}, httpclient.Config{}, httpclient.Proxy{}, httpclient.TLSConfig{}, httpclient.BasicAuth{}, httpclient.Authorization{}, httpclient.OAuth2{}, httpclient.Header{}} {
		t := reflect.TypeOf(of)
		for i := range t.NumField() {
			known, _, _ := strings.Cut(t.Field(i).Tag.Get("yaml"), ",")
			if d := editDistance(name, known); known != "" && d < distance {
				best, distance = known, d
			}
		}
	}
	return best
}

// editDistance counts the letters to insert, remove or replace.
func editDistance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, diagonal+1)
		}
	}
	return row[len(b)]
}
