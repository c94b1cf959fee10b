package gateway

import (
	"errors"
	"strings"
)

// CheckBody tells what a store would refuse in the body of a push to a group,
// whatever else it holds: for those who push, before they do. contentType chooses
// the format as in a push. It returns the names of the families, sorted. An error
// of the syntax names the line.
func CheckBody(key Key, contentType string, body []byte) (names []string, err error) {
	families, err := formatOf(contentType).parse(body)
	if err != nil {
		return nil, err
	}
	if _, reasons := prepare(key, families, 0); len(reasons) > 0 {
		return nil, errors.New(strings.Join(reasons, "; "))
	}
	for _, f := range families {
		names = append(names, f.GetName())
	}
	return names, nil
}
