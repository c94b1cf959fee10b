#!/bin/sh
# After the package's files are there. dpkg says "configure", and the old version where
# there was one; rpm says how many versions are installed now.
set -e
root=${DPKG_ROOT:-} # another root than /, where dpkg doesn't chroot

case "$1" in
configure) [ -z "$2" ] || upgrade=1 ;;
1) ;;
[2-9]*) upgrade=1 ;;
*) exit 0 ;;
esac

if command -v systemd-sysusers >/dev/null; then
	systemd-sysusers ${root:+--root="$root"} @NAME@.conf
elif ! getent passwd @NAME@ >/dev/null; then
	useradd --system --user-group --no-create-home --home-dir /var/lib/@NAME@ --shell /usr/sbin/nologin ${root:+--prefix "$root"} @NAME@
fi
# Secrets belong into this directory.
gid=$(sed -n 's/^@NAME@:[^:]*:\([0-9]*\):.*/\1/p' "$root/etc/group")
chgrp "${gid:-@NAME@}" "$root/etc/@NAME@"

if [ -z "$root" ] && [ -d /run/systemd/system ]; then
	systemctl daemon-reload
	[ -z "$upgrade" ] || systemctl try-restart @NAME@.service
fi
if [ -z "$upgrade" ]; then
	echo "@NAME@ is not started yet. Edit /etc/@NAME@, then: systemctl enable --now @NAME@"
fi
