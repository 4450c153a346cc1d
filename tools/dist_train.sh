#!/usr/bin/env bash
# Trains on several GPUs of one or more machines.
# Usage: tools/dist_train.sh CONFIG GPUS [options of tools/train.py]
# Environment: NNODES, NODE_RANK, MASTER_ADDR and PORT as torchrun knows them.
set -euo pipefail

if [ $# -lt 2 ]; then
    sed -n '2,4s/^# //p' "$0" >&2
    exit 2
fi
CONFIG=$1
GPUS=$2

if ! PYTHONPATH="$(dirname "$0")/..${PYTHONPATH:+:$PYTHONPATH}" \
    torchrun \
    --nnodes="${NNODES:-1}" \
    --node_rank="${NODE_RANK:-0}" \
    --nproc_per_node="$GPUS" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --master_port="${PORT:-29500}" \
    "$(dirname "$0")/train.py" "$CONFIG" --launcher pytorch "${@:3}"; then
    # torchrun ends with a traceback of its own.
    echo "$(basename "$0"): the run has failed; the first rank that failed says why, above. Every" \
        'checkpoint is complete: repeat the command with --resume, on as many GPUs as there are.' >&2
    exit 1
fi
