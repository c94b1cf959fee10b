#!/bin/sh
# Makes a machine of the namespaces that it was started in: the files are this machine's,
# what is written goes to memory, and systemd is its first process.
#
#   machine.sh DIRECTORY CGROUP
set -eu
dir=$1 cgroup=$2

if [ $# = 2 ]; then
	mount --make-rprivate /
	# A group of its own in each hierarchy, so that nothing is left in this machine's.
	trees=/sys/fs/cgroup
	[ -e /sys/fs/cgroup/cgroup.procs ] || trees="/sys/fs/cgroup/*"
	for tree in $trees; do
		if [ ! -L "$tree" ] && mkdir "$tree/$cgroup"; then
			# A cpuset takes nobody before it is set up, and systemd has no use for it.
			echo 0 2>/dev/null >"$tree/$cgroup/cgroup.procs" || rmdir "$tree/$cgroup"
		fi
	done
	exec unshare --cgroup "$0" "$dir" "$cgroup" inside
fi

mount -t tmpfs tmpfs "$dir"
cd "$dir"
mkdir upper work root
mount -t overlay overlay -o lowerdir=/,upperdir=upper,workdir=work root
cd root
mount -t proc proc proc
mount -t sysfs sysfs sys
if [ -e /sys/fs/cgroup/cgroup.procs ]; then
	mount -t cgroup2 cgroup2 sys/fs/cgroup
else
	mount -t tmpfs -o mode=755 tmpfs sys/fs/cgroup
	mkdir sys/fs/cgroup/systemd sys/fs/cgroup/unified
	mount -t cgroup2 cgroup2 sys/fs/cgroup/unified
	mount -t cgroup -o none,name=systemd cgroup sys/fs/cgroup/systemd
fi
for fresh in dev run tmp var/tmp; do
	mount -t tmpfs -o mode=755 tmpfs $fresh
done
chmod 1777 tmp var/tmp
for device in null zero full random urandom tty; do
	: >dev/$device
	mount --bind /dev/$device dev/$device
done
mkdir dev/shm dev/pts
mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ip link set lo up
echo culvert-test >/proc/sys/kernel/hostname

# Of the services there is the journal alone.
rm -rf etc/systemd/system etc/fstab usr/lib/systemd/system/*.target.wants usr/sbin/policy-rc.d var/log/journal
mkdir etc/systemd/system
printf '[Unit]\nWants=systemd-journald.service\n' >etc/systemd/system/test.target

mkdir .host
pivot_root . .host
umount -l .host
exec env -i container=culvert-test PATH=/usr/sbin:/usr/bin:/sbin:/bin /usr/lib/systemd/systemd --system --unit=test.target --log-target=journal --show-status=no
