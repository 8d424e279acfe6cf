# Read by the scripts beside it: which queued resource, and how to reach its machines.
# shellcheck shell=bash disable=SC2034

: "${ZONE:?set ZONE to the zone of the TPU, such as us-central1-a}"
name=${1:?"usage: $0 NAME ...: the name of the queued resource is missing"}
shift
state_dir=${XDG_STATE_HOME:-$HOME/.local/state}/jaxgpt
worker='bash ~/jaxgpt/tpu/worker.sh' # on a machine of the TPU

# A verb of gcloud for this resource.
resource() {
    local verb=$1
    shift
    gcloud compute tpus queued-resources "$verb" "$name" --zone="$ZONE" --quiet "$@"
}

# A command on every machine of every slice.
on_all() {
    resource ssh --node=all --worker=all --command="$1"
}
