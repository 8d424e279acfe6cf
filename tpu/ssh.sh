#!/usr/bin/env bash
# Opens a shell on one machine of a TPU, or runs a command on all of them:
#
#     ZONE=... tpu/ssh.sh NAME [WORKER [SLICE]]
#     ZONE=... tpu/ssh.sh NAME all 'COMMAND'
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$here/common.sh"

if [[ ${1:-0} == all ]]; then
    on_all "${2:?"ssh.sh: the command is missing"}"
else
    resource ssh --worker="${1:-0}" --node="${2:-0}"
fi
