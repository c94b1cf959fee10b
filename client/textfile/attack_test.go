package textfile_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/culvert-io/culvert/client/textfile"
)

// TestLinks: who may write to a directory of textfiles may point to other files, as with
// node_exporter, and still has nothing served that is no exposition; no link has the
// collector read without an end.
func TestLinks(t *testing.T) {
	t.Parallel()
	const secret = "s3cr3t"
	for _, test := range []struct {
		name   string
		files  []string
		links  []string // NAME, TO
		dirs   []string
		want   string
		errors []string
	}{
		{name: "to a metric outside", files: []string{"in/a.prom", "a 1\n", "out/m", "m 1\n"}, links: []string{"in/l.prom", "../out/m"}, dirs: []string{"in"},
			want: untyped("a", "in/a.prom", "a 1") + untyped("m", "in/l.prom", "m 1")},
		{name: "to a secret", files: []string{"in/a.prom", "a 1\n", "out/shadow", "root:" + secret + ":1:2:::\n", "out/key", "-----BEGIN PRIVATE KEY-----\n" + secret + "\n-----END PRIVATE KEY-----\n", "out/env", "A=b\x00TOKEN=" + secret + "\x00"},
			links: []string{"in/l.prom", "../out/shadow", "in/m.prom", "../out/key", "in/n.prom", "../out/env", "in/o.om", "../out/shadow"}, dirs: []string{"in"},
			want: untyped("a", "in/a.prom", "a 1"), errors: []string{"in/l.prom parse", "in/m.prom parse", "in/n.prom parse", "in/o.om parse"}},
		{name: "to itself", files: []string{"a.prom", "a 1\n"}, links: []string{"l.prom", "l.prom", "m.prom", "n.prom", "n.prom", "m.prom"},
			want: untyped("a", "a.prom", "a 1"), errors: []string{"l.prom io", "m.prom io", "n.prom io"}},
		{name: "to the directory", files: []string{"a.prom", "a 1\n"}, links: []string{"l.prom", ".", "up", ".."},
			want: untyped("a", "a.prom", "a 1"), errors: []string{"l.prom io"}},
		{name: "to devices and kernel files", files: []string{"a.prom", "a 1\n"},
			links: []string{"l.prom", "/dev/zero", "m.prom", "/dev/tty", "n.prom", "/proc/self/environ", "o.prom", "/proc/self/mem", "p.prom", "/proc/self/fd"},
			want:  untyped("a", "a.prom", "a 1"), errors: []string{"l.prom io", "m.prom io", "n.prom *", "o.prom *", "p.prom *"}},
		{name: "a directory in a pattern", files: []string{"in/a/a.prom", "a 1\n", "out/b.prom", "b 1\n"}, links: []string{"in/l", "../out", "in/loop", "../in"}, dirs: []string{"in/*"},
			want: untyped("a", "in/a/a.prom", "a 1") + untyped("b", "in/l/b.prom", "b 1")},
		{name: "dots in a pattern", files: []string{"in/a.prom", "a 1\n", "out/b.prom", "b 1\n"}, dirs: []string{"in/../ou*", "in/./", "in/../in"},
			want: untyped("a", "in/a.prom", "a 1") + untyped("b", "out/b.prom", "b 1")},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			d := newDirectory(t, test.files...)
			for i := 0; i < len(test.links); i += 2 {
				if err := os.Symlink(test.links[i+1], filepath.Join(d.path, test.links[i])); err != nil {
					t.Skip(err)
				}
			}
			dirs := []string{d.path}
			if test.dirs != nil {
				dirs = nil
				for _, name := range test.dirs {
					dirs = append(dirs, d.path+"/"+name)
				}
			}
			c, _ := newCollector(t, textfile.Config{Directories: dirs})
			for range 2 {
				got := collect(t, c, d.path)
				if got.text != test.want {
					t.Errorf("got\n%s\nwant\n%s", got.text, test.want)
				}
				if len(got.errors) != len(test.errors) {
					t.Fatalf("errors %q, want %q", got.errors, test.errors)
				}
				for i, want := range test.errors {
					if file, any := strings.CutSuffix(want, " *"); any && strings.HasPrefix(got.errors[i], file+" ") {
						continue // who may read it decides
					}
					if got.errors[i] != want {
						t.Errorf("errors %q, want %q", got.errors, test.errors)
					}
				}
				families, err := c.Gather()
				if err != nil {
					t.Fatal(err)
				}
				for _, family := range families {
					if strings.Contains(family.String(), secret) {
						t.Errorf("the secret is served: %s", family)
					}
				}
			}
		})
	}
}

// TestFileNames: a file's name is a label's value, whatever is in it.
func TestFileNames(t *testing.T) {
	t.Parallel()
	names := []string{"a\"} 1\nevil 1\n.prom", "b\\n.prom", "c\n# EOF\n.prom", "..prom", "d .prom", "-rf.prom", "*.prom", "[a.prom", "%2e%2e%2f.prom"}
	var files []string
	for _, name := range names {
		files = append(files, name, "m{f=\"x\"} 1\n")
	}
	d := newDirectory(t, files...)
	c, _ := newCollector(t, textfile.Config{Directories: []string{d.path}})
	families, err := c.Gather()
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]bool{}
	for _, family := range families {
		switch family.GetName() {
		case "evil":
			t.Errorf("a name became a series: %s", family)
		case "node_textfile_mtime_seconds":
			for _, m := range family.Metric {
				found[filepath.Base(m.Label[0].GetValue())] = true
			}
		}
	}
	for _, name := range names {
		if !found[name] {
			t.Errorf("no time of %q among %v", name, found)
		}
	}
}
