package main

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/alecthomas/kingpin/v2"

	"github.com/culvert-io/culvert/proxy/access"
	"github.com/culvert-io/culvert/proxy/server"
)

// tokenFlags are those of culvert-proxy token.
type tokenFlags struct {
	name                    string
	agents, hosts, pushJobs []string
	expires                 time.Duration
	requireKey              bool
	revoke                  []string
}

func (f *tokenFlags) command(app *kingpin.Application) {
	token := app.Command("token", "Make, list and revoke the tokens of agents, in the file that roles.agent_tokens of --config.file names. A running proxy sees it within seconds.")
	create := token.Command("create", "Make a token and print it; it is stored as a hash alone.")
	create.Flag("agent", "Name that an agent with this token may have: a name, *.example.net, web-*.example.net, or * for all. Repeatable.").
		Required().StringsVar(&f.agents)
	create.Flag("host", "Host that such an agent may answer for; patterns as for --agent. Repeatable; none by default.").
		StringsVar(&f.hosts)
	create.Flag("push-job", "Regular expression for the jobs whose pushes such an agent may relay. Repeatable; none by default.").
		StringsVar(&f.pushJobs)
	duration(create.Flag("expires", "After which time the token ends, as in 90d. Never by default."), &f.expires)
	create.Flag("require-key", "Take agents alone that show a key of their own (--key-file), to which the proxy pins their names.").
		BoolVar(&f.requireKey)
	create.Flag("name", "Name of the token, for list and revoke. A random one by default.").
		StringVar(&f.name)
	token.Command("list", "List the tokens, without their secret.")
	token.Command("revoke", "Remove tokens. Agents that use them are disconnected.").
		Arg("name", "Name of a token, as list shows it.").Required().StringsVar(&f.revoke)
}

// run does the command: "token create", "token list" or "token revoke".
func (f *tokenFlags) run(command, configFile string, out, notes io.Writer) error {
	if configFile == "" {
		return errors.New("token: say by --config.file where the proxy's configuration is")
	}
	text, err := os.ReadFile(configFile)
	if err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	settings, err := server.ParseSettings(text)
	if err != nil {
		return fmt.Errorf("configuration %s: %w", configFile, err)
	}
	file := settings.Roles.TokensFile(filepath.Dir(configFile))
	if file == "" {
		return fmt.Errorf("configuration %s: roles.agent_tokens is missing; add it, as in roles: {agent_tokens: tokens.yml}, and reload the proxy", configFile)
	}
	switch command {
	case "token create":
		err = f.create(file, settings.Roles, out, notes)
	case "token revoke":
		err = access.EditAgentTokens(file, func(agents []access.Agent) ([]access.Agent, error) {
			for _, name := range f.revoke {
				i := slices.IndexFunc(agents, func(a access.Agent) bool { return a.Name == name })
				if i < 0 {
					return nil, fmt.Errorf("no token %q is there; see token list", name)
				}
				agents = slices.Delete(agents, i, i+1)
			}
			return agents, nil
		})
		if err == nil {
			fmt.Fprintf(notes, "revoked: %s\n", strings.Join(f.revoke, ", "))
		}
	default:
		err = list(file, out)
	}
	if err != nil {
		return fmt.Errorf("token: %w", err)
	}
	return nil
}

func (f *tokenFlags) create(file string, roles *access.Config, out, notes io.Writer) error {
	secret := rand.Text() + rand.Text()[:10] // 180 bits
	sum := sha256.Sum256([]byte(secret))
	added := access.Agent{Agents: f.agents, Hosts: f.hosts, PushJobs: f.pushJobs, RequireKey: f.requireKey}
	added.Name, added.TokenHash = f.name, hex.EncodeToString(sum[:])
	if added.Name == "" {
		added.Name = "token-" + strings.ToLower(rand.Text()[:8])
	}
	if f.expires > 0 {
		added.Expires = time.Now().UTC().Add(f.expires).Format(time.RFC3339)
	}
	if slices.ContainsFunc(roles.Agents, func(a access.Agent) bool { return a.Name == added.Name }) {
		return fmt.Errorf("the name %q is there in the configuration itself; choose another --name", added.Name)
	}
	err := access.EditAgentTokens(file, func(agents []access.Agent) ([]access.Agent, error) {
		return append(agents, added), nil
	})
	if err != nil {
		return err
	}
	fmt.Fprintf(notes, "%s, for %s; give it to the agent by --token-file. It is shown this once.\n", added.Name, strings.Join(f.agents, ", "))
	_, err = fmt.Fprintln(out, secret)
	return err
}

func list(file string, out io.Writer) error {
	agents, err := access.ReadAgentTokens(file)
	if err != nil {
		return err
	}
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "NAME\tAGENTS\tHOSTS\tPUSH JOBS\tEXPIRES\tKEY")
	dash := func(s string) string {
		if s == "" {
			return "-"
		}
		return s
	}
	for _, a := range agents {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\n", a.Name, strings.Join(a.Agents, ","), dash(strings.Join(a.Hosts, ",")), dash(strings.Join(a.PushJobs, ",")), dash(a.Expires), map[bool]string{true: "required", false: "-"}[a.RequireKey])
	}
	return w.Flush()
}
