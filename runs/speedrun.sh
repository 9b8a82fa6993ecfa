#!/usr/bin/env bash
# The main job: from a fresh clone to a chat with your own model, on whatever machine this is.
#
#   bash runs/speedrun.sh            started again after a stop, it goes on where it was
#
# machine                   what runs                                                     time      source
# 8 or more big GPUs        depth 24, fp8, ClimbMix, ratio 8: GPT-2 grade (CORE 0.2565)   ~100 min  published figure
# 1 to 7 GPUs               the largest depth that fits memory and an evening (--hours)   ~5 h      scripts.plan
# CPU or MPS, no GPU        the pocket run: depth 4 on the embedded corpus, no download   ~10 min   dev/bench/
#
# Without a GPU, DATASET=climbmix (or fineweb-edu, or FOLDER) trains on real text instead: hours, by runs/runcpu.sh.
# POCKET=1 forces the pocket run; WANDB_RUN=name logs to wandb; NANOCHAT_BASE_DIR says where everything goes.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(python -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')}"
run="${WANDB_RUN:-dummy}"

# stage NAME COMMAND...: run a stage unless this very command is already done; remember it only when it succeeded
done_dir="$NANOCHAT_BASE_DIR/speedrun"
mkdir -p "$done_dir"
stage() {
    local name=$1
    shift
    if [ -f "$done_dir/$name" ] && [ "$(cat "$done_dir/$name")" = "$*" ]; then
        echo "== $name: done before"
        return
    fi
    echo "== $name: $*"
    "$@"
    printf '%s' "$*" >"$done_dir/$name.tmp"
    mv "$done_dir/$name.tmp" "$done_dir/$name"
}

pocket() {
    # 128 wide, because a small model that reads more beats a larger one that reads less in the same minutes; rates up to
    # twice the defaults, because batches are small and the run is short (dev/LOG.md). Sizes can be set from outside:
    # scripts.bench_recipe_kill runs the same recipe smaller.
    local seed="${SEED:-42}" vocab="${VOCAB:-3072}" chars="${CHARS:-3000000}" save="${SAVE_EVERY:-180}"
    local base="${BASE_STEPS:-1300}" sft="${SFT_STEPS:-640}" rl="${RL_STEPS:-16}" problems="${PROBLEMS:-400}"
    local tokens="${EVAL_TOKENS:-32768}" rl_save="${RL_SAVE_EVERY:-6}"
    stage tok_train python -m scripts.tok_train --dataset=tinyworld --vocab-size="$vocab" --max-chars="$chars"
    stage base_train python -m scripts.base_train --run="$run" --seed="$seed" --model-tag=pocket \
        --depth=4 --aspect-ratio=32 --head-dim=32 --window-pattern=L --max-seq-len=256 --device-batch-size=16 \
        --total-batch-size=4096 --num-iterations="$base" --matrix-lr=0.04 --embedding-lr=0.6 --unembedding-lr=0.012 \
        --scalar-lr=2.64 --weight-decay=0.14 --eval-every=360 --eval-tokens="$tokens" --core-metric-every=-1 \
        --sample-every=540 --save-every="$save" --resume
    stage base_eval python -m scripts.base_eval --model-tag=pocket --eval=bpb,sample --split-tokens="$tokens"
    stage chat_sft python -m scripts.chat_sft --run="$run" --seed="$seed" --model-tag=pocket \
        --num-iterations="$sft" --init-lr-frac=0.6 --eval-every=200 --eval-tokens="$tokens" --chatcore-every=-1 \
        --save-every="$save" --resume
    stage chat_eval_sft python -m scripts.chat_eval -i sft --model-tag=pocket --max-problems="$problems" \
        --max-new-tokens=48
    stage chat_rl python -m scripts.chat_rl --run="$run" --seed="$seed" --model-tag=pocket --num-iterations="$rl" \
        --init-lr-frac=0.2 --max-new-tokens=48 --eval-every=1000 --eval-examples="$problems" --eval-samples=4 \
        --save-every="$rl_save" --resume
    stage chat_eval_rl python -m scripts.chat_eval -i rl --model-tag=pocket --max-problems="$problems" \
        --max-new-tokens=48
    python -m scripts.report --model-tag=pocket
    echo "Done. Talk to it: source .venv/bin/activate && python -m scripts.chat_cli -i rl --model-tag=pocket"
}

gpus() {
    local count=$1 depth=$2 rows=$3 shards=$4
    shift 4
    local launch=(torchrun --standalone "--nproc_per_node=$count" -m)
    stage data_first python -m nanochat.dataset --dataset=climbmix -n 8
    python -m nanochat.dataset --dataset=climbmix -n "$shards" & # the rest arrives while the tokenizer trains
    local download=$!
    trap "kill $download 2>/dev/null || true" EXIT # Ctrl-C does not reach what runs in the background
    stage tok_train python -m scripts.tok_train --dataset=climbmix
    stage tok_eval python -m scripts.tok_eval
    wait "$download"
    trap - EXIT
    stage base_train "${launch[@]}" scripts.base_train -- --run="$run" --depth="$depth" --device-batch-size="$rows" \
        --save-every=1000 --resume "$@"
    stage base_eval "${launch[@]}" scripts.base_eval -- --device-batch-size="$rows"
    stage chat_sft "${launch[@]}" scripts.chat_sft -- --run="$run" --device-batch-size="$rows" --resume
    stage chat_eval_sft "${launch[@]}" scripts.chat_eval -- -i sft
    stage chat_rl "${launch[@]}" scripts.chat_rl -- --run="$run" --num-iterations="${RL_STEPS:-100}" --resume
    stage chat_eval_rl "${launch[@]}" scripts.chat_eval -- -i rl
    python -m scripts.report
    echo "Done. Talk to it: source .venv/bin/activate && python -m scripts.chat_cli -i rl   (or: python -m scripts.chat_web)"
}

count=0
if command -v nvidia-smi >/dev/null; then count=$(nvidia-smi -L 2>/dev/null | grep -c GPU || true); fi
if [ -n "${POCKET:-}" ] || { [ "$count" = 0 ] && [ "${DATASET:-tinyworld}" = tinyworld ]; }; then
    pocket
elif [ "$count" = 0 ]; then
    exec bash runs/runcpu.sh
elif [ "$count" -ge 8 ]; then
    gpus 8 24 16 170 --target-param-data-ratio=8 --fp8
else
    plan="$NANOCHAT_BASE_DIR/speedrun/plan.json"
    python -m scripts.plan --gpus="$count" --hours="${HOURS:-5}" --output="$plan"
    read -r depth rows shards < <(python -c 'import json, sys; p = json.load(open(sys.argv[1])); print(p["depth"], p["device_batch_size"], p["shards"])' "$plan")
    gpus "$count" "$depth" "$rows" "$shards"
fi
