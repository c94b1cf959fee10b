package ui

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io/fs"
	"net/http"
	"path"
	"strings"
	"sync"
	"time"

	"github.com/culvert-io/culvert/gateway"
)

// asset is a file of the page, in both encodings.
type asset struct {
	contentType   string
	plain, zipped []byte
}

// assets are all files of the page by their names, and a hash of them all.
var assets = sync.OnceValues(func() (map[string]asset, string) {
	files, sum := map[string]asset{}, sha256.New()
	names, err := fs.Glob(assetFiles, "assets/*")
	if err != nil {
		panic(err) // the pattern is a constant
	}
	for _, name := range names { // sorted
		text, err := assetFiles.ReadFile(name)
		if err != nil {
			panic(err) // it is in the program
		}
		sum.Write(text)
		// Not by mime.TypeByExtension: it asks files of the system.
		contentType := map[string]string{".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}[path.Ext(name)]
		files[path.Base(name)] = asset{contentType, text, zip(text, gzip.BestCompression)}
	}
	return files, hex.EncodeToString(sum.Sum(nil)[:8])
})

func zip(text []byte, level int) []byte {
	var b bytes.Buffer
	z, err := gzip.NewWriterLevel(&b, level)
	if err != nil {
		panic(err) // the levels are constants
	}
	z.Write(text) // into memory: no error
	z.Close()
	return b.Bytes()
}

// assetPath returns the path of an asset, relative to the page. The hash of them all
// stands in it, so that a browser may keep what it has, and modules that import each
// other by relative paths are always of one version.
func assetPath(name string) string {
	_, hash := assets()
	return "ui/" + hash + "/" + name
}

// ServeAsset serves one of the page's files. rest is what follows /ui/ in the path: its
// name, behind the hash that the page has there.
func ServeAsset(w http.ResponseWriter, r *http.Request, rest string) {
	files, current := assets()
	hash, name, ok := strings.Cut(rest, "/")
	if !ok {
		hash, name = "", rest
	}
	file, ok := files[name]
	if !ok {
		http.Error(w, fmt.Sprintf("there is no file %q; reload the page, which may be of another version of the proxy", name), http.StatusNotFound)
		return
	}
	h := w.Header()
	h.Set("Content-Type", file.contentType)
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; sandbox") // of the icon, where it is opened alone
	h.Set("Vary", "Accept-Encoding")
	if hash == current {
		h.Set("Cache-Control", "private, max-age=31536000, immutable")
	} else {
		// A page that another version of the proxy made, behind one address: better this
		// version's files than none.
		h.Set("Cache-Control", "no-cache")
	}
	body, tag := file.plain, current
	if gateway.AcceptsGzip(r.Header) {
		h.Set("Content-Encoding", "gzip")
		body, tag = file.zipped, current+"-gz"
	}
	h.Set("ETag", `"`+tag+"-"+name+`"`)
	http.ServeContent(w, r, name, time.Time{}, bytes.NewReader(body))
}

// writeMaybeZipped writes a body, by gzip where the client takes it: the page repeats
// itself a lot.
func writeMaybeZipped(w http.ResponseWriter, r *http.Request, status int, body []byte) {
	w.Header().Set("Vary", "Accept-Encoding")
	if gateway.AcceptsGzip(r.Header) {
		w.Header().Set("Content-Encoding", "gzip")
		body = zip(body, gzip.BestSpeed)
	}
	w.WriteHeader(status)
	// The status is out: an error now is the reader's going away.
	_, _ = w.Write(body)
}
