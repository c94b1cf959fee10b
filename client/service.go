package main

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/alecthomas/kingpin/v2"
)

// serviceArguments returns the command line of a service: the flags of the one that
// installs it, without its command. A service starts in a directory of the system's, so
// paths become absolute.
func serviceArguments(args []string) ([]string, error) {
	parsed, err := new(flags).app().ParseContext(args)
	if err != nil {
		return nil, err
	}
	paths := []string{"config.file", "tls.cacert", "tls.cert", "tls.key", "token-file", "key-file", "textfile.directory", "storage.path"}
	var out []string
	for _, element := range parsed.Elements {
		flag, ok := element.Clause.(*kingpin.FlagClause)
		if !ok {
			continue
		}
		name := flag.Model().Name
		if flag.Model().IsBoolFlag() {
			if element.Value != nil && *element.Value == "false" {
				name = "no-" + name
			}
			out = append(out, "--"+name)
			continue
		}
		if element.Value == nil {
			return nil, fmt.Errorf("--%s lacks its value", name)
		}
		value := *element.Value
		path, isSocket := strings.CutPrefix(value, "unix:")
		isSocket = isSocket && name == "push.listen-address"
		if value != "" && (isSocket || slices.Contains(paths, name)) {
			absolute, err := filepath.Abs(path)
			if err != nil {
				return nil, fmt.Errorf("--%s=%s: %w", name, value, err)
			}
			if value = absolute; isSocket {
				value = "unix:" + absolute
			}
		}
		out = append(out, "--"+name+"="+value)
	}
	return out, nil
}
