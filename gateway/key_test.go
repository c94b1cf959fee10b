package gateway_test

import (
	"strings"
	"testing"

	"github.com/culvert-io/culvert/gateway"
)

func TestParsePath(t *testing.T) {
	for path, want := range map[string]string{
		"/j":                           `{job="j"}`,
		"/j/":                          `{job="j"}`,
		"@base64/L2E/x@base64/Yi9j":    `{job="/a",x="b/c"}`,
		"/j/a@base64/=":                `{a="",job="j"}`,
		"/j/a@base64/==":               `{a="",job="j"}`,
		"/j/a@base64/":                 `{a="",job="j"}`,
		"/j/a@base64/Zm9v====":         `{a="foo",job="j"}`,
		"/j/a@base64/=/b/c":            `{a="",b="c",job="j"}`,
		"/j/a/1/a/2":                   `{a="2",job="j"}`,
		"/j/job/other":                 `{job="j"}`,
		"/j/instance/":                 `{instance="",job="j"}`,
		"/j/a/1/A/2":                   `{A="2",a="1",job="j"}`,
		"/j/x/a+b":                     `{job="j",x="a+b"}`,
		"/j/x/a b":                     `{job="j",x="a b"}`,
		"/j/x/..":                      `{job="j",x=".."}`,
		"/j/x/\x00\n":                  `{job="j",x="\x00\n"}`,
		"/a/b/c":                       `{b="c",job="a"}`,
		"@base64/Zm9v":                 `{job="foo"}`,
		"/j/b/2/a/1":                   `{a="1",b="2",job="j"}`,
		"/j/U__foo_2e_bar/baz":         `{foo.bar="baz",job="j"}`,
		"/j/foo.bar/baz":               `{foo.bar="baz",job="j"}`,
		"/j/U___55_____/x":             `{U__="x",job="j"}`,
		"/j/U__a_1F600_b/x":            `{a😀b="x",job="j"}`,
		"/j/U__a_2F_b/x":               `{a/b="x",job="j"}`,
		"/j/U__in_xxx_valid/x":         `{U__in_xxx_valid="x",job="j"}`,
		"/j/U_____x/x":                 `{U_____x="x",job="j"}`,
		"/j/U__a_2e/x":                 `{U__a_2e="x",job="j"}`,
		"/j/U__a_000041_b/x":           `{U__a_000041_b="x",job="j"}`,
		"/j/U__a_D800_b/x":             `{U__a_D800_b="x",job="j"}`,
		"/j/U__foo_2e_bar@base64/YmF6": `{foo.bar="baz",job="j"}`,
		"/j/U__job/other":              `{job="j"}`,
		"/j/U___6a_ob/other":           `{job="j"}`,
		"/j/U__instance/i":             `{instance="i",job="j"}`,
		"/j/grüße/x":                   `{grüße="x",job="j"}`,
	} {
		key, err := gateway.ParsePath(path)
		if err != nil {
			t.Errorf("%q: %v", path, err)
		} else if got := key.String(); got != want {
			t.Errorf("%q: got %s, want %s", path, got, want)
		}
	}
}

func TestParsePathErrors(t *testing.T) {
	for path, want := range map[string]string{
		"/":                     "job name is empty",
		"//":                    "job name is empty",
		"@base64/=":             "job name is empty",
		"@base64/a+b":           `job name "a+b"`,
		"/j/instance":           `"/instance"`,
		"/j/a/b/":               `"/a/b/"`,
		"/a/b":                  `"/b"`,
		"/j/__x/1":              `"__x"`,
		"/j/__name__/1":         `"__name__"`,
		"/j//1":                 `""`,
		"/j/a@base64/a+b":       `value "a+b" of label "a"`,
		"/j/a@base64/A":         `value "A" of label "a"`,
		"/j/a@base64@base64/YQ": `"a@base64"`,
		"/j/x/\xff":             "not UTF-8",
		"/j/x@base64/_w":        "not UTF-8",
		"/\xff":                 "not UTF-8",
		"/j/\xff/x":             "not allowed",
		"/j/U__/x":              `""`,
		"/j/U______x/x":         `"__x"`,
	} {
		if key, err := gateway.ParsePath(path); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %v %v, want an error with %q", path, key, err, want)
		}
	}
}

// FuzzParsePath: a key that a path gives is one that NewKey takes, and its ID is
// as good as the key.
func FuzzParsePath(f *testing.F) {
	for _, seed := range []string{"/j", "@base64/L2E/x@base64/Yi9j", "/j/U__a_2F_b/x", "/j/a@base64/=", "/j/a/b/"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, path string) {
		if !strings.HasPrefix(path, "/") && !strings.HasPrefix(path, "@base64/") {
			return
		}
		key, err := gateway.ParsePath(path)
		if err != nil {
			return
		}
		again, err := gateway.NewKey(key.Map())
		if err != nil || again.ID() != key.ID() {
			t.Errorf("%q: %s, and again %s, %v", path, key, again, err)
		}
	})
}
