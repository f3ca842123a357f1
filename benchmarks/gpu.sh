#!/usr/bin/env bash
# What is measured on one GPU, in one command; each part leaves its lines in OUT.
#
#   bash benchmarks/gpu.sh DATA OUT [PART ...]
#
# DATA: a folder with gsm8k/ and svamp/. Parts (default: all): coldstart.
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

for part in "${@:-coldstart}"; do
    "$part" 2>&1 | tee "$OUT/$part.log"
done
