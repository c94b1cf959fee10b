//go:build !linux

package main

import "context"

func newLink(*stage, linkConfig) (*link, error) {
	return nil, errMissing("network namespaces are Linux's")
}

func (l *link) startExporter(context.Context, *stage, size, size) (string, error) {
	return "", errMissing("network namespaces are Linux's")
}
