package access

import (
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/culvert-io/culvert/protocol"
)

// pattern covers names of agents, hosts or certificates.
//
//	web-1.example.net     that name
//	*.example.net         one or more labels in front, as in an agent's --host
//	web-*.example.net     within a label, "*" is any part of it, and none
//	*                     every name
type pattern struct {
	text string
	re   *regexp.Regexp // nil: text is the whole name
	tail string         // ".example.net" of "*.example.net"; "." of "*"; else ""
}

type patterns []pattern

func compilePatterns(e *entry, field string, texts []string) (patterns, error) {
	var out patterns
	for i, text := range texts {
		p, err := compilePattern(text)
		if err != nil {
			return nil, fmt.Errorf("%s: %s[%d]: %w", e, field, i, err)
		}
		out = append(out, p)
	}
	return out, nil
}

func compilePattern(text string) (pattern, error) {
	p := pattern{text: protocol.NormalizeName(text)}
	if text == "*" {
		p.tail = "."
		return p, nil
	}
	// What is left when "*" stands for a letter has to be a name.
	rest := strings.TrimPrefix(p.text, "*.")
	if p.text == "*" { // it was "*."
		rest = ""
	}
	if err := protocol.CheckName(strings.ReplaceAll(rest, "*", "x")); err != nil {
		return p, fmt.Errorf("pattern %q: %w; write a name, *.example.net, web-*.example.net, or * for all", text, err)
	}
	if rest == p.text && !strings.Contains(rest, "*") {
		return p, nil
	}
	expr := strings.ReplaceAll(regexp.QuoteMeta(rest), `\*`, `[^.]*`)
	if rest != p.text {
		expr = `(?:[^.]+\.)+` + expr
		if !strings.Contains(rest, "*") {
			p.tail = "." + rest
		}
	}
	p.re = regexp.MustCompile(`\A` + expr + `\z`)
	return p, nil
}

// covers reports whether the pattern covers a name in its normal form.
func (p pattern) covers(name string) bool {
	switch {
	case p.tail == ".":
		return name != ""
	case p.tail != "":
		return len(name) > len(p.tail) && strings.HasSuffix(name, p.tail)
	case p.re != nil:
		return p.re.MatchString(name)
	}
	return name == p.text
}

// coversHost is covers for a host that may be a wildcard: all that it stands for
// has to be covered.
func (p pattern) coversHost(host string) bool {
	suffix, wildcard := protocol.WildcardSuffix(host)
	if !wildcard {
		return p.covers(host)
	}
	return p.tail != "" && strings.HasSuffix(suffix, p.tail) || p.tail == "."
}

func (ps patterns) cover(name string) bool {
	return slices.ContainsFunc(ps, func(p pattern) bool { return p.covers(name) })
}

func (ps patterns) coverHost(host string) bool {
	return slices.ContainsFunc(ps, func(p pattern) bool { return p.coversHost(host) })
}

// jobs are regular expressions that match the whole name of a job, as those of
// push.rules do.
type jobs []*regexp.Regexp

func compileJobs(e *entry, field string, texts []string) (jobs, error) {
	var out jobs
	for i, text := range texts {
		// By itself first: "a)|(b" must not get out of what is put around it.
		_, err := regexp.Compile(text)
		var whole *regexp.Regexp
		if err == nil {
			whole, err = regexp.Compile(`\A(?s:` + text + `)\z`)
		}
		if err != nil || text == "" {
			return nil, fmt.Errorf("%s: %s[%d]: %q is not a regular expression that names jobs, as in backup-.*", e, field, i, text)
		}
		out = append(out, whole)
	}
	return out, nil
}

func (j jobs) match(job string) bool {
	return slices.ContainsFunc(j, func(re *regexp.Regexp) bool { return re.MatchString(job) })
}
