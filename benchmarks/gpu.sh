#!/usr/bin/env bash
# Everything that waits for a GPU, in order of value; `benchmarks/gpu.sh STEP` runs one step of gpu.md.
# Needs torch with CUDA, and the packages of pyproject.toml; nothing is downloaded.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=.:kernels
python=${PYTHON:-python3}

smoke() {
    nvidia-smi
    "$python" -m pytest -q -m gpu tests
    "$python" -m minidit generate "a red circle moves left to right" --output "${OUT:-.}/demo.mp4"
}
step() {
    "$python" -m benchmarks.step --preset wan2.1-t2v-1.3b --size 832x480 --num-frames 81
    "$python" -m benchmarks.step --preset wan2.1-t2v-14b --size 832x480 --num-frames 81 --runs 3
}
hunyuan() {
    "$python" -m benchmarks.step --preset hunyuan-video --size 960x544 --num-frames 129 --runs 3
}
train() {
    "$python" -m benchmarks.demo_model.train --out "${OUT:-.}/demo_model" --device cuda
}

case "${1:-all}" in
    smoke | step | hunyuan | train) "$1" ;;
    all) smoke && step && hunyuan && train ;;
    *) echo "usage: benchmarks/gpu.sh [smoke|step|hunyuan|train]" >&2 && exit 2 ;;
esac
