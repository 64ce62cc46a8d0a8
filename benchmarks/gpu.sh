#!/usr/bin/env bash
# What waits for a GPU, in order of value; `benchmarks/gpu.sh STEP...` runs steps of gpu.md, each at most ten minutes.
# Needs torch with CUDA; `wheels` installs what lies in the folder wheels/ for those behind it. Nothing is downloaded.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=.:kernels:build/wheels PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
bench() { "$python" -m "benchmarks.$1" --device cuda "${@:2}"; }

wheels() { "$python" -m pip install --quiet --no-index --no-deps --upgrade --target build/wheels wheels/*.whl; }
tests() {
    nvidia-smi
    "$python" -m pytest -q -m gpu tests
    "$python" -m minidit generate "a red circle moves left to right" --output "${OUT:-.}/demo.png"
}
kernels() { bench kernels; }
tune() { bench kernels --tune --shape wan-14b-480p --op pca_attention qk_norm_rope; }
step_1b() { bench step --preset wan2.1-t2v-1.3b --size 832x480 --num-frames 81 --runs 10 --compile; }
step_14b() { bench step --preset wan2.1-t2v-14b --size 832x480 --num-frames 81 --runs 2 --compile; } # ten ways
compile() {
    for cache in none mixcache:eff unicp; do
        bench end_to_end --cache "$cache" --dtype fp32 --compile
    done
}
memory() {
    bench memory --model demo
    bench memory --model wan2.1-t2v-14b --size 832x480
    bench memory --model wan2.1-t2v-1.3b --size 832x480 --tiled
}
profile() {
    bench profile_step --preset wan2.1-t2v-14b --size 832x480
    bench profile_step --preset wan2.1-t2v-14b --size 832x480 --compile
}
mixcache() { bench end_to_end --preset wan2.1-t2v-14b --size 832x480 --steps 8 --runs 1; }
hunyuan() { bench step --preset hunyuan-video --size 960x544 --num-frames 129 --runs 3; }
cogvideox() { bench step --preset cogvideox-5b --runs 10 --compile; }
axes() { # attention within frames and over time
    bench step --preset open-sora-1.2 --size 848x480 --num-frames 51 --runs 10 --compile
    bench step --preset latte-1 --runs 10 --compile
}
# one machine with that many GPUs; not among `all`
scaling() { bench scaling --preset wan2.1-t2v-14b --size 832x480 --num-frames 81 --steps 8 --ranks 1 2 4 8 --runs 1; }
train() { "$python" -m benchmarks.demo_model.train --out "${OUT:-.}/demo_model" --device cuda; }

steps="wheels tests kernels tune step_1b step_14b compile memory profile mixcache hunyuan cogvideox axes train"
[[ ${1:-} == all ]] && set -- $steps
steps+=" scaling"
for step in "${@:-none}"; do
    if [[ " $steps " != *" $step "* ]]; then
        echo "usage: benchmarks/gpu.sh [all|${steps// /|}]..." >&2
        exit 2
    fi
done
for step in "$@"; do "$step"; done
