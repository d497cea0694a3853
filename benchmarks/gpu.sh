#!/bin/sh
# All figures of a GPU in one go, on a bare machine with PyTorch and transformers: sh benchmarks/gpu.sh [folder]
#   PYTHON   the interpreter to use (that of .venv, which `make demo` sets up, where it is there; else python3)
#   DEVICE   cuda, or cpu for a scaled-down try of the script itself
# What else it needs it installs from PyPI; where that is out of reach, install what pyproject.toml lists before, from
# wheels that were carried there (pip install --no-index --no-deps), and leave PyTorch and transformers as they are.
# Writes the JSON of every part to the folder (bench-<device>), and after each shape prints the tables of what is there.
# Compiled ticks are left out for the time that compiling takes: latentmas bench --shape Qwen3-4B --compile
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$(ls .venv/bin/python 2>/dev/null || echo python3)}
DEVICE=${DEVICE:-cuda}
OUT=${1:-bench-$DEVICE}
mkdir -p "$OUT"
export HF_HUB_OFFLINE=1

# Versions that are there stay; only what is missing is installed.
if ! why=$("$PYTHON" -c 'import accelerate, psutil, langchain_latentmas.cli, langchain_latentmas.demo' 2>&1); then
    "$PYTHON" -m pip install --quiet -e . || { echo "$why" >&2; exit 1; }
fi
failed=""
echo "overhead" >&2
"$PYTHON" -m benchmarks.overhead --device "$DEVICE" --json >"$OUT/overhead.json" || failed=" overhead"
[ -s "$OUT/overhead.json" ] || rm -f "$OUT/overhead.json"

if [ "$DEVICE" = cpu ]; then
    SHAPES="Qwen3-0.6B"
    SIZES="--rows 1 --positions 64 --repeats 1 --graphs --steps 2 --tokens 3 --concurrent 2 --questions 1"
else
    SHAPES="Qwen3-4B Qwen3-8B"
    SIZES="--rows 1,32 --positions 256,2048 --repeats 5 --questions 1 --concurrent 64 --alone 2"
fi
for shape in $SHAPES; do
    rm -f "$OUT/$shape.json"  # of an earlier run
done
for shape in $SHAPES; do
    echo "$shape" >&2
    # shellcheck disable=SC2086  # options are words
    "$PYTHON" -m langchain_latentmas.cli bench --shape "$shape" --device "$DEVICE" $SIZES --json >"$OUT/$shape.json" ||
        { cat "$OUT/$shape.json" >&2; mv "$OUT/$shape.json" "$OUT/$shape.failed"; failed="$failed $shape"; }
    "$PYTHON" -m benchmarks.summary "$OUT" >"$OUT/summary.txt" || { cat "$OUT/summary.txt" >&2; exit 1; }
    cat "$OUT/summary.txt"
done
[ -z "$failed" ] || { echo "failed:$failed" >&2; exit 1; }
