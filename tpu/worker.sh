#!/usr/bin/env bash
# Runs on each machine of a TPU: starts a command of jaxgpt that outlives the connection, and tells how it stands.
#
#     worker.sh start GENERATION COMMAND...   | status | log | follow | stop | profile SECONDS
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PATH=$HOME/.local/bin:$PATH
home=$HOME/.jaxgpt
log=$home/log
mkdir -p "$home"

pid() { cat "$home/pid" 2>/dev/null || true; }
alive() { [[ -n $(pid) ]] && kill -0 "$(pid)" 2>/dev/null; }

# Asks the run to save and end, and waits for that.
stop() {
    if alive; then
        kill -TERM -- "-$(pid)"
        for _ in $(seq 600); do
            alive || break
            sleep 1
        done
        if alive; then kill -KILL -- "-$(pid)"; fi
    fi
}

case ${1:?"usage: worker.sh start|status|log|follow|stop|profile"} in
start)
    generation=$2
    shift 2
    stop
    rm -f "$home/exit"
    if [[ -f tpu/flags/$generation.env ]]; then
        set -a
        # shellcheck source=/dev/null
        . "tpu/flags/$generation.env"
        set +a
    fi
    # shellcheck disable=SC2016 # expanded by the shell that is started
    setsid nohup bash -c 'trap : TERM; code=0; "$@" || code=$?; echo "$code" >"$HOME/.jaxgpt/exit"' run .venv/bin/jaxgpt "$@" \
        >>"$log" 2>&1 </dev/null &
    echo $! >"$home/pid"
    ;;
status)
    if alive; then
        echo "jaxgpt running"
    elif [[ -f $home/exit ]]; then
        echo "jaxgpt exit $(cat "$home/exit")"
    elif [[ -f $home/pid ]]; then
        echo "jaxgpt lost" # the machine was started anew
    else
        echo "jaxgpt none"
    fi
    ;;
log) echo "== $(hostname)" && tail -n 200 "$log" ;;
follow) exec tail -n 50 -F "$log" ;;
stop) stop ;;
profile)
    # hosts.profile_port of the run is where it answers
    uv pip install --quiet xprof
    .venv/bin/python -m jax.collect_profile --log_dir="$home/profile" --no_perfetto_link \
        "${PROFILE_PORT:-9012}" "$(($2 * 1000))"
    tar -czf "$home/profile.tar.gz" -C "$home" profile
    ;;
*) echo "worker.sh: no such thing: $1" >&2 && exit 2 ;;
esac
