package protocol

import (
	"bytes"
	"context"
	"encoding/json"
	"net/http"
)

// Register sends the registration, or replaces it in place. It returns a
// *Refusal where the proxy says no.
func (s *Session) Register(ctx context.Context, r *Registration) error {
	return s.control(ctx, http.MethodPut, PathRegistration, r)
}

// CheckRegistration asks whether a registration would be accepted, without any
// effect. Errors are those of Register.
func (s *Session) CheckRegistration(ctx context.Context, r *Registration) error {
	return s.control(ctx, http.MethodPut, PathRegistration+"?"+QueryCheck, r)
}

// Leave asks the proxy to forget the agent.
func (s *Session) Leave(ctx context.Context) error {
	return s.control(ctx, http.MethodDelete, PathRegistration, nil)
}

// SendDrain tells the other side that this one takes no new work here.
func (s *Session) SendDrain(ctx context.Context, d Drain) error {
	return s.control(ctx, http.MethodPost, PathDrain, d)
}

// control sends one control request on a stream of its own.
func (s *Session) control(ctx context.Context, method, path string, message any) error {
	body, err := json.Marshal(message)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://tunnel"+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	req.Close = true // there is seldom another one
	resp, err := (&Transport{Session: s}).RoundTrip(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode/100 != 2 {
		return readRefusal(resp)
	}
	return nil
}
