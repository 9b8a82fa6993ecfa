#!/usr/bin/env bash
# A run on real text for a machine without a GPU: depth 6, context 512, 5,000 updates. Hours, not minutes.
#
# Hardware: CPU or Apple silicon. Data: ClimbMix when the hub can be reached, or DATASET=tinyworld, or DATASET=FOLDER.
# Published recipe for the same purpose: depth 6, head dim 64, windows L, batch 32 x 512; no score stated.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
dataset="${DATASET:-climbmix}"
if [ "$dataset" = climbmix ] || [ "$dataset" = fineweb-edu ]; then python -m nanochat.dataset --dataset="$dataset" -n 8; fi
python -m scripts.tok_train --dataset="$dataset" --vocab-size=8192 --max-chars=200000000
python -m scripts.tok_eval
python -m scripts.base_train --run="${WANDB_RUN:-dummy}" --depth=6 --head-dim=64 --window-pattern=L --max-seq-len=512 \
    --device-batch-size=32 --total-batch-size=16384 --num-iterations=5000 --eval-every=100 --eval-tokens=524288 \
    --core-metric-every=-1 --sample-every=500 --save-every=500 --resume
python -m scripts.base_eval --device-batch-size=1 --split-tokens=16384 --max-per-task=16
python -m scripts.chat_sft --run="${WANDB_RUN:-dummy}" --num-iterations=1500 --eval-every=200 --eval-tokens=524288 \
    --chatcore-every=-1 --save-every=500 --resume
python -m scripts.report
echo 'Done. Talk to it: source .venv/bin/activate && python -m scripts.chat_cli -p "Why is the sky blue?"'
