# mmdebstrap's customize hook: turns a fresh Debian tree at $1 into an image that many virtual machines share.
set -eu
root=$1

# what every machine must have of its own
: >"$root/etc/machine-id"
rm -f "$root/etc/hostname" "$root"/etc/ssh/ssh_host_* "$root/var/lib/dbus/machine-id"
rm -f "$root/var/lib/systemd/random-seed" "$root/var/lib/systemd/credential.secret"

# banger's agent configures the network and writes these
rm -f "$root/etc/resolv.conf"
: >"$root/etc/resolv.conf"
printf '127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n' >"$root/etc/hosts"

printf 'LANG=C.UTF-8\n' >"$root/etc/default/locale"
# no password lets anybody in as root; keys and banger's agent do
chroot "$root" usermod --lock root

# a machine makes its host key when its sshd first starts; one kind only, an RSA key takes seconds under emulation
if [ -d "$root/etc/ssh/sshd_config.d" ]; then
    printf 'HostKey /etc/ssh/ssh_host_ed25519_key\n' >"$root/etc/ssh/sshd_config.d/host-key.conf"
    mkdir -p "$root/etc/systemd/system/ssh.service.d"
    cat >"$root/etc/systemd/system/ssh.service.d/host-key.conf" <<'END'
[Service]
ExecStartPre=
ExecStartPre=/bin/sh -c 'test -s /etc/ssh/ssh_host_ed25519_key || ssh-keygen -q -t ed25519 -N "" -f /etc/ssh/ssh_host_ed25519_key'
ExecStartPre=/usr/sbin/sshd -t
END
fi

# documentation is read elsewhere; done here because path-exclude makes mmdebstrap unpack ten times slower
cat >"$root/etc/dpkg/dpkg.cfg.d/no-documentation" <<'END'
path-exclude=/usr/share/doc/*
path-include=/usr/share/doc/*/copyright
path-exclude=/usr/share/info/*
path-exclude=/usr/share/locale/*
path-exclude=/usr/share/man/*
END
for directory in info locale man; do
    find "$root/usr/share/$directory" -mindepth 1 -delete
done
find "$root/usr/share/doc" ! -type d ! -name copyright -delete
find "$root/usr/share/doc" -mindepth 1 -type d -empty -delete

# the agent mounts the disks, there is no screen, and a sandbox fetches nothing unasked
if [ -x "$root/usr/bin/systemctl" ] || [ -x "$root/bin/systemctl" ]; then
    chroot "$root" systemctl set-default multi-user.target
    chroot "$root" systemctl mask apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer \
        e2scrub_all.timer e2scrub_reap.service fstrim.timer getty@tty1.service systemd-remount-fs.service
fi
