#!/usr/bin/env bash
# The runs behind docs/PERFORMANCE.md: bash tests/gpu_figures.sh OUTDIR [part ...]
# Parts: stream mixed drive resident all80 (the last takes 150 GB of CPU memory). Without a part: all but all80.
# Stores go to /dev/shm (a stand-in for a fast drive) and to ${DRIVE:-/tmp}; every step has a limit of its own.
set -u
out=${1:?the folder for the results}
shift
drive=${DRIVE:-/tmp}/wsm-figures fast=/dev/shm/wsm-figures
python=${PYTHON:-python3}
mkdir -p "$out"

step() {
  local name=$1 limit=$2 began=$SECONDS
  shift 2
  timeout -s INT -k 10 "$limit" "$python" bench_infer.py "$@" --temperature 0 --ignore-eos \
    --out-json "$out/$name.json" >"$out/$name.log" 2>&1
  echo "$name: exit $?, $((SECONDS - began)) s"
}

shape() { echo "--synthetic Llama-3.1-70B:layers=$1 --gpu-mem-gb 24 --prompt-len ${2:-128}"; }

stream() {
  local flags="--mode stream --cache-dir $drive --max-new-tokens 12 --repeats 3"
  step stream24 100 $(shape 24 2016) $flags
  step stream24_b32 100 $(shape 24) $flags --batch-size 32
}

mixed() {
  local flags="$(shape 16) --mode mixed --cache-dir $fast --max-new-tokens 12"
  flags="$flags --gpu-cached-layers 4 --cpu-cache-layers 10 --prefetch-distance 2"
  step mixed_fast 120 $flags --repeats 3
  WSM_CPU_EVICT=fifo step mixed_fifo 60 $flags --no-probe
  WSM_CPU_ROLLING_MODE=0 step mixed_on_demand 60 $flags --no-probe
  WSM_CPU_WRAP_AROUND=0 step mixed_no_wrap 60 $flags --no-probe
  WSM_AGGRESSIVE_GPU_PREFETCH=1 step mixed_depth1 60 $flags --no-probe --group-prefetch-depth 1
  rm -rf "$fast"
}

drive() {
  step mixed_drive 200 $(shape 8) --mode mixed --cache-dir "$drive" --max-new-tokens 8 \
    --gpu-cached-layers 2 --cpu-cache-layers 4 --prefetch-distance 2
  rm -rf "$drive"
}

resident() {
  for mode in full preload; do
    step "8b_$mode" 60 --synthetic Llama-3.1-8B --mode $mode --prompt-len 128 --repeats 3
    step "70b16_$mode" 60 --synthetic Llama-3.1-70B:layers=16 --mode $mode --prompt-len 128 --repeats 3
  done
}

all80() {
  step stream80 240 --synthetic Llama-3.1-70B --gpu-mem-gb 24 --prompt-len 128 --mode stream --cache-dir "$drive" \
    --gpu-cached-layers 6 --max-new-tokens 8 --repeats 3
}

for part in "${@:-stream mixed drive resident}"; do
  for name in $part; do "$name"; done
done
"$python" bench_infer.py table "$out"/*.json
