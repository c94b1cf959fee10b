package ui_test

import (
	"bytes"
	"cmp"
	"fmt"
	"image"
	"image/color"
	"image/draw"
	"image/png"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/chromedp/cdproto/page"
	"github.com/chromedp/chromedp"
)

// TestScreenshots makes the pictures of the README:
//
//	CULVERT_SCREENSHOTS=$PWD/proxy/ui/testdata go test ./proxy/ui -run TestScreenshots
func TestScreenshots(t *testing.T) {
	if os.Getenv("CULVERT_SCREENSHOTS") == "" {
		t.Skip("CULVERT_SCREENSHOTS names no directory for them")
	}
	s := newSecureSite(t, nil)
	s.slow = true
	b := newBrowser(t, s)
	s.startAgents(0, 60)
	s.push(24)
	for i := range 20 {
		for n := range 60 {
			s.scrape("app", hostName(n))
			if i%4 == 0 {
				s.scrape("agent", hostName(n))
			}
		}
	}
	s.scrape("9100", "db-3.example.net")
	for _, name := range []string{"cache-7.example.net", "web-9.example.net"} {
		s.stopAgent(name)
	}
	s.awaitConnected(58)
	if err := s.do(http.MethodPut, "metrics/job/etl-orders/instance/cache-2.example.net", "rows 1 1700000000000\n"); err == nil {
		t.Error("a push with a timestamp was taken")
	}
	b.do(chromedp.Navigate("http://root:secret@" + s.Addr() + "/"))
	picture := func(name, theme string, width, height int64, query, ready string) {
		t.Helper()
		b.theme(theme)
		b.size(width, height, width < 500)
		b.open(query)
		b.await(ready)
		b.shot(name)
	}
	picture("agents", "light", 1180, 560, "?sort=state", `document.querySelectorAll("#rows .spark").length > 5`)
	b.theme("dark")
	b.size(1180, 640, false)
	b.open("?q=db&agent=db-3.example.net")
	b.await(`document.querySelectorAll("#panel .history").length > 2 && document.querySelectorAll("#rows .scrape").length > 10`)
	b.click(`#panel [aria-label="Scrape now: app"]`)
	b.await(`document.querySelector("#panel .target .output pre")`)
	b.shot("agent")
	picture("groups", "light", 1180, 420, "?view=groups&sort=state", `document.querySelectorAll("#rows tbody th").length > 5`)
	picture("phone", "dark", 390, 700, "?sort=state", `document.querySelectorAll("#rows tbody th").length > 5`)
}

// shot keeps a screenshot where CULVERT_SCREENSHOTS names a directory, in 256 colours,
// which is a third of the size.
func (b *browser) shot(name string) {
	b.t.Helper()
	dir := os.Getenv("CULVERT_SCREENSHOTS")
	if dir == "" {
		return
	}
	shot, err := png.Decode(bytes.NewReader(call(b, page.CaptureScreenshot, page.CaptureScreenshotParams{}).Data))
	if err != nil {
		b.t.Fatal(err)
	}
	seen := map[color.RGBA]int{}
	for y := range shot.Bounds().Dy() {
		for x := range shot.Bounds().Dx() {
			seen[color.RGBAModel.Convert(shot.At(x, y)).(color.RGBA)]++
		}
	}
	colours := slices.SortedFunc(maps.Keys(seen), func(a, b color.RGBA) int {
		return cmp.Or(cmp.Compare(seen[b], seen[a]), cmp.Compare(fmt.Sprint(a), fmt.Sprint(b)))
	})
	var palette color.Palette
	for _, c := range colours {
		// No two that the eye can't tell apart, as shades of the edge of a letter.
		near := func(other color.Color) bool {
			o := other.(color.RGBA)
			distance := func(a, b uint8) int { return max(int(a)-int(b), int(b)-int(a)) }
			return distance(c.R, o.R)+distance(c.G, o.G)+distance(c.B, o.B) < 10
		}
		if len(palette) < 256 && !slices.ContainsFunc(palette, near) {
			palette = append(palette, c)
		}
	}
	small := image.NewPaletted(shot.Bounds(), palette)
	draw.Draw(small, small.Bounds(), shot, image.Point{}, draw.Src)
	var out bytes.Buffer
	if err := (&png.Encoder{CompressionLevel: png.BestCompression}).Encode(&out, small); err != nil {
		b.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, name+".png"), out.Bytes(), 0o644); err != nil {
		b.t.Fatal(err)
	}
}
