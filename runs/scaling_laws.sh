#!/usr/bin/env bash
# Scaling laws: a grid of compute budgets x depths; which depth is best at each budget. Results: CSV from the records.
#
# Hardware: 8 GPUs (NPROC_PER_NODE to change), about a day. FLOPS="1e15" DEPTHS="2 4" DATASET=tinyworld for a quick look.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
ranks="${NPROC_PER_NODE:-8}"
series="${SERIES_NAME:-scaling}"
for flops in ${FLOPS:-1e18 2.15e18 4.64e18 1e19}; do
    for depth in ${DEPTHS:-10 12 14 16 18 20}; do
        torchrun --standalone --nproc_per_node="$ranks" -m scripts.base_train -- --run="${WANDB_RUN:-dummy}" \
            --depth="$depth" --target-flops="$flops" --target-param-data-ratio=10.5 --model-tag="${series}_${flops}_d$depth" \
            --core-metric-every=999999 --core-metric-max-per-task=-1 --sample-every=-1 --save-every=1000 --keep=1 \
            --resume ${ARGS:-}
    done
done
python -m scripts.series --prefix="${series}_" --output="$NANOCHAT_BASE_DIR/$series.csv"
