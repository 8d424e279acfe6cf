#!/usr/bin/env bash
# Trains on a TPU to the end, through the queue, preemptions and lost connections:
#
#     ZONE=us-central1-a TYPE=v5litepod-16 tpu/queue.sh NAME run configs/FILE.yaml runs=gs://BUCKET/runs
#
# NAME is that of the queued resource; the rest is a command of jaxgpt, which goes on where it was each time it is started.
#   ZONE      zone
#   TYPE      accelerator type (README.md has a table)
#   RUNTIME   image of the machines; by default the one for TYPE
#   CAPACITY  spot (the default), on-demand or reserved
#   SLICES    slices of that type, joined over the data-centre network; 1
#   POLL      seconds between two looks; 30
#   KEEP      1 keeps the resource at the end; it costs until tpu/stop.sh deletes it
# The committed files of this folder's repository are what runs. Exit code: 0 where the run ended well, else 1.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$here/common.sh"

: "${TYPE:?set TYPE to the accelerator type, such as v5litepod-16}"
CAPACITY=${CAPACITY:-spot} SLICES=${SLICES:-1} POLL=${POLL:-30} KEEP=${KEEP:-0}
(($#)) || { echo "queue.sh: no command; such as: run configs/FILE.yaml runs=gs://BUCKET/runs" >&2 && exit 2; }
case $TYPE in
v4-*) generation=v4 image=tpu-ubuntu2204-base ;;
v5litepod-*) generation=v5e image=v2-alpha-tpuv5-lite ;;
v5p-*) generation=v5p image=v2-alpha-tpuv5 ;;
v6e-*) generation=v6e image=v2-alpha-tpuv6e ;;
*) echo "queue.sh: TYPE=$TYPE: expected v4-N, v5litepod-N, v5p-N or v6e-N" >&2 && exit 2 ;;
esac
RUNTIME=${RUNTIME:-$image}
case $CAPACITY in
spot) capacity=(--spot) ;;
on-demand) capacity=() ;;
reserved) capacity=(--reserved) ;;
*) echo "queue.sh: CAPACITY=$CAPACITY: expected spot, on-demand or reserved" >&2 && exit 2 ;;
esac
if ((SLICES > 1)); then nodes=(--node-count="$SLICES" --node-prefix="$name"); else nodes=(--node-id="$name"); fi

LOST=20   # looks in a row without an answer, after which machines count as lost
REFUSED=5 # times in a row that a request, or setting up, may fail
lost=0 refused=0 told=
scratch=$(mktemp -d)
mkdir -p "$state_dir"
echo $$ >"$state_dir/$name.pid" # stop.sh ends this script first, which would ask for the TPU again
trap 'rm -rf "$scratch" "$state_dir/$name.pid"' EXIT

say() {
    [[ $* == "$told" ]] || echo "$(date +%H:%M:%S) $name: $*"
    told=$*
}

# The resource's state in gcloud's words; NONE where there is none, UNKNOWN where that cannot be learned.
state() {
    if resource describe --format='value(state.state)' >"$scratch/out" 2>"$scratch/err"; then
        tr -d '[:space:]' <"$scratch/out"
    elif grep -q 'NOT_FOUND' "$scratch/err"; then
        echo NONE
    else
        echo UNKNOWN
    fi
}

create() {
    if resource create --accelerator-type="$TYPE" --runtime-version="$RUNTIME" "${nodes[@]}" "${capacity[@]}" \
        >"$scratch/out" 2>&1; then
        say "asked for $SLICES x $TYPE ($CAPACITY)"
    else
        refuse "$(tail -n 5 "$scratch/out")"
    fi
}

delete() {
    resource delete --force >"$scratch/out" 2>&1 || say "not deleted yet: $(tail -n 2 "$scratch/out")"
}

refuse() {
    refused=$((refused + 1))
    say "refused ($refused of $REFUSED): $1"
    if ((refused >= REFUSED)); then
        ((KEEP)) || delete
        exit 1
    fi
}

# One word for all machines: new, running, again (to be started once more), failed, finished, or unreachable.
look() {
    if ! on_all "$worker status 2>/dev/null || echo jaxgpt none" >"$scratch/status" 2>"$scratch/err" ||
        ! grep -q '^jaxgpt ' "$scratch/status"; then
        echo unreachable
        return
    fi
    local found
    found=$(grep '^jaxgpt ' "$scratch/status")
    case $found in
    *"jaxgpt none"*) echo new ;;
    *"jaxgpt running"*) echo running ;;
    *"jaxgpt exit 75"* | *"jaxgpt lost"*) echo again ;;
    *) if grep -qv '^jaxgpt exit 0$' <<<"$found"; then echo failed; else echo finished; fi ;;
    esac
}

setup() {
    git -C "$here/.." archive --format=tar.gz --output="$scratch/jaxgpt.tar.gz" HEAD &&
        gcloud compute tpus queued-resources scp "$scratch/jaxgpt.tar.gz" "$name:" --zone="$ZONE" --quiet \
            --node=all --worker=all >"$scratch/out" 2>&1 &&
        on_all 'mkdir -p ~/jaxgpt && tar -xzf jaxgpt.tar.gz -C ~/jaxgpt && bash ~/jaxgpt/tpu/setup_vm.sh tpu' \
            >"$scratch/out" 2>&1
}

start() {
    on_all "$worker start $generation $(printf '%q ' "$@")" >"$scratch/out" 2>&1
}

# Fetches the end of every machine's log to where this script was started.
fetch_logs() {
    on_all "$worker log" >"$name.log" 2>&1 || true
}

work() {
    local seen
    seen=$(look)
    if [[ $seen != unreachable ]]; then lost=0; fi
    case $seen in
    unreachable)
        lost=$((lost + 1))
        say "no answer over ssh ($lost of $LOST)"
        if ((lost >= LOST)); then
            lost=0
            delete
        fi
        ;;
    new)
        say "setting the machines up"
        if setup && start "$@"; then
            say "started"
            refused=0
        else
            refuse "the machines are not set up: $(tail -n 3 "$scratch/out")"
        fi
        ;;
    again)
        say "stopped with its state saved; starting it again"
        start "$@" || say "not started: $(tail -n 3 "$scratch/out")"
        ;;
    running) say "running" ;;
    failed | finished)
        fetch_logs
        say "$seen; the logs are in $name.log"
        ((KEEP)) || delete
        [[ $seen == finished ]] && exit 0
        exit 1
        ;;
    esac
}

while true; do
    current=$(state)
    case $current in
    NONE) create ;;
    ACTIVE) work "$@" ;;
    SUSPENDED)
        say "preempted: asking for it again"
        delete
        ;;
    FAILED)
        delete
        refuse "the request failed"
        ;;
    UNKNOWN) say "no answer from gcloud: $(tail -n 1 "$scratch/err")" ;;
    *) say "$current" ;; # ACCEPTED, WAITING_FOR_RESOURCES, PROVISIONING, SUSPENDING, DELETING ...
    esac
    sleep "$POLL"
done
