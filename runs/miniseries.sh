#!/usr/bin/env bash
# The miniseries: one compute-optimal model a depth, to compare changes over scales. Results: miniseries.csv from the records.
#
# Hardware: 8 GPUs (NPROC_PER_NODE to change), hours for depths up to 26. DEPTHS="4 6 8" for a quick look.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
ranks="${NPROC_PER_NODE:-8}"
series="${SERIES_NAME:-miniseries}"
for depth in ${DEPTHS:-12 14 16 18 20 22 24 26}; do
    torchrun --standalone --nproc_per_node="$ranks" -m scripts.base_train -- --run="${WANDB_RUN:-dummy}" --depth="$depth" \
        --model-tag="${series}_d$depth" --core-metric-every=999999 --core-metric-max-per-task=-1 --sample-every=-1 \
        --save-every=1000 --resume ${ARGS:-}
done
python -m scripts.series --prefix="${series}_" --output="$NANOCHAT_BASE_DIR/$series.csv"
