#!/usr/bin/env bash
# A Garage server for one test.
#
#   garage.sh start DIR PORT   starts it in the background on 127.0.0.1:PORT, its data and log in DIR, its process id in DIR/pid, and
#                              prints ENDPOINT=, REGION=, ACCESS_KEY=, SECRET_KEY= and BUCKET= once it answers
#   garage.sh stop DIR         stops it and returns when it is gone
source "$(dirname "$0")/lib.sh"

usage() { die "usage: garage.sh start DIR PORT | garage.sh stop DIR"; }
random_hex() { od -An -N "$1" -tx1 /dev/urandom | tr -d ' \n'; }
# Whether this process is a Garage that runs, rather than one that has ended and waits for somebody to ask how.
is_garage() { [[ $(cat "/proc/$1/stat" 2>/dev/null) == *"(garage) "[!ZX]* ]]; }
listening() { (: >"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

start() {
    local dir=$1 port=$2 garage rpc_port key secret pid
    garage=$(garage)
    [[ -x $garage ]] || die "there is no $garage; run scripts/setup-garage.sh"
    listening "$port" && die "port $port is taken"
    mkdir -p "$dir"
    dir=$(cd "$dir" && pwd)
    # Nodes talk to each other on a port of their own; there is only one node, but no switch to do without.
    rpc_port=$((20000 + RANDOM % 10000))
    while [[ $rpc_port -eq $port ]] || listening "$rpc_port"; do rpc_port=$((20000 + RANDOM % 10000)); done
    key=GK$(random_hex 12)
    secret=$(random_hex 32)
    (umask 077 && cat >"$dir/garage.toml") <<TOML
metadata_dir = "$dir/meta"
data_dir = "$dir/data"
db_engine = "lmdb"
replication_factor = 1
compression_level = "none"
rpc_bind_addr = "127.0.0.1:$rpc_port"
rpc_public_addr = "127.0.0.1:$rpc_port"
rpc_secret = "$(random_hex 32)"
[s3_api]
s3_region = "us-east-1"
api_bind_addr = "127.0.0.1:$port"
root_domain = ".s3.localhost"
TOML
    # None of our files stays open in the server: who started us may wait for our standard output to close.
    GARAGE_DEFAULT_ACCESS_KEY=$key GARAGE_DEFAULT_SECRET_KEY=$secret GARAGE_DEFAULT_BUCKET=test \
        setsid "$garage" -c "$dir/garage.toml" server --single-node --default-bucket </dev/null >"$dir/log" 2>&1 &
    pid=$!
    echo "$pid" >"$dir/pid"
    # It listens before it has made the bucket; the log says when that is done.
    for ((tries = 0; tries < 300; tries++)); do
        if ! kill -0 "$pid" 2>/dev/null; then
            rm -f "$dir/pid"
            tail -n 20 "$dir/log" >&2
            die "Garage stopped while starting"
        fi
        if listening "$port" && "$garage" -c "$dir/garage.toml" bucket info test >/dev/null 2>&1; then
            printf '%s\n' "ENDPOINT=http://127.0.0.1:$port" "REGION=us-east-1" "ACCESS_KEY=$key" "SECRET_KEY=$secret" "BUCKET=test"
            return
        fi
        sleep 0.1
    done
    stop "$dir"
    tail -n 20 "$dir/log" >&2
    die "Garage didn't become ready within 30 seconds"
}

stop() {
    local dir=$1 pid
    [[ -e $dir/pid ]] || return 0
    pid=$(<"$dir/pid")
    # Only if it is still ours: ids are used again. At once, because nobody wants its data any more; an orderly stop takes seconds.
    if is_garage "$pid"; then
        kill -KILL "$pid"
        for ((tries = 0; tries < 500; tries++)); do
            is_garage "$pid" || break
            sleep 0.01
        done
    fi
    rm -f "$dir/pid"
}

case ${1:-} in
start)
    [[ $# -eq 3 ]] || usage
    start "$2" "$3"
    ;;
stop)
    [[ $# -eq 2 ]] || usage
    stop "$2"
    ;;
*) usage ;;
esac
