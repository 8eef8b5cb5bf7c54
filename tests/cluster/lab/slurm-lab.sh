#!/usr/bin/env bash
# A throw-away Slurm cluster on one Linux machine. Every node is a set of namespaces with its own
# address, host name, process table, /tmp, /root and /dev/shm; nothing is reachable from outside.
#
#   slurm-lab.sh up                              start, and say what took how long
#   slurm-lab.sh exec [-u USER] NODE COMMAND...  run in a node (ctl, node1, node2, ...)
#   slurm-lab.sh power-off NODE                  SIGKILL to all of a node, at once
#   slurm-lab.sh power-on NODE                   boot it again
#   slurm-lab.sh cut NODE | mend NODE            its network cable
#   slurm-lab.sh kill-slurmd NODE                the daemon only: its jobs go on
#   slurm-lab.sh start-slurmd NODE
#   slurm-lab.sh ps NODE                         "PID COMMAND" of all but the lab's own daemons
#   slurm-lab.sh repair                          every node on, its cable in, its daemon running
#   slurm-lab.sh status
#   slurm-lab.sh down                            end all of it, and remove the folder
#
# $LAB/bin has sbatch, srun, squeue, ... that work from outside: put it first on PATH.
# Needs root. Settings, read by `up` from the environment and kept for the other verbs:
#
#   LAB             the folder of everything; short, as UNIX sockets lie in it [/tmp/slurm-lab]
#   LAB_NODES       how many nodes [3]
#   LAB_CPUS        CPUs of a node, declared and not checked [2]
#   LAB_MEMORY      MB of a node, likewise [4000]
#   LAB_GPUS        fake GPUs of a node [2]
#   LAB_ACCOUNTING  db: slurmdbd on MariaDB; shim: a stand-in for sacct [db]
#   LAB_KEEP        folders below /tmp and /root that nodes share with the machine, a:b:c [none]
#   LAB_OWNER       a pid: the lab goes down when that process has ended, however it did [none]
set -euo pipefail

LAB=${LAB:-/tmp/slurm-lab}
NODES=${LAB_NODES:-3}
CPUS=${LAB_CPUS:-2}
MEMORY=${LAB_MEMORY:-4000}
GPUS=${LAB_GPUS:-2}
ACCOUNTING=${LAB_ACCOUNTING:-db}
KEEP=${LAB_KEEP:-}
OWNER=${LAB_OWNER:-}
SUBNET=10.213.0
COMMANDS=(sbatch salloc srun squeue scancel scontrol sacct sacctmgr sinfo sattach sstat)

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
settings=$LAB/etc/settings # its presence says that the folder is a lab
if [[ -e $settings ]]; then
    # shellcheck disable=SC1090
    source "$settings"
fi
export LAB KEEP
export SLURM_CONF=$LAB/etc/slurm.conf MYSQL_UNIX_PORT=$LAB/run/db.sock
export PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

fail() {
    echo "slurm-lab: $1" >&2
    # The folder may be gone before somebody can look: say what the daemon said.
    if [[ -n ${2:-} && -e $2 ]]; then tail -n 20 "$2" >&2; fi
    exit 1
}

wait_for() { # wait_for SECONDS COMMAND...: poll until the command succeeds
    local end=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        ((SECONDS <= end)) || return 1
        sleep 0.05
    done
}

since=${EPOCHREALTIME/[.,]/}
took() { # took WHAT: the time since the last call
    local now=${EPOCHREALTIME/[.,]/}
    printf '%-12s %5d ms\n' "$1" $(((now - since) / 1000))
    since=$now
}

# --- processes, seen from outside ---------------------------------------------------------------

ours() { # ours PID: it was started by this lab, and is no stranger with a recycled pid
    grep -qzxF "LAB=$LAB" "/proc/$1/environ" 2>/dev/null
}

pid_of() { # the first process of a node that is on
    local pid
    [[ -e $LAB/nodes/$1/pid ]] || return 1
    pid=$(<"$LAB/nodes/$1/pid")
    [[ -n $pid ]] && ours "$pid" && echo "$pid"
}

known() {
    [[ $1 == ctl || ($1 =~ ^node([0-9]+)$ && ${BASH_REMATCH[1]} -ge 1 && ${BASH_REMATCH[1]} -le $NODES) ]] ||
        fail "no node '$1': there are ctl and node1 to node$NODES"
}

first_processes() { # of a node, also of one whose boot was interrupted: its PID 1, and the unshare around it
    local pid
    for pid in $(pgrep -f "node-init[.]sh $1\$"); do
        if ours "$pid"; then echo "$pid"; fi
    done
}

enter() { # enter NODE COMMAND...: join all of a node's namespaces
    local pid
    pid=$(pid_of "$1") || fail "$1 is off"
    shift
    nsenter -t "$pid" -m -u -i -n -p "$@"
}

execute() { # execute [-u USER] NODE COMMAND...
    local user="" node
    if [[ ${1:-} == -u ]]; then
        user=$2
        shift 2
    fi
    (($# >= 2)) || fail "exec [-u USER] NODE COMMAND..."
    node=$1
    shift
    known "$node"
    local as=()
    if [[ -n $user ]]; then
        local home=$LAB/home/$user
        install -d -o "$user" -g "$(id -g "$user")" -m 700 "$home"
        as=(setpriv --reuid="$user" --regid="$(id -g "$user")" --clear-groups
            env HOME="$home" USER="$user" LOGNAME="$user")
    fi
    # In the caller's folder, where the node has it and the user may go there.
    # shellcheck disable=SC2016
    enter "$node" "${as[@]}" sh -c 'cd "$0" 2>/dev/null || cd /; exec "$@"' "$PWD" "$@"
}

processes() {
    # Not its first process, not slurmd (but what slurmd starts), not this ps, and nothing dead.
    enter "$1" ps -e -ww -o pid=,ppid=,stat=,args= | awk '
        $1 == 1 || $3 ~ /^Z/ { next }
        $2 == 1 && $4 ~ /(^|\/)slurmd$/ { next }
        $2 == 0 && $4 == "ps" { next }
        { pid = $1; sub(/^ *[0-9]+ +[0-9]+ +[^ ]+ +/, ""); print pid, $0 }'
}

# --- nodes --------------------------------------------------------------------------------------

boot() { # boot NODE: the namespaces, then a cable to the bridge in ctl
    local name=$1 folder=$LAB/nodes/$1 outer pid
    if pid_of "$name" >/dev/null; then return; fi
    mkdir -p "$folder/spool"
    rm -f "$folder"/{ready,wired,pid}
    setsid unshare -n -u -i -m -p -f --mount-proc --kill-child \
        bash "$here/node-init.sh" "$name" >"$LAB/log/$name.log" 2>&1 </dev/null &
    outer=$!
    wait_for 20 test -e "$folder/ready" || fail "$name does not boot:" "$LAB/log/$name.log"
    pid=$(pgrep -P "$outer")
    echo "$pid" >"$folder/pid"
    if [[ $name == ctl ]]; then
        nsenter -t "$pid" -n ip -batch - <<END
link add br0 type bridge
addr add $SUBNET.1/24 dev br0
link set br0 up
END
    else
        # The cable of an earlier life goes with its namespace, but not at once.
        in_ctl ip link del "v-$name" 2>/dev/null || true
        in_ctl ip link add "v-$name" type veth peer name eth0 netns "$pid"
        in_ctl ip link set "v-$name" master br0 up
        # The default route leads nowhere. Programs that ask the kernel which of their addresses
        # faces the world (Ray does) get that of eth0 by it, and not 127.0.0.1.
        nsenter -t "$pid" -n ip -batch - <<END
addr add $SUBNET.$((10 + ${name#node}))/24 dev eth0
link set eth0 up
route add default via $SUBNET.1
END
    fi
    touch "$folder/wired"
}

in_ctl() {
    local pid
    pid=$(pid_of ctl) || fail "the lab in $LAB is not up"
    nsenter -t "$pid" -n "$@"
}

in_network() { # all processes of a network namespace; a zombie is in none
    { find /proc/[0-9]*/ns/net -lname "${1//[][]/?}" 2>/dev/null || true; } | cut -d/ -f3
}

off() { # off NODE: SIGKILL to its first process, which ends all of its PID namespace
    local pid network="" pids
    pids=$(first_processes "$1")
    # Commands that joined only a node's network ($LAB/bin/srun) live outside its PID namespace.
    if pid=$(pid_of "$1") && network=$(readlink "/proc/$pid/ns/net"); then
        pids+=" $(in_network "$network")"
    fi
    for pid in $pids; do kill -KILL "$pid" 2>/dev/null || true; done
    empty() { [[ -z $(first_processes "$1") && (-z $network || -z $(in_network "$network")) ]]; }
    wait_for 20 empty "$1" || echo "slurm-lab: of $1 some processes linger" >&2
    rm -f "$LAB/nodes/$1/pid"
}

slurmd_pid() { # inside the node
    enter "$1" pgrep -o -x slurmd
}

start_slurmd() { # without -c: it finds the jobs that went on
    if ! slurmd_pid "$1" >/dev/null; then enter "$1" slurmd -N "$1"; fi
}

mend() {
    in_ctl ip link set "v-$1" up
    # By itself slurmd would register only within a minute.
    local pid
    if pid=$(slurmd_pid "$1"); then enter "$1" kill -HUP "$pid"; fi
}

repair() {
    local i
    for ((i = 1; i <= NODES; i++)); do
        if pid_of "node$i" >/dev/null; then
            start_slurmd "node$i"
            mend "node$i"
        else
            boot "node$i"
        fi
    done
}

# --- the whole ----------------------------------------------------------------------------------

configure() {
    local i names="" addresses="" gres="" accounting
    mkdir -p "$LAB"/{etc,run,log,state,db,bin,bin-inside,shared,home,nodes}
    install -d -m 700 "$LAB/home/root"
    chmod 755 "$LAB" "$LAB/run"
    declare -p NODES CPUS MEMORY GPUS ACCOUNTING KEEP >"$settings"
    (umask 077 && head -c 128 /dev/urandom >"$LAB/etc/munge.key")

    for ((i = 1; i <= NODES; i++)); do
        names+="$SUBNET.$((10 + i)) node$i"$'\n'
        addresses+=,$SUBNET.$((10 + i))
    done
    printf '127.0.0.1 localhost\n%s.1 ctl\n%s' "$SUBNET" "$names" >"$LAB/etc/hosts"

    : >"$LAB/etc/gres.conf"
    if ((GPUS > 0)); then
        # With a File, and only then, Slurm hands out indices: CUDA_VISIBLE_DEVICES. /dev/null's number does.
        gres=Gres=gpu:$GPUS
        for ((i = 0; i < GPUS; i++)); do mknod "$LAB/etc/gpu$i" c 1 3; done
        echo "NodeName=node[1-$NODES] Name=gpu File=$LAB/etc/gpu[0-$((GPUS - 1))]" >"$LAB/etc/gres.conf"
    fi

    if [[ $ACCOUNTING == db ]]; then
        accounting="AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=$SUBNET.1
AccountingStoragePort=16819
AccountingStoragePass=socket=$LAB/run/munge.socket
AccountingStorageTRES=gres/gpu
AccountingStorageEnforce=associations"
        (umask 077 && cat >"$LAB/etc/slurmdbd.conf") <<END
AuthType=auth/munge
AuthInfo=socket=$LAB/run/munge.socket
DbdHost=ctl
DbdPort=16819
SlurmUser=root
LogFile=$LAB/log/slurmdbd.log
PidFile=$LAB/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct
END
    else
        accounting=AccountingStorageType=accounting_storage/none
    fi

    local conf
    conf=$(<"$here/slurm.conf.in")
    conf=${conf//@LAB@/$LAB}
    conf=${conf//@SUBNET@/$SUBNET}
    conf=${conf//@NODES@/$NODES}
    conf=${conf//@ADDRESSES@/${addresses#,}}
    conf=${conf//@CPUS@/$CPUS}
    conf=${conf//@MEMORY@/$MEMORY}
    conf=${conf//@GRES@/$gres}
    conf=${conf//@ACCOUNTING@/$accounting}
    echo "$conf" >"$SLURM_CONF"

    # From outside only the network and the host name of ctl are joined: no fork, so signals and
    # the working folder pass through as usual.
    local command
    for command in "${COMMANDS[@]}"; do
        cat >"$LAB/bin/$command" <<END
#!/bin/sh
export SLURM_CONF=$SLURM_CONF
exec nsenter -t "\$(cat $LAB/nodes/ctl/pid)" -n -u -- /usr/bin/$command "\$@"
END
        chmod 755 "$LAB/bin/$command"
    done
    if [[ $ACCOUNTING == shim ]]; then
        install -m 755 "$here/sacct-shim.py" "$LAB/bin/sacct"
        install -m 755 "$here/sacct-shim.py" "$LAB/bin-inside/sacct"
    fi
}

start_accounting() {
    enter ctl mariadb-install-db --no-defaults --user=root --datadir="$LAB/db" --skip-test-db --skip-name-resolve \
        --auth-root-authentication-method=socket --innodb-log-file-size=8M >"$LAB/log/db-install.log" 2>&1 ||
        fail "no database:" "$LAB/log/db-install.log"
    took db-install
    enter ctl setsid mariadbd --no-defaults --user=root --datadir="$LAB/db" --socket="$MYSQL_UNIX_PORT" \
        --pid-file="$LAB/run/db.pid" --skip-networking --performance-schema=OFF --innodb-log-file-size=8M \
        --innodb-buffer-pool-size=64M --innodb-flush-log-at-trx-commit=0 --innodb-lock-wait-timeout=900 \
        --log-error="$LAB/log/db.log" >/dev/null 2>&1 </dev/null &
    wait_for 60 enter ctl mariadb-admin --no-defaults -S "$MYSQL_UNIX_PORT" ping ||
        fail "MariaDB does not start:" "$LAB/log/db.log"
    took mariadbd
    enter ctl slurmdbd
    wait_for 60 enter ctl timeout 5 sacctmgr -n show cluster ||
        fail "slurmdbd does not start:" "$LAB/log/slurmdbd.log"
    # Whoever has no association may not submit: `--account=nosuch` is refused as at a real site.
    {
        enter ctl sacctmgr -i add cluster lab
        enter ctl sacctmgr -i add account ddsweep
        enter ctl sacctmgr -i add user root account=ddsweep
    } >"$LAB/log/sacctmgr.log" 2>&1 || fail "no accounts:" "$LAB/log/sacctmgr.log"
    took slurmdbd
}

all_idle() {
    [[ $("$LAB/bin/sinfo" -h -N -p main -o %T | grep -cx idle) == "$NODES" ]]
}

up() {
    ((EUID == 0)) || fail "needs root"
    [[ $LAB == /* ]] || fail "LAB must be an absolute path"
    if [[ -e $LAB && -n $(ls -A "$LAB") ]]; then fail "$LAB is not empty"; fi
    local i start=$since
    configure
    if [[ -n $OWNER ]]; then
        setsid bash "$here/slurm-lab.sh" watch "$OWNER" >"$LAB/log/watch.log" 2>&1 </dev/null &
        echo $! >"$LAB/run/watch.pid"
    fi
    boot ctl
    enter ctl munged --force --key-file="$LAB/etc/munge.key" --socket="$LAB/run/munge.socket" \
        --pid-file="$LAB/run/munged.pid" --log-file="$LAB/log/munged.log" \
        --seed-file="$LAB/run/munge.seed" --num-threads=10
    took ctl
    if [[ $ACCOUNTING == db ]]; then start_accounting; fi
    enter ctl slurmctld -c
    for ((i = 1; i <= NODES; i++)); do boot "node$i"; done
    wait_for 60 all_idle || fail "the nodes do not come up:" "$LAB/log/slurmctld.log"
    took nodes
    since=$start
    took total
}

down() {
    [[ -e $settings ]] || return 0 # no lab, or a folder that `up` did not make
    set +e # whatever goes wrong, go on to the end
    local pid i
    if [[ -e $LAB/run/watch.pid ]]; then
        pid=$(<"$LAB/run/watch.pid")
        if [[ $pid != "$$" ]] && ours "$pid"; then kill -KILL -- "-$pid" 2>/dev/null || true; fi
    fi
    for ((i = 1; i <= NODES; i++)); do off "node$i"; done
    off ctl
    rm -rf --one-file-system "$LAB"
}

status() {
    local folder name pid
    for folder in "$LAB"/nodes/*/; do
        name=$(basename "$folder")
        if pid=$(pid_of "$name"); then echo "$name on (pid $pid)"; else echo "$name off"; fi
    done
    if pid_of ctl >/dev/null; then "$LAB/bin/sinfo" -N -l; fi
}

verb=${1:-}
(($# == 0)) || shift
case $verb in
power-off | power-on | cut | mend | kill-slurmd | start-slurmd | ps)
    (($# == 1)) || fail "$verb NODE"
    known "$1"
    ;;
esac
case $verb in
up) up ;;
down) down ;;
exec) execute "$@" ;;
power-off) off "$1" ;;
power-on) boot "$1" ;;
cut) in_ctl ip link set "v-$1" down ;;
mend) mend "$1" ;;
kill-slurmd) enter "$1" kill -KILL "$(slurmd_pid "$1")" ;;
start-slurmd) start_slurmd "$1" ;;
ps) processes "$1" ;;
repair) repair ;;
status) status ;;
watch) # started by `up`
    tail --pid="$1" -f /dev/null
    down
    ;;
*)
    sed -n '2,/^set -/{/^set -/d; s/^# \{0,1\}//; p}' "$here/slurm-lab.sh"
    exit 2
    ;;
esac
