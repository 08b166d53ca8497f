#!/usr/bin/env bash
# Runs behind docs/PERFORMANCE.md beside its table (performance.py): bash tests/gpu/figures.sh OUTDIR [part ...]
# Parts: stream short mixed drive resident kv kv_kinds kv_disk kv_drive.
# Without a part: stream mixed drive resident. bench_infer.py compare OUTDIR/A.json OUTDIR/B.json sets two of the results side by side.
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
  step mixed_drive 300 $(shape 8) --mode mixed --cache-dir "$drive" --max-new-tokens 8 --repeats 3 \
    --gpu-cached-layers 2 --cpu-cache-layers 4 --prefetch-distance 2
  rm -rf "$drive"
}

resident() {
  for mode in full preload; do
    step "8b_$mode" 60 --synthetic Llama-3.1-8B --mode $mode --prompt-len 128 --repeats 3
    step "70b16_$mode" 60 --synthetic Llama-3.1-70B:layers=16 --mode $mode --prompt-len 128 --repeats 3
  done
}

short() {
  step stream16 60 $(shape 16) --mode stream --cache-dir $drive --max-new-tokens 12 --repeats 3
}

kv_step() { # NAME [flag ...]; no warm-up: a prefill of these takes 12 s
  local name=$1
  shift
  step "$name" 150 $(shape 16 2016) --mode stream --cache-dir "$drive" --batch-size 128 --max-new-tokens 20 --warmup-rounds 0 \
    --repeats ${REPEATS:-3} "$@"
}

kv_kinds() {
  kv_step kv_topk8
  kv_step kv_topk4 --topk-blk 4
  kv_step kv_int8 --kv-dtype int8
  kv_disk
}

kv_disk() { # KV on tmpfs
  kv_step kv_disk --kv-device /dev/shm/wsm-kv --cpu-mem-gb 24
  rm -f /dev/shm/wsm-kv
  "$python" tests/gpu/kv_summary.py "$out"
}

kv_drive() { # KV on the drive of $DRIVE, which bounds it
  mkdir -p "$drive"
  step kv_drive 240 --synthetic Llama-3.1-70B:layers=4 --mode stream --cache-dir "$drive" --gpu-mem-gb 12.5 \
    --gpu-cached-layers 1 --cpu-mem-gb 5.3 --kv-device "$drive/kv" --batch-size 32 --micro-batch 8 --prompt-len 2016 \
    --max-new-tokens 12 --repeats ${REPEATS:-3}
  "$python" tests/gpu/kv_summary.py "$out"
}

kv() {
  local flags="--gpu-mem-gb 24 --prompt-len 2016 --mode stream --cache-dir $drive --max-new-tokens 32"
  for rows in ${KV_ROWS:-1 8 32 128}; do
    step "kv_b$rows" 150 --synthetic Llama-3.1-70B:layers=16 $flags --batch-size "$rows"
  done
  step kv_b512 150 --synthetic Llama-3.1-70B:layers=4 $flags --batch-size 512 --gpu-cached-layers 1
}

for part in "${@:-stream mixed drive resident}"; do
  for name in $part; do "$name"; done
done
