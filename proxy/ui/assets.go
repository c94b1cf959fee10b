package ui

import (
	"bytes"
	"crypto/sha256"
	"embed"
	"fmt"
	"io/fs"
	"mime"
	"net/http"
	"path"
	"strings"
	"time"
)

//go:embed assets
var assetFiles embed.FS

// asset is a file that the page loads.
type asset struct {
	content     []byte
	contentType string
	tag         string // ETag
}

// assets are the files in the folder assets, by their names.
var assets = func() map[string]asset {
	found := map[string]asset{}
	files, err := fs.Sub(assetFiles, "assets")
	if err == nil {
		err = fs.WalkDir(files, ".", func(name string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			content, err := fs.ReadFile(files, name)
			found[name] = asset{content, typeOf(name), fmt.Sprintf(`"%x"`, sha256.Sum256(content))[:18] + `"`}
			return err
		})
	}
	if err != nil {
		panic(err) // the files are in the program
	}
	return found
}()

// typeOf does not ask the machine for its own types first, as the package mime does.
func typeOf(name string) string {
	switch path.Ext(name) {
	case ".js":
		return "text/javascript; charset=utf-8"
	case ".css":
		return "text/css; charset=utf-8"
	case ".svg":
		return "image/svg+xml"
	}
	return mime.TypeByExtension(path.Ext(name))
}

// ServeAsset serves a file that the page loads, by its name in the folder assets. A
// browser asks each time whether it has changed: a new version of the proxy may have
// another one.
func ServeAsset(w http.ResponseWriter, r *http.Request, name string) {
	a, ok := assets[name]
	if !ok {
		http.Error(w, fmt.Sprintf("there is no file %q; reload the page, which may be of another version of the proxy", name), http.StatusNotFound)
		return
	}
	h := w.Header()
	h.Set("Content-Type", a.contentType)
	h.Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; sandbox")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Cache-Control", "no-cache")
	h.Set("ETag", a.tag)
	http.ServeContent(w, r, strings.ToLower(name), time.Time{}, bytes.NewReader(a.content))
}
