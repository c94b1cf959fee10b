package server

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/prometheus/common/model"
	"go.yaml.in/yaml/v2"
)

// Settings is the content of --config.file: what can be reloaded.
type Settings struct {
	Discovery struct {
		// PromoteLabels are agents' labels that discovery also lists under their
		// plain names, as labels of the series.
		PromoteLabels []string `yaml:"promote_labels"`
	} `yaml:"discovery"`
}

// Reload reads the configuration file anew. On an error the old settings stay.
func (s *Server) Reload() error {
	err := s.loadSettings()
	s.metrics.reloaded(err)
	if err != nil {
		s.logger.Error("Reload failed, the old configuration stays", "err", err)
		return err
	}
	s.logger.Info("Configuration reloaded", "file", s.config.ConfigFile)
	return nil
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
	s.settings.Store(settings)
	return nil
}

// ParseSettings reads a configuration in YAML. Unknown fields are errors.
func ParseSettings(text []byte) (*Settings, error) {
	settings := new(Settings)
	decoder := yaml.NewDecoder(bytes.NewReader(text))
	decoder.SetStrict(true)
	if err := decoder.Decode(settings); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	for _, name := range settings.Discovery.PromoteLabels {
		if !model.LegacyValidation.IsValidLabelName(name) || strings.HasPrefix(name, "__") || name == "job" || name == "instance" {
			return nil, fmt.Errorf("discovery.promote_labels: %q can't be promoted: an agent must not choose job, instance or a label that starts with \"__\"", name)
		}
	}
	return settings, nil
}
