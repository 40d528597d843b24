#!/bin/sh
# Trains on several machines without a scheduler. On each of them, with the same arguments:
#
#     HEAD=node-0 MACHINES=4 sh examples/torchrun.sh v2-lite data.source=FOLDER \
#         parallel.replicate=4 training.batch_size=64 training.accumulate=8
#
# HEAD is the machine that all of them reach by name; they meet at its port PORT and may come in any order. The run folder
# and the corpus have to be on a disk that all see, and the arguments have to be the same (it is checked).
set -eu

: "${HEAD:?the name of one of the machines}" "${MACHINES:?how many machines there are}"

# Started anew after a process has died, up to three times; it goes on from the last checkpoint by itself.
exec torchrun \
    --nnodes "$MACHINES" \
    --nproc-per-node "${GPUS:-8}" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$HEAD:${PORT:-29500}" \
    --rdzv-id "${JOB:-abyssal}" \
    --max-restarts 3 \
    -m abyssal train "$@"
