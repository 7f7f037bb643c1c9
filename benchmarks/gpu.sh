#!/usr/bin/env bash
# Everything that waits for a GPU, in parts of less than 9 minutes each:
#
#   bash benchmarks/gpu.sh [--device cuda|cpu] [--tiny] [--out DIR] [--data DIR] [PART ...]
#
# PART is one of: tests sanitizer dispatch mixtral layer permute lookup model quality; without any, all
# of them run in this order. Results go to DIR (benchmarks/results/gpu) as one csv per part, in which
# every row names the device, and as one log per part. A part that has ended well on this kind of device
# and at this size is not run again: to repeat it, delete DIR/PART.done. --data is the folder that
# `benchmarks.quality.campaign prepare` made; without it, `quality` is left out. --tiny takes sizes of
# seconds and another default for DIR (work/gpu-tiny); with --device cpu it shows that every part still runs.
set -uo pipefail
cd "$(dirname "$0")/.."

device=cuda tiny= out= data=
parts=()
while [ $# -gt 0 ]; do
    case $1 in
        --device) device=$2; shift ;;
        --tiny) tiny=1 ;;
        --out) out=$2; shift ;;
        --data) data=$2; shift ;;
        -*) echo "gpu.sh: unknown option $1; the head of this file lists them" >&2; exit 2 ;;
        *) parts+=("$1") ;;
    esac
    shift
done
[ ${#parts[@]} -gt 0 ] || parts=(tests sanitizer dispatch mixtral layer permute lookup model quality)
python=${PYTHON:-python}
limit=${EVOMOE_PART_SECONDS:-530}
[ -n "$out" ] || out=$([ -n "$tiny" ] && echo work/gpu-tiny || echo benchmarks/results/gpu)
mkdir -p "$out"
out=$(cd "$out" && pwd)
dtype=bfloat16
[ "$device" = cpu ] && dtype=float32

if [ "$device" = cuda ]; then
    "$python" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null ||
        { echo "gpu.sh: torch finds no CUDA device; --device cpu --tiny tries the parts without one" >&2; exit 2; }
fi
setting="$device $([ -n "$tiny" ] && echo tiny || echo full)"
# what a part returns whose tool or data is missing
LEFT_OUT=77
# full size, or the tiny one
size() { [ -n "$tiny" ] && echo "$2" || echo "$1"; }
bench() { "$python" -m "benchmarks.$1" --device "$device" --csv "$out/$part.csv" "${@:2}"; }

tests() { "$python" -m pytest -q -m gpu tests $(size "" --collect-only); }

sanitizer() {
    command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not installed"; return $LEFT_OUT; }
    compute-sanitizer --tool memcheck --error-exitcode 1 "$python" -m pytest -q -m gpu tests/kernels
}

dispatch() {
    local peers
    peers="ours grouped_mm transformers eager"
    [ "$device" = cpu ] || peers="$peers fused"
    bench speed.dispatch --dtype $dtype --tokens $(size 16384 64) --width $(size 1024 32) \
        --hidden $(size 4096 64) --experts $(size "16 64" 4) --routing top1 top2 mix --cases $peers \
        --rounds $(size 11 1) ${SCATTERMOE:+--scattermoe "$SCATTERMOE"}
}

mixtral() {
    bench speed.dispatch --dtype $dtype --tokens $(size 8192 64) --width $(size 4096 32) \
        --hidden $(size 14336 64) --experts $(size 8 4) --routing top2 --cases ours grouped_mm \
        --rounds $(size 11 1)
}

layer() {
    bench speed.moe_layer --dtype $dtype --tokens $(size 16384 64) --width $(size 1024 32) \
        --hidden $(size 4096 64) --experts $(size 16 4) --rounds $(size 11 1)
}

permute() {
    bench speed.permute --dtype $dtype --tokens $(size 16384 64) --width $(size 1024 32) --rounds $(size 51 2)
}

lookup() {
    bench speed.lookup --widths $(size "512 1024 2048" 128) --rows $(size "1 16 256 4096" 64) \
        --bits $(size 8 4) --rounds $(size 21 1)
}

# random words with the frequencies of Zipf's law, binarised in $text
text=$out/text-${setting#* }
text() {
    [ -f "$text/bin/dict.txt" ] && return
    mkdir -p "$text"
    "$python" - "$text/plain" $(size 20000 200) $(size 8000 50) <<'PY'
import random, sys

path, lines, words = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
draw = random.Random(1)
odds = [1 / (i + 1) for i in range(words)]
with open(path, "w", encoding="utf-8") as f:
    for _ in range(lines):
        f.write(" ".join(f"w{i}" for i in draw.choices(range(words), odds, k=draw.randint(5, 60))) + "\n")
PY
    "$(dirname "$(command -v "$python")")/fairseq-preprocess" --only-source --trainpref "$text/plain" \
        --validpref "$text/plain" --destdir "$text/bin" --workers 2 >"$text/log" 2>&1
}

model() {
    text &&
        bench speed.training --task lm --data "$text/bin" --arithmetic $([ "$device" = cpu ] && echo amp || echo float32 amp) \
            --width $(size 512 32) --layers $(size 6 2) --max-tokens $(size 16384 256) --rounds $(size 7 1) \
            --batches $(size 2 1)
}

# four runs side by side, because one small model does not fill a GPU
quality() {
    [ -n "$data" ] || { echo "--data is not given"; return $LEFT_OUT; }
    local failed=0 workers=()
    for _ in $(seq $(size 4 1)); do
        "$python" -m benchmarks.quality.campaign run --stage rates --device "$device" --out "$data" \
            --results "$out" --methods $(size "dense switch evomoe" dense) $(size "" "--updates 2") &
        workers+=($!)
    done
    for worker in "${workers[@]}"; do wait "$worker" || failed=1; done
    return $failed
}

for part in "${parts[@]}"; do
    declare -F "$part" >/dev/null || { echo "gpu.sh: unknown part $part; the head of this file lists them" >&2; exit 2; }
done
status=0
for part in "${parts[@]}"; do
    if [ "$(cat "$out/$part.done" 2>/dev/null)" = "$setting" ]; then
        echo "$part: done before"
        continue
    fi
    start=$SECONDS
    # a process group of its own, so that a part that takes too long ends with all that it started
    (set -m; "$part" >"$out/$part.log" 2>&1 & echo $! >"$out/part.pid"; wait $!) &
    waiting=$!
    (sleep "$limit"; kill -- "-$(cat "$out/part.pid")") 2>/dev/null &
    clock=$!
    wait $waiting
    code=$?
    if [ $code = 0 ]; then
        echo "$setting" >"$out/$part.done"
        echo "$part: done in $((SECONDS - start)) s"
    elif [ $code = $LEFT_OUT ]; then
        echo "$part: left out: $(tail -1 "$out/$part.log")"
    else
        status=1
        echo "$part: failed or over $limit s after $((SECONDS - start)) s; the log is $out/$part.log:"
        tail -5 "$out/$part.log"
    fi
    pkill -P $clock 2>/dev/null
    kill $clock 2>/dev/null
    rm -f "$out/part.pid"
done
exit $status
