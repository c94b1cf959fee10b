package gateway

import "context"

// forbidden is a push to a group that is not for who sent it.
type forbidden struct{ err error }

func (e forbidden) Error() string { return e.err.Error() }
func (e forbidden) Unwrap() error { return e.err }

type allowKey struct{}

// WithAllow returns a context for a request: the groups that it pushes to or deletes by
// their key are asked for, each by the key as it would be stored. Where allow returns an
// error, nothing of the request is done, and the answer is 403 with it.
//
// The wipe and deletion by matcher ask nobody.
func WithAllow(ctx context.Context, allow func(Key) error) context.Context {
	return context.WithValue(ctx, allowKey{}, allow)
}

func allowed(ctx context.Context, key Key) error {
	if allow, ok := ctx.Value(allowKey{}).(func(Key) error); ok {
		if err := allow(key); err != nil {
			return forbidden{err}
		}
	}
	return nil
}
