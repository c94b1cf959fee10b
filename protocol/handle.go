package protocol

import "context"

// Handle has f called with each stream that the other side opens or has opened,
// one after the other. It takes the place of Accept where there are many sessions
// with little to do: no goroutine waits while no stream comes. It may be called
// once. The calls end when the session does, and Close waits for the last one.
func (s *Session) Handle(f func(*Stream)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.handler = f
	s.startAccepting()
}

// opened counts a stream that the other side opens. The goroutine that receives
// calls it before yamux sees the stream.
func (s *Session) opened() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.unaccepted++
	s.startAccepting()
}

// startAccepting is called with mu held.
func (s *Session) startAccepting() {
	if s.handler == nil || s.accepting || s.unaccepted == 0 || s.closed {
		return
	}
	s.accepting = true
	s.tasks.Go(func() {
		for more := true; more; {
			// A stream that yamux refuses has been counted and never comes: this
			// goroutine then waits for the next one, or the end of the session.
			stream, err := s.Accept(context.Background())
			if err != nil {
				return
			}
			s.handler(stream.(*Stream))
			s.mu.Lock()
			s.unaccepted--
			more = s.unaccepted > 0
			s.accepting = more
			s.mu.Unlock()
		}
	})
}

// AfterEnd has f called in a goroutine of its own once the session has ended, at
// once where it has already. It may be called once.
func (s *Session) AfterEnd(f func()) {
	s.mu.Lock()
	ended := s.disconnected
	if !ended {
		s.afterEnd = f
	}
	s.mu.Unlock()
	if ended {
		go f()
	}
}

// connClosed is called when yamux has closed the connection, and so has ended.
func (s *Session) connClosed() {
	s.mu.Lock()
	f := s.afterEnd
	s.afterEnd, s.disconnected = nil, true
	s.mu.Unlock()
	if f != nil {
		go f()
	}
}
