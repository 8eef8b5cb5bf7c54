#!/usr/bin/env bash
# The first process of a node, in namespaces of its own. Started by slurm-lab.sh, with LAB and KEEP
# set, as: node-init.sh NAME
set -euo pipefail

name=$1
folder=$LAB/nodes/$name

hostname "$name"
mount --bind "$LAB/etc/hosts" /etc/hosts
: >"$folder/resolv.conf" # no name server: a look-up fails at once
mount --bind "$folder/resolv.conf" /etc/resolv.conf
mount --bind "$LAB/bin-inside" "$LAB/bin" # in here the plain commands do
mount -t tmpfs -o size=4g,mode=1777 tmpfs /dev/shm

# A /tmp and a /root of its own, as on a real cluster: what wrongly takes them for shared is found out.
# Folders below them that do have to be shared are mounted again, at the same place.
private() { # private FOLDER MODE
    local own=$folder$1 kept
    local shared=()
    IFS=: read -r -a shared <<<"$LAB:$KEEP"
    for kept in "${shared[@]}"; do
        if [[ $kept == "$1" ]]; then return; fi # shared as a whole
    done
    mkdir -p "$own"
    chmod "$2" "$own"
    for kept in "${shared[@]}"; do
        if [[ $kept == "$1"/* && -d $kept ]]; then
            mkdir -p "$folder$kept"
            mount --rbind "$kept" "$folder$kept"
        fi
    done
    mount --rbind "$own" "$1"
}
if [[ $name != ctl ]]; then
    private /tmp 1777
    private /root 755 # a Python below /root is for all users of a node
fi

# A pipe that never says anything, to wait by without a child of its own: `ps` would show that.
mkfifo "$folder/never" 2>/dev/null || true
exec 3<>"$folder/never"

ip link set lo up
touch "$folder/ready" # slurm-lab.sh plugs in eth0 now
until [[ -e $folder/wired ]]; do read -r -t 0.02 -u 3 || true; done

if [[ $name != ctl ]]; then slurmd -N "$name" -c; fi # -c: forget an earlier life

# Wait for ever. Bash reaps meanwhile what was orphaned.
while :; do read -r -u 3 || true; done
