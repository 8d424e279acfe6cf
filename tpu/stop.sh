#!/usr/bin/env bash
# Ends a run on a TPU and deletes the queued resource, so that it costs nothing more. The run saves its state first:
# tpu/queue.sh with the same command goes on with it.
#
#     ZONE=... tpu/stop.sh NAME
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$here/common.sh"

if [[ -f $state_dir/$name.pid ]]; then
    kill "$(cat "$state_dir/$name.pid")" 2>/dev/null || true # queue.sh would ask for the TPU again
fi
on_all "$worker stop" || echo "stop.sh: no machine answers; deleting all the same" >&2
resource delete --force
