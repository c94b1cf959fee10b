#!/bin/sh
# After the package's files went. What the program stored stays, and so does its user,
# whose it is.
set -e
root=${DPKG_ROOT:-}

case "$1" in
remove | purge | 0) ;;
*) exit 0 ;;
esac
if [ -z "$root" ] && [ -d /run/systemd/system ]; then
	systemctl daemon-reload
fi
if [ "$1" = purge ]; then
	rmdir "$root/etc/@NAME@" 2>/dev/null || true # files that are not the package's stay
fi
if [ "$1" != remove ] && [ -d "$root/var/lib/@NAME@" ]; then
	echo "What @NAME@ stored is left in /var/lib/@NAME@."
fi
