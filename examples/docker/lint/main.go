// Command lint checks a Dockerfile with BuildKit's own parser and rules, and prints as JSON
// what a builder would do, and with which files. It is a module of its own: the programs need
// none of BuildKit.
//
//	lint DOCKERFILE CONTEXT
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/moby/buildkit/frontend/dockerfile/instructions"
	"github.com/moby/buildkit/frontend/dockerfile/linter"
	"github.com/moby/buildkit/frontend/dockerfile/parser"
	"github.com/moby/patternmatcher"
	"github.com/moby/patternmatcher/ignorefile"
)

type plan struct {
	Files  []string // of the context, without what .dockerignore names
	Stages []stage
}

type stage struct {
	Name, Base string
	Commands   []command
}

// command is an instruction. Of RUN there is the Shell command, of COPY the other fields, of
// others the text.
type command struct {
	Name, Shell         string
	Sources             []string
	Dest, From          string
	Chown, Chmod, Other string
}

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: lint DOCKERFILE CONTEXT")
		os.Exit(2)
	}
	var p plan
	err := p.parse(os.Args[1])
	if err == nil {
		err = p.list(os.Args[2])
	}
	if err == nil {
		err = json.NewEncoder(os.Stdout).Encode(p)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", os.Args[1], err)
		os.Exit(1)
	}
}

// parse reads a Dockerfile. What a rule finds is an error.
func (p *plan) parse(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	parsed, err := parser.Parse(f)
	if err != nil {
		return err
	}
	var faults []error
	for _, warning := range parsed.Warnings {
		faults = append(faults, errors.New(warning.Short))
	}
	rules := linter.New(&linter.Config{
		Warn: func(rule, _, _, message string, at []parser.Range) {
			line := 0
			if len(at) > 0 {
				line = at[0].Start.Line
			}
			faults = append(faults, fmt.Errorf("line %d: %s: %s", line, rule, message))
		},
	})
	stages, _, err := instructions.Parse(parsed.AST, rules)
	if err := errors.Join(append(faults, err)...); err != nil {
		return err
	}
	for _, s := range stages {
		next := stage{Name: s.Name, Base: s.BaseName}
		for _, c := range s.Commands {
			command := command{Name: c.Name()}
			switch c := c.(type) {
			case *instructions.RunCommand:
				command.Shell = strings.Join(c.CmdLine, " ")
			case *instructions.CopyCommand:
				command.Sources, command.Dest, command.From, command.Chown, command.Chmod = c.SourcePaths, c.DestPath, c.From, c.Chown, c.Chmod
			default:
				command.Other = fmt.Sprint(c)
			}
			next.Commands = append(next.Commands, command)
		}
		p.Stages = append(p.Stages, next)
	}
	return nil
}

// list lists the context.
func (p *plan) list(root string) error {
	f, err := os.Open(filepath.Join(root, ".dockerignore"))
	if err != nil {
		return err
	}
	defer f.Close()
	patterns, err := ignorefile.ReadAll(f)
	if err != nil {
		return err
	}
	matcher, err := patternmatcher.New(patterns)
	if err != nil {
		return err
	}
	return filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		relative, err := filepath.Rel(root, path)
		if err != nil || relative == "." {
			return err
		}
		ignored, err := matcher.MatchesOrParentMatches(relative)
		switch {
		case err != nil:
			return err
		case ignored && entry.IsDir():
			return fs.SkipDir // no pattern starts with "!"
		case !ignored && entry.Type().IsRegular():
			p.Files = append(p.Files, relative)
		}
		return nil
	})
}
