#!/usr/bin/env bash
# Follows what the run prints on one machine of a TPU; the first one speaks, the others only where something is wrong:
#
#     ZONE=... tpu/logs.sh NAME [WORKER [SLICE]]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$here/common.sh"

resource ssh --worker="${1:-0}" --node="${2:-0}" --command="$worker follow"
