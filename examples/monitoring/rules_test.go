//go:build unix

// Package monitoring has what watches Culvert itself, to copy from: Prometheus's
// configuration, recording rules, alerts, and a dashboard.
package monitoring

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/common/model"
	"go.yaml.in/yaml/v2"

	"github.com/culvert-io/culvert/protocol/externaltest"
)

// rule is a recording rule or an alert.
type rule struct {
	Record      string
	Alert       string
	Expr        string
	For         model.Duration
	Labels      map[string]string
	Annotations map[string]string
}

// ruleTest is what is of interest here of a file for promtool test rules.
type ruleTest struct {
	RuleFiles []string `yaml:"rule_files"`
	Tests     []struct {
		Name           string
		AlertRuleTests []struct {
			Alertname string
			EvalTime  model.Duration   `yaml:"eval_time"`
			ExpAlerts []map[string]any `yaml:"exp_alerts"`
		} `yaml:"alert_rule_test"`
	}
}

// ruleFiles returns those that prometheus.yml loads.
func ruleFiles(t *testing.T) []string {
	t.Helper()
	var config struct {
		RuleFiles []string `yaml:"rule_files"`
	}
	read(t, "prometheus.yml", &config)
	return config.RuleFiles
}

// rules returns all rules of a file.
func rules(t *testing.T, file string) (all []rule) {
	t.Helper()
	var content struct {
		Groups []struct{ Rules []rule }
	}
	read(t, file, &content)
	for _, group := range content.Groups {
		all = append(all, group.Rules...)
	}
	return all
}

func read(t *testing.T, file string, into any) {
	t.Helper()
	text, err := os.ReadFile(file)
	if err == nil {
		err = yaml.Unmarshal(text, into)
	}
	if err != nil {
		t.Fatalf("%s: %v", file, err)
	}
}

// TestRules has promtool check the configuration with its rules, and run their tests.
func TestRules(t *testing.T) {
	promtool := externaltest.Program(t, "promtool", "prometheus")
	tests, err := filepath.Glob("*_test.yml")
	if err != nil || len(tests) == 0 {
		t.Fatalf("no tests: %v", err)
	}
	checks := [][]string{{"check", "config", "prometheus.yml"}}
	for _, file := range ruleFiles(t) {
		checks = append(checks, []string{"check", "rules", file})
	}
	for _, file := range tests {
		checks = append(checks, []string{"test", "rules", file})
	}
	for _, args := range checks {
		if out, err := exec.CommandContext(t.Context(), promtool, args...).CombinedOutput(); err != nil || !strings.Contains(string(out), "SUCCESS") {
			t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
}

// TestAlerts: every alert says what is wrong and what to do, and has a test in which it
// does not fire, fires, and has gone again.
func TestAlerts(t *testing.T) {
	type moment struct {
		at    time.Duration
		fires bool
	}
	tested := map[string][][]moment{} // by alert, for each test
	tests, err := filepath.Glob("*_test.yml")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range tests {
		var content ruleTest
		read(t, file, &content)
		for _, test := range content.Tests {
			moments := map[string][]moment{}
			for _, check := range test.AlertRuleTests {
				moments[check.Alertname] = append(moments[check.Alertname], moment{time.Duration(check.EvalTime), len(check.ExpAlerts) > 0})
			}
			for alert, m := range moments {
				slices.SortFunc(m, func(a, b moment) int { return int(a.at - b.at) })
				tested[alert] = append(tested[alert], m)
			}
		}
	}
	has := func(alert string, sequence ...bool) bool {
		return slices.ContainsFunc(tested[alert], func(moments []moment) bool {
			left := sequence
			for _, m := range moments {
				if len(left) > 0 && m.fires == left[0] {
					left = left[1:]
				}
			}
			return len(left) == 0
		})
	}
	names := map[string]string{}
	for _, file := range ruleFiles(t) {
		for _, rule := range rules(t, file) {
			if rule.Alert == "" {
				continue
			}
			if other := names[rule.Alert]; other != "" {
				t.Errorf("%s is in %s and in %s", rule.Alert, other, file)
			}
			names[rule.Alert] = file
			if severity := rule.Labels["severity"]; severity != "warning" && severity != "critical" {
				t.Errorf("%s has the severity %q", rule.Alert, severity)
			}
			for _, name := range []string{"summary", "description"} {
				if len(rule.Annotations[name]) < 20 {
					t.Errorf("%s has the %s %q", rule.Alert, name, rule.Annotations[name])
				}
			}
			if link := regexp.MustCompile(`https?://[a-z][^ ]*`).FindString(rule.Annotations["description"]); link != "" {
				t.Errorf("%s has the link %s, which may die", rule.Alert, link)
			}
			if !has(rule.Alert, false, true) || !has(rule.Alert, true, false) {
				t.Errorf("%s has no test in which it does not fire and then does, or none in which it does and then does not", rule.Alert)
			}
		}
	}
	for alert := range tested {
		if names[alert] == "" {
			t.Errorf("there are tests of %s, which does not exist", alert)
		}
	}
	// Those of the other examples are for their own jobs.
	others, err := filepath.Glob("../*/alerts.yml")
	if err != nil || len(others) == 0 {
		t.Fatalf("no other alerts: %v", err)
	}
	for _, file := range others {
		for _, rule := range rules(t, file) {
			if names[rule.Alert] != "" {
				t.Errorf("%s is in %s too", rule.Alert, file)
			}
		}
	}
}
