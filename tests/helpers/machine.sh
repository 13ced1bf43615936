#!/bin/bash
# Process 1 of a fake machine: machine.sh FOLDER NAME USER HIDDEN VENV PYTHON_HOME
# Runs in new mount, pid, uts, ipc and net namespaces: a copy-on-write view of this machine's disk,
# with an sshd of its own. HIDDEN is a folder that the machine does not have (the repository: a job
# must bring what it needs); VENV exists all the same, as in an image.
set -euo pipefail
FOLDER=$1 NAME=$2 LOGIN=$3 HIDDEN=$4 VENV=$5 PYTHON_HOME=$6
mount --make-rprivate /
mkdir -p "$FOLDER/disk"
mount -t tmpfs -o size=3g tmpfs "$FOLDER/disk"
mkdir "$FOLDER"/disk/{upper,work,root}
ROOT=$FOLDER/disk/root
mount -t overlay overlay -o "lowerdir=/,upperdir=$FOLDER/disk/upper,workdir=$FOLDER/disk/work" "$ROOT"
mount -t proc proc "$ROOT/proc"
mount --rbind /sys "$ROOT/sys"
mount --rbind /dev "$ROOT/dev"
mount -t tmpfs -o size=2g tmpfs "$ROOT/dev/shm"
mount -t tmpfs tmpfs "$ROOT/run"
mount -t tmpfs -o mode=1777,size=4g tmpfs "$ROOT/tmp"
mkdir -p "$ROOT$HIDDEN"
mount -t tmpfs -o mode=755 tmpfs "$ROOT$HIDDEN"
mkdir -p "$ROOT$VENV"
mount --bind -o ro "$VENV" "$ROOT$VENV"
# As a user's own machines mount it from a file server.
mkdir -p "$ROOT/mnt/runs"
mount --bind "$FOLDER/../shared" "$ROOT/mnt/runs"

hostname "$NAME"
echo "$NAME" >"$ROOT/etc/hostname"
# As Debian's and Ubuntu's installers write it: the host name is a loopback address.
printf '127.0.0.1 localhost\n127.0.1.1 %s\n' "$NAME" >"$ROOT/etc/hosts"
# No name server is reachable, and an absent one causes timeouts: loopback refuses at once.
rm -f "$ROOT/etc/resolv.conf"
echo "nameserver 127.0.0.1" >"$ROOT/etc/resolv.conf"

if [ "$LOGIN" = root ]; then
  HOME_OF=/root
else
  chroot "$ROOT" useradd -m -s /bin/bash "$LOGIN"
  chroot "$ROOT" usermod -p '*' "$LOGIN"
  HOME_OF=/home/$LOGIN
fi
for path in "$VENV" "$PYTHON_HOME"; do  # the user must be able to reach Python
  while [ "$path" != / ]; do
    path=$(dirname "$path")
    chmod o+x "$ROOT$path"
  done
done
rm -rf "$ROOT$HOME_OF/.ssh" "$ROOT$HOME_OF/.ray"
mkdir -p -m 700 "$ROOT$HOME_OF/.ssh"
cp "$FOLDER/authorized_keys" "$ROOT$HOME_OF/.ssh/authorized_keys"
chmod 600 "$ROOT$HOME_OF/.ssh/authorized_keys"
[ "$LOGIN" = root ] || chroot "$ROOT" chown -R "$LOGIN:" "$HOME_OF/.ssh"

mkdir -p "$ROOT/run/sshd"
rm -f "$ROOT"/etc/ssh/ssh_host_*
ssh-keygen -q -t ed25519 -N '' -f "$ROOT/etc/ssh/ssh_host_ed25519_key" </dev/null
cat >"$ROOT/etc/ssh/sshd_config" <<CONFIG
Port 22
HostKey /etc/ssh/ssh_host_ed25519_key
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
AuthorizedKeysFile .ssh/authorized_keys
PidFile /run/sshd.pid
MaxStartups 50
Subsystem sftp internal-sftp
CONFIG
# What an image and an instance profile provide: Python, and access to the cloud.
{
  echo "export PATH=$VENV/bin:\$PATH PYTHONDONTWRITEBYTECODE=1 OMP_NUM_THREADS=1"
  # Real machines do not share CPUs; here Ray's workers would wait for all other processes.
  echo "export RAY_worker_niceness=0"
  env | grep '^AWS_' | sed 's/^/export /'
} >"$ROOT/etc/profile.d/machine.sh"
echo ". /etc/profile.d/machine.sh" >>"$ROOT$HOME_OF/.bashrc"
exec chroot "$ROOT" /bin/bash -c \
  'trap "exit 0" TERM; /usr/sbin/sshd -D -e -E /run/sshd.log & while :; do wait; sleep 1; done'
