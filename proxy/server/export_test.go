package server

// RouteAccess returns the routes that have a row in the table of who may what.
func RouteAccess() []string {
	var names []string
	for name := range routeAccess {
		names = append(names, name)
	}
	return names
}

// Guarded returns the routes of the router.
func (s *Server) Guarded() []string { return s.guarded }

// PushProxScrapes returns how many scrapes wait for the pushes of PushProx clients.
func (s *Server) PushProxScrapes() int {
	s.pushProx.mu.Lock()
	defer s.pushProx.mu.Unlock()
	return len(s.pushProx.scrapes)
}
