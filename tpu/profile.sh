#!/usr/bin/env bash
# Records what the first machine's chips do for some seconds, while the run goes on, and fetches the record for XProf:
#
#     ZONE=... tpu/profile.sh NAME [SECONDS [FOLDER]]
#
# The run must have been started with hosts.profile_port=9012. `xprof FOLDER/profile` shows the record.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source-path=SCRIPTDIR source=common.sh
. "$here/common.sh"

folder=${2:-.}
mkdir -p "$folder"
resource ssh --worker=0 --node=0 --command="$worker profile ${1:-5}"
gcloud compute tpus queued-resources scp "$name:~/.jaxgpt/profile.tar.gz" "$folder/" --zone="$ZONE" --quiet
tar -xzf "$folder/profile.tar.gz" -C "$folder"
echo "xprof $folder/profile"
