#!/usr/bin/env bash
# What is measured on one GPU, in one command:
#
#   bash benchmarks/gpu.sh [PART ...]
#
# Parts: tests, attention, decode, rollout, train, coldstart, study. The default is all but the
# last, and coldstart only with DATA=FOLDER, a folder with gsm8k/ and svamp/, which both need.
# Every line that a part prints goes to benchmarks/results/DEVICE.jsonl with the date; logs and
# runs to OUT (default: runs/gpu).
set -euo pipefail
cd "$(dirname "$0")/.."
OUT="${OUT:-runs/gpu}"
mkdir -p "$OUT"
DEVICE=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -1 | tr ' ' '-' | tr 'A-Z' 'a-z')
RESULTS="benchmarks/results/$DEVICE.jsonl"

# Keep a JSON line, with the date.
keep() { sed "s/^{/{\"date\": \"$(date +%F)\", /" | tee -a "$RESULTS"; }

# The kernels that only a GPU can run, against the reference.
tests() { python -m pytest tests/model/test_attention.py -k gpu; }

# Every way to attend, to the cache and in training; model/attention.py names the best.
attention() {
    python -m benchmarks.attention --capacity=2048 | keep
    python -m benchmarks.attention --capacity=8192 --layers=8 | keep
    python -m benchmarks.attention --training | keep
}

# A decoding step, against the bytes that it has to read. Bars on an H100: 3.2 ms and 2.1 TB/s;
# 2.3 TB/s; 2.6 TB/s; 1.0 ms.
decode() {
    step() { python -m benchmarks.decode --dtype=bfloat16 --new=128 "$@" | keep; }
    step --model=qwen2.5-1.5b --slots=64 --context=2048
    step --model=qwen2.5-1.5b --slots=256 --context=2048
    step --model=qwen2.5-1.5b --slots=64 --context=8192
    step --model=qwen2.5-0.5b --slots=1 --context=512
}

# Tools of 0.05 to 2 s against instant ones and against the naive loop.
rollout() {
    python -m benchmarks.rollout --model=qwen2.5-1.5b --dtype=bfloat16 --problems=128 --samples=8 \
        --width=64 --slots=512 --median=100 | keep
}

# An update. Bars on an H100: 48% MFU; 40,000 tokens/s; the third has to run.
train() {
    update() { python -m benchmarks.train --dtype=bfloat16 --rounds=5 "$@" | keep; }
    for remat in none matmuls full; do
        update --model=qwen2.5-1.5b --tokens=32768 --row_tokens=4096 --median=2000 \
            --micro_rows=4 --unroll=28 --remat=$remat || true
    done
    update --model=qwen3-0.6b --tokens=65536 --row_tokens=16384 --median=6000 --micro_rows=1 \
        --unroll=28 --remat=matmuls
    update --model=qwen2.5-7b --tokens=16384 --row_tokens=4096 --median=2000 --micro_rows=1 \
        --remat=full --lora=32
    python -m benchmarks.memory --model=qwen2.5-1.5b --dtype=bfloat16 | keep
}

# Three epochs of SmolLM2-135M on GSM8K's traces; then both benchmarks, greedy and 8 samples at
# temperature 1. To compare with: 90 s of training in PyTorch (batch 64, lr 3e-4, cosine), then
# greedy SVAMP 11%, GSM8K 8.7%, and 24-33% of the problems with right and wrong samples.
coldstart() {
    python -m gtpo_jax.tasks.coldstart --task=gsm8k --path="$DATA/gsm8k" --out="$OUT/traces.jsonl"
    python -m gtpo_jax.sft --config=configs/smollm2_gsm8k.py --workdir="$OUT/sft" \
        --config.sft.path="$OUT/traces.jsonl" --config.task.path="$DATA/gsm8k"
    python -m gtpo_jax.evaluate --config=configs/smollm2_gsm8k.py --workdir="$OUT/sft" \
        --benchmarks=svamp,gsm8k --data="$DATA" --samples=8 --temperature=1.0
}

# GRPO and GTPO from one cold start, three seeds each, in pieces of 8 minutes: after each, what is
# there is saved, and the same command goes on.
study() {
    python -m experiments.run --study=overhead --preset=smollm2 --seeds=3 --data="$DATA" \
        --root="$OUT/experiments" --minutes=8
    python -m experiments.report --study=overhead --preset=smollm2 --root="$OUT/experiments"
}

[ $# -gt 0 ] || set -- tests attention decode rollout train ${DATA:+coldstart}
for part; do
    "$part" 2>&1 | tee "$OUT/$part.log"
done
