package gateway

import (
	"encoding/base64"
	"fmt"
	"slices"
	"sort"
	"strings"
	"unicode/utf8"

	"github.com/prometheus/common/model"
)

// Label is a name and a value.
type Label struct{ Name, Value string }

// Key is a grouping key: labels sorted by name, each name once, "job" among them.
type Key []Label

// ID returns the key in a form that is equal for equal keys and sorts like them:
// names and values joined by the byte 0xFF, which UTF-8 doesn't have.
func (k Key) ID() string { return string(k.appendID(nil)) }

func (k Key) appendID(id []byte) []byte {
	for i, l := range k {
		id = appendLabelID(id, i, l.Name, l.Value)
	}
	return id
}

// appendLabelID appends the i-th label to an ID.
func appendLabelID(id []byte, i int, name, value string) []byte {
	if i > 0 {
		id = append(id, 0xff)
	}
	id = append(id, name...)
	id = append(id, 0xff)
	return append(id, value...)
}

// canonical returns the key with its names as text format 0.0.4 escapes them.
func (k Key) canonical() Key {
	if !slices.ContainsFunc(k, func(l Label) bool { return !model.LegacyValidation.IsValidLabelName(l.Name) }) {
		return k
	}
	c := make(Key, len(k))
	for i, l := range k {
		c[i] = Label{model.EscapeName(l.Name, model.UnderscoreEscaping), l.Value}
	}
	sort.Slice(c, func(i, j int) bool { return c[i].Name < c[j].Name })
	return c
}

// String returns the key as a selector, for people.
func (k Key) String() string {
	var b strings.Builder
	b.WriteByte('{')
	for i, l := range k {
		if i > 0 {
			b.WriteByte(',')
		}
		fmt.Fprintf(&b, "%s=%q", l.Name, l.Value)
	}
	b.WriteByte('}')
	return b.String()
}

// Get returns the value of a label, and whether the key has it.
func (k Key) Get(name string) (string, bool) {
	for _, l := range k {
		if l.Name == name {
			return l.Value, true
		}
	}
	return "", false
}

// Map returns the key as a map.
func (k Key) Map() map[string]string {
	m := make(map[string]string, len(k))
	for _, l := range k {
		m[l.Name] = l.Value
	}
	return m
}

// NewKey returns the key with the given labels. It returns an error that names
// the label where one can't be part of a key, or where job is missing or empty.
func NewKey(labels map[string]string) (Key, error) {
	if labels["job"] == "" {
		return nil, fmt.Errorf("the job name is missing; push to /metrics/job/NAME")
	}
	k := make(Key, 0, len(labels))
	for name, value := range labels {
		if err := checkKeyLabel(name, value); err != nil {
			return nil, err
		}
		at, _ := slices.BinarySearchFunc(k, name, func(l Label, name string) int { return strings.Compare(l.Name, name) })
		k = slices.Insert(k, at, Label{name, value})
	}
	for c, i := k.canonical(), 1; i < len(c); i++ {
		if c[i].Name == c[i-1].Name {
			return nil, fmt.Errorf("two label names of the grouping key %s are the same where UTF-8 names are escaped: %s", k, c[i].Name)
		}
	}
	return k, nil
}

// base64Suffix marks a label name in the path whose value is base64.
const base64Suffix = "@base64"

// ParsePath reads the grouping key from what follows /metrics/job in the path of
// a push, percent-decoded: "/NAME", "@base64/NAME", each with label pairs behind.
// An error names the part that is wrong.
//
// Label names are any UTF-8, raw or escaped as U__…, as the Pushgateway takes
// them with --push.enable-utf8-names.
func ParsePath(rest string) (Key, error) {
	encoded := strings.HasPrefix(rest, base64Suffix+"/")
	parts := strings.Split(strings.TrimPrefix(rest, base64Suffix)[1:], "/")
	job := parts[0]
	if encoded {
		var err error
		if job, err = decodeBase64(job); err != nil {
			return nil, fmt.Errorf("job name %q is not URL-safe base64: %w", parts[0], err)
		}
	}
	pairs := parts[1:]
	if len(pairs) == 1 && pairs[0] == "" {
		pairs = nil // a slash behind the job
	}
	if len(pairs)%2 != 0 {
		return nil, fmt.Errorf("the label part %q of the path has a name without a value; write /NAME/VALUE pairs, an empty value as /NAME%s/=", "/"+strings.Join(pairs, "/"), base64Suffix)
	}
	labels := make(map[string]string, len(pairs)/2+1)
	for i := 0; i < len(pairs); i += 2 {
		name, value := pairs[i], pairs[i+1]
		trimmed, encoded := strings.CutSuffix(name, base64Suffix)
		if encoded {
			var err error
			if value, err = decodeBase64(value); err != nil {
				return nil, fmt.Errorf("value %q of label %q is not URL-safe base64: %w", pairs[i+1], trimmed, err)
			}
		}
		if strings.HasPrefix(trimmed, model.ReservedLabelPrefix) {
			return nil, fmt.Errorf("label name %q is reserved: it starts with \"__\"", trimmed)
		}
		name = model.UnescapeName(trimmed, model.ValueEncodingEscaping)
		if err := checkKeyLabel(name, value); err != nil {
			return nil, err
		}
		labels[name] = value // a repeated name: the last value wins
	}
	if job == "" {
		return nil, fmt.Errorf("the job name is empty")
	}
	labels["job"] = job // in front of any job among the pairs
	return NewKey(labels)
}

func checkKeyLabel(name, value string) error {
	switch {
	case name == "" || strings.Contains(name, base64Suffix) || !utf8.ValidString(name):
		return fmt.Errorf("label name %q is not allowed in a grouping key", name)
	case strings.HasPrefix(name, model.ReservedLabelPrefix):
		return fmt.Errorf("label name %q is reserved: it starts with \"__\"", name)
	case !utf8.ValidString(value):
		return fmt.Errorf("value %q of label %q is not UTF-8", value, name)
	}
	return nil
}

// decodeBase64 takes URL-safe base64 with any number of "=" behind.
func decodeBase64(s string) (string, error) {
	b, err := base64.RawURLEncoding.DecodeString(strings.TrimRight(s, "="))
	return string(b), err
}
