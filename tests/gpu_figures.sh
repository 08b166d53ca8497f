#!/usr/bin/env bash
# The runs behind docs/LOG.md's GPU figures: bash tests/gpu_figures.sh OUTDIR (one GPU, 128 GiB of memory, about 8 minutes).
# Stores go to /dev/shm (a stand-in for a fast drive) and to ${DRIVE:-/tmp}; every step has a limit of its own.
set -u
out=${1:?the folder for the results}
drive=${DRIVE:-/tmp}/wsm-figures fast=/dev/shm/wsm-figures
python=${PYTHON:-python3}
mkdir -p "$out"

step() {
  local name=$1 limit=$2
  shift 2
  timeout -s INT -k 10 "$limit" "$python" bench_infer.py "$@" --temperature 0 --ignore-eos \
    --out-json "$out/$name.json" >"$out/$name.log" 2>&1
  echo "$name: exit $?"
}

shape() { echo "--synthetic Llama-3.1-70B:layers=$1 --gpu-mem-gb 24"; }
stream="--mode stream --cache-dir $drive"
step stream16 80 $(shape 16) $stream --prompt-len 128
step stream24 90 $(shape 24) $stream --prompt-len 2016 --max-new-tokens 12 --repeats 3
step stream24_b32 90 $(shape 24) $stream --prompt-len 128 --batch-size 32 --max-new-tokens 12 --repeats 3
step mixed_drive 200 $(shape 8) --mode mixed --cache-dir "$drive" --prompt-len 128 --max-new-tokens 8 \
  --gpu-cached-layers 2 --cpu-cache-layers 4 --prefetch-distance 2
mixed="$(shape 16) --mode mixed --cache-dir $fast --prompt-len 128 --max-new-tokens 12"
mixed="$mixed --gpu-cached-layers 4 --cpu-cache-layers 10 --prefetch-distance 2"
step mixed_fast 120 $mixed --repeats 3
WSM_CPU_EVICT=fifo step mixed_fifo 60 $mixed
WSM_CPU_ROLLING_MODE=0 step mixed_on_demand 60 $mixed
WSM_CPU_WRAP_AROUND=0 step mixed_no_wrap 60 $mixed
WSM_CPU_ROLL_SYNC=0 step mixed_no_sync 60 $mixed
step mixed_depth2 60 $mixed --group-prefetch-depth 2
rm -rf "$fast" "$drive"
for mode in full preload; do
  step "8b_$mode" 60 --synthetic Llama-3.1-8B --mode $mode --prompt-len 128 --repeats 3
  step "70b16_$mode" 60 --synthetic Llama-3.1-70B:layers=16 --mode $mode --prompt-len 128 --repeats 3
done
"$python" bench_infer.py table "$out"/*.json
