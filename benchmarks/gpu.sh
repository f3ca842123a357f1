#!/usr/bin/env bash
# What is measured on one GPU, in one command; each part leaves its lines in OUT.
#
#   bash benchmarks/gpu.sh DATA OUT [PART ...]
#
# DATA: a folder with gsm8k/ and svamp/. Parts (default: all): attention, decode, rollout,
# coldstart.
set -euo pipefail
DATA="$1" OUT="$2"
shift 2
cd "$(dirname "$0")/.."
mkdir -p "$OUT"
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader > "$OUT/device.txt"

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

# Every way to attend to the cache; model/attention.py names the best for the platform.
attention() {
    python -m benchmarks.attention --capacity=2048 | tee -a "$OUT/attention.jsonl"
    python -m benchmarks.attention --capacity=8192 --layers=8 | tee -a "$OUT/attention.jsonl"
}

# A decoding step, against the bytes that it has to read.
decode() {
    step() { python -m benchmarks.decode --dtype=bfloat16 --new=128 "$@" | tee -a "$OUT/decode.jsonl"; }
    step --model=qwen2.5-1.5b --slots=64 --context=2048
    step --model=qwen2.5-1.5b --slots=256 --context=2048
    step --model=qwen2.5-1.5b --slots=64 --context=8192
    step --model=qwen2.5-0.5b --slots=1 --context=512
}

# Tools of 0.05 to 2 s against instant ones and against the naive loop.
rollout() {
    python -m benchmarks.rollout --model=qwen2.5-1.5b --dtype=bfloat16 --problems=128 --samples=8 \
        --width=64 --slots=512 --median=100 | tee -a "$OUT/rollout.jsonl"
}

[ $# -gt 0 ] || set -- attention decode rollout coldstart
for part; do
    "$part" 2>&1 | tee "$OUT/$part.log"
done
