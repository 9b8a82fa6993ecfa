#!/usr/bin/env bash
# Pretraining on several machines. Start this on every one of them; whichever dies is started again by the same line.
#
#   HEAD=10.0.0.1 NODES=2 bash runs/multinode.sh --depth=24                       # on both machines
#   HEAD=10.0.0.1 NODES=2 SCRIPT=scripts.preflight bash runs/multinode.sh         # can they talk, and how fast?
#   HEAD=10.0.0.1 NODES=2 SCRIPT=scripts.chat_sft bash runs/multinode.sh --model-tag=d24
#
# HEAD   address of the machine at which all meet (one of them: it must outlive the others, or all are started again)
# NODES  how many machines            GPUS  processes on this one; default: its GPUs, or 1
# PORT   29400                        RESTARTS  how often workers are started again; default 100
#
# The run goes on from the newest complete checkpoint (--resume), so a restart costs the steps since the last
# --save-every. The disks may be shared or not (docs/multinode.md). Tested with two network namespaces, one of them
# killed and brought back (scripts/bench_multinode.py); on real machines with GPUs it has not been run yet.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
: "${HEAD:?set HEAD to the address of one of the machines}" "${NODES:?set NODES to the number of machines}"
gpus=$(nvidia-smi -L 2>/dev/null | grep -c GPU || true)
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# torch 2.11 to 2.13: an agent that comes back waits for a store that is published in the first round only.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
resume=(--resume)
if [ "${SCRIPT:-}" = scripts.preflight ]; then resume=(); fi
exec torchrun --nnodes="$NODES" --nproc_per_node="${GPUS:-$((gpus > 0 ? gpus : 1))}" --max-restarts="${RESTARTS:-100}" \
    --rdzv-backend=c10d --rdzv-id="${RUN_ID:-nanochat}" --rdzv-endpoint="$HEAD:${PORT:-29400}" \
    --rdzv-conf=join_timeout=3600,keep_alive_interval=5,keep_alive_max_attempt=3 \
    ${LOCAL_ADDR:+--local-addr="$LOCAL_ADDR"} ${RDZV_EXTRA:-} \
    -m "${SCRIPT:-scripts.base_train}" -- "${resume[@]}" "$@"
