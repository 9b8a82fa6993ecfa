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
# LOCAL_ADDR  this machine's address for the others; default: the one it reaches HEAD from
# HEARTBEAT  seconds between signs of life; a machine without three of them is lost; default 5
# AGENT  further flags of torchrun
#
# The run goes on from the newest complete checkpoint (--resume), so a restart costs the steps since the last
# --save-every. The disks may be shared or not (docs/multinode.md). Tested with two network namespaces, one of them
# killed and brought back (scripts/bench_multinode.py); on real machines with GPUs it has not been run yet.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
: "${HEAD:?set HEAD to the address of one of the machines}" "${NODES:?set NODES to the number of machines}"
gpus=$(nvidia-smi -L 2>/dev/null | grep -c GPU || true)
port="${PORT:-29400}"
# Is HEAD this machine, and from which address does it reach HEAD? torch asks the host name, which knows one of several
# networks, or none; here whoever may listen at HEAD is it.
read -r is_host address < <(python - "$HEAD" "$port" <<'PYTHON'
import socket, sys
head, port = sys.argv[1], int(sys.argv[2])
with socket.socket() as server, socket.socket(type=socket.SOCK_DGRAM) as probe:
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        server.bind((head, port))
        print(1, head)
    except OSError:
        probe.connect((head, port))
        print(0, probe.getsockname()[0])
PYTHON
)
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# torch 2.11 to 2.13: an agent that comes back waits for a store that is published in the first round only.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
resume=(--resume)
if [ "${SCRIPT:-}" = scripts.preflight ]; then resume=(); fi
exec torchrun --nnodes="$NODES" --nproc_per_node="${GPUS:-$((gpus > 0 ? gpus : 1))}" --max-restarts="${RESTARTS:-100}" \
    --rdzv-backend=c10d --rdzv-id="${RUN_ID:-nanochat}" --rdzv-endpoint="$HEAD:$port" \
    --rdzv-conf="is_host=$is_host,join_timeout=3600,keep_alive_interval=${HEARTBEAT:-5},keep_alive_max_attempt=3" \
    --local-addr="${LOCAL_ADDR:-$address}" ${AGENT:-} \
    -m "${SCRIPT:-scripts.base_train}" -- "${resume[@]}" "$@"
