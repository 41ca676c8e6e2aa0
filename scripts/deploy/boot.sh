#!/bin/sh
# Boots systemd in namespaces of its own, over a copy of this machine's files that is forgotten afterwards:
#
#   unshare --mount --pid --fork --kill-child=KILL --uts --ipc --net --cgroup sh boot.sh PLACE UNITS ROUTER FOLDER...
#
# PLACE: an empty folder. UNITS: deploy/systemd. ROUTER: a folder that becomes /opt/sglang-router. FOLDERs: what else is there
# inside, to read, wherever it is mounted: this checkout may be in /tmp. Needs root. The network is a loopback interface of
# its own; nothing of the machine but the kernel is used.
set -eu
place=$1 units=$2 router=$3
shift 3
root=$place/root

mount --make-rprivate /
mkdir -p "$place/over" "$root"
mount -t tmpfs tmpfs "$place/over"
mkdir "$place/over/upper" "$place/over/work"
mount -t overlay overlay -o "lowerdir=/,upperdir=$place/over/upper,workdir=$place/over/work" "$root"
mount -t proc proc "$root/proc"
mount -t tmpfs tmpfs "$root/run"
mount -t tmpfs tmpfs "$root/tmp"
for folder; do
    mkdir -p "$root$folder"
    mount --bind "$folder" "$root$folder"
    mount -o remount,bind,ro "$root$folder"
done
mount --rbind /sys "$root/sys"
mount -t tmpfs tmpfs "$root/dev"
mkdir "$root/dev/shm" "$root/dev/pts" "$root/dev/mqueue" "$root/dev/hugepages"
for device in null zero full random urandom tty; do
    touch "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
mount -t mqueue mqueue "$root/dev/mqueue"
mount -t devpts devpts "$root/dev/pts" -o newinstance,ptmxmode=0666,mode=620
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
touch "$root/dev/console"
ip link set lo up

# As docs/deploy-systemd.md says.
cp "$units"/*.service "$units"/*.socket "$root/etc/systemd/system/"
cp "$units/sglang-router.conf" "$root/usr/lib/sysusers.d/"
mkdir -p "$root/opt/sglang-router" "$root/usr/local/sbin"
cp "$units/sglang-router-turn" "$root/usr/local/sbin/"
cp -r "$router/." "$root/opt/sglang-router"
chroot "$root" systemd-sysusers sglang-router.conf 2>/dev/null
chroot "$root" install -d -m 0750 -g sglang-router /etc/sglang-router
install -m 0640 "$units/router.yaml" "$root/etc/sglang-router/router.yaml"
chroot "$root" chgrp sglang-router /etc/sglang-router/router.yaml

mkdir "$root/run/old-root"
cd "$root"
pivot_root . run/old-root
umount -l run/old-root
exec env -i container=test PATH=/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin \
    chroot . /lib/systemd/systemd --system --show-status=0 --unit=sockets.target >dev/console 2>&1 <dev/null
