package server

import (
	"bytes"
	"fmt"
	"net/http"
	"time"

	"github.com/culvert-io/culvert/protocol"
)

// refuse answers with a refusal whose reason stands in the status line too:
// Prometheus shows that on its targets page, for CONNECT as well. net/http can't
// write a reason phrase, so the connection is taken over, and closed after it. A
// request with a body gets the standard phrase instead: closing would reset the
// connection before the answer is read.
func (s *Server) refuse(w http.ResponseWriter, r *http.Request, refusal *protocol.Refusal) {
	s.logger.Debug("Refused", "method", r.Method, "target", r.RequestURI, "from", r.RemoteAddr, "status", refusal.Status, "reason", refusal.Reason())
	challenge(w.Header(), refusal.Status)
	if r.Method != http.MethodConnect && (r.ContentLength != 0 || passedOn(r)) { // another proxy keeps its connections
		finish(w)
		refusal.Write(w)
		return
	}
	header := w.Header().Clone()
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		finish(w)
		refusal.Write(w)
		return
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(5 * time.Second))
	refusal.SetHeader(header)
	header.Set("Date", time.Now().UTC().Format(http.TimeFormat))
	if refusal.Status != http.StatusUpgradeRequired {
		header.Set("Connection", "close")
	}
	body := refusal.Message + "\n"
	header.Set("Content-Length", fmt.Sprint(len(body)))
	var answer bytes.Buffer
	fmt.Fprintf(&answer, "HTTP/1.1 %d %s\r\n", refusal.Status, refusal.Reason())
	header.Write(&answer)
	answer.WriteString("\r\n")
	if r.Method != http.MethodHead {
		answer.WriteString(body)
	}
	conn.Write(answer.Bytes())
}
