package server

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/prometheus/common/model"
	"go.yaml.in/yaml/v2"

	"github.com/culvert-io/culvert/gateway"
	"github.com/culvert-io/culvert/proxy/access"
)

// Settings is the content of --config.file: what can be reloaded.
type Settings struct {
	Discovery struct {
		// PromoteLabels are agents' labels that discovery also lists under their
		// plain names, as labels of the series.
		PromoteLabels []string `yaml:"promote_labels"`
	} `yaml:"discovery"`
	Push struct {
		// Rules give groups a TTL and an interval by their job, where their pushes
		// name none. The first that matches counts.
		Rules []PushRule `yaml:"rules"`
	} `yaml:"push"`
	// Roles tell who may do what. Without them everything is open.
	Roles *access.Config `yaml:"roles"`

	roles      *access.Roles // of Roles
	generation uint64        // counts the settings that were taken
}

// PushRule is a rule for the groups of some jobs.
type PushRule struct {
	// Job is a regular expression that matches the whole name.
	Job string `yaml:"job"`
	// TTL is after which time without a push the samples go: 0 means never, none
	// the default.
	TTL *model.Duration `yaml:"ttl"`
	// Interval is how often the job should push, 0: it declares none.
	Interval model.Duration `yaml:"interval"`

	job *regexp.Regexp
}

// lifetimes tells the TTL and the interval of a group that names none.
func (s *Settings) lifetimes(defaultTTL time.Duration) func(gateway.Key) gateway.Lifetime {
	return func(key gateway.Key) gateway.Lifetime {
		job, _ := key.Get("job")
		for _, rule := range s.Push.Rules {
			if !rule.job.MatchString(job) {
				continue
			}
			life := gateway.Lifetime{TTL: defaultTTL, Interval: time.Duration(rule.Interval)}
			if rule.TTL != nil {
				life.TTL = time.Duration(*rule.TTL)
			}
			return life
		}
		return gateway.Lifetime{TTL: defaultTTL}
	}
}

// Reload reads the configuration file anew. On an error the old settings stay.
func (s *Server) Reload() error {
	s.reloading.Lock()
	defer s.reloading.Unlock()
	err := s.loadSettings()
	if err == nil {
		err = s.push.reload(s.settings.Load())
	}
	s.metrics.reloaded(err)
	s.reloadFailure.Store(nil)
	if err != nil {
		s.reloadFailure.Store(&reloadFailure{err, time.Now()})
		s.logger.Error("Reload failed, the old configuration stays", "err", err)
		return err
	}
	s.logger.Info("Configuration reloaded", "file", s.config.ConfigFile)
	return nil
}

// reloadFailure is why the last reload failed.
type reloadFailure struct {
	err error
	at  time.Time
}

func (s *Server) loadSettings() error {
	settings := new(Settings)
	if s.config.ConfigFile != "" {
		text, err := os.ReadFile(s.config.ConfigFile)
		if err != nil {
			return fmt.Errorf("configuration: %w", err)
		}
		if settings, err = ParseSettings(text); err != nil {
			return fmt.Errorf("configuration %s: %w", s.config.ConfigFile, err)
		}
	}
	var err error
	if settings.roles, err = settings.Roles.Compile(filepath.Dir(s.config.ConfigFile)); err != nil {
		return fmt.Errorf("configuration %s: %w", s.config.ConfigFile, err)
	}
	if last := s.settings.Load(); last != nil {
		settings.generation = last.generation + 1
	}
	s.settings.Store(settings)
	s.setRoles(settings)
	return nil
}

// unknownField is how the YAML library says that nothing takes a field.
var unknownField = regexp.MustCompile(`field (\S+) not found in type .*`)

// ParseSettings reads a configuration in YAML. Unknown fields are errors.
func ParseSettings(text []byte) (*Settings, error) {
	settings := new(Settings)
	decoder := yaml.NewDecoder(bytes.NewReader(text))
	decoder.SetStrict(true)
	if err := decoder.Decode(settings); err != nil && !errors.Is(err, io.EOF) {
		// The library tells the type in this program, which helps nobody.
		return nil, errors.New(unknownField.ReplaceAllString(err.Error(), "field $1 not found here: correct its name or its place"))
	}
	// What stands behind the first document would not count: roles, perhaps.
	if err := decoder.Decode(new(any)); !errors.Is(err, io.EOF) {
		return nil, errors.New("there is more than one YAML document: remove the line \"---\" between them")
	}
	// An empty section would be none, and open everything.
	var sections map[string]any
	if yaml.Unmarshal(text, &sections) == nil {
		if value, ok := sections["roles"]; ok && value == nil {
			return nil, errors.New("roles has no content: write roles: {} to let nobody in, or leave the section away to leave everything open")
		}
	}
	for _, name := range settings.Discovery.PromoteLabels {
		if !model.LegacyValidation.IsValidLabelName(name) || strings.HasPrefix(name, "__") || name == "job" || name == "instance" {
			return nil, fmt.Errorf("discovery.promote_labels: %q can't be promoted: an agent must not choose job, instance or a label that starts with \"__\"", name)
		}
	}
	for i := range settings.Push.Rules {
		rule := &settings.Push.Rules[i]
		var err error
		if rule.job, err = regexp.Compile("^(?s:" + rule.Job + ")$"); err != nil || rule.Job == "" {
			return nil, fmt.Errorf("push.rules[%d].job: %q is not a regular expression that names jobs, as in backup-.*", i, rule.Job)
		}
	}
	return settings, nil
}
