#!/bin/sh
# Before the package's files go. dpkg says "remove", or "upgrade" where another version
# follows; rpm says how many versions stay.
set -e
root=${DPKG_ROOT:-}

case "$1" in
remove | 0) ;;
*) exit 0 ;;
esac
if [ -n "$root" ]; then
	if command -v systemctl >/dev/null; then
		systemctl --root="$root" disable @NAME@.service
	fi
elif [ -d /run/systemd/system ]; then
	systemctl --no-reload disable --now @NAME@.service
elif command -v systemctl >/dev/null; then
	systemctl disable @NAME@.service
fi
