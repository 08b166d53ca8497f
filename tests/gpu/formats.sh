#!/usr/bin/env bash
# The runs by weight format behind docs/LOG.md and docs/PERFORMANCE.md: bash tests/gpu/formats.sh OUTDIR [part ...]
# Parts: int4_80_batch exact24 resident prefill drive calibrate; without one: exact24. 80 layers at B=1 are rows of performance.py.
# bench_infer.py compare OUTDIR/A.json OUTDIR/B.json sets two results side by side. Stores go to ${DRIVE:-/tmp}; every step has a limit of its own.
set -u
out=${1:?the folder for the results}
shift
drive=${DRIVE:-/tmp}/wsm-formats
python=${PYTHON:-python3}
mkdir -p "$out" "$drive"

step() {
  local name=$1 limit=$2 began=$SECONDS
  shift 2
  timeout -s INT -k 10 "$limit" "$python" bench_infer.py "$@" --quiet --temperature 0 --cache-dir "$drive" \
    --out-json "$out/$name.json" >"$out/$name.log" 2>&1
  echo "$name: exit $?, $((SECONDS - began)) s"
}

int4_80_batch() { # 80 layers of the 70B shape, with a batch's KV on the GPU
  local flags="--synthetic Llama-3.1-70B --weight-format int4 --mode stream --gpu-mem-gb 24 --auto --repeats 3"
  step int4_80_b16 100 $flags --embedding cpu --prompt-len 480 --max-new-tokens 32 --batch-size 16
  step int4_80_b32 120 $flags --embedding cpu --prompt-len 480 --max-new-tokens 32 --batch-size 32
}

exact24() { # as many residents in both formats
  local flags="--synthetic Llama-3.1-70B:layers=24 --mode stream --gpu-mem-gb 24 --max-new-tokens 12 --repeats 3"
  for format in auto exact; do
    step ${format}24_b1 90 $flags --weight-format $format --prompt-len 2016
    step ${format}24_b32 90 $flags --weight-format $format --prompt-len 128 --batch-size 32
  done
}

resident() { # nothing streams: the 8B shape
  local flags="--synthetic Llama-3.1-8B --mode full --prompt-len 128 --max-new-tokens 64 --repeats 3"
  for rows in ${ROWS:-1 8 32}; do
    for format in ${FORMATS:-auto exact int8 int4}; do
      step ${format}_8b_b$rows 60 $flags --weight-format $format --batch-size $rows
    done
  done
}

prefill() { # a prefill that computes
  local flags="--synthetic Llama-3.1-70B:layers=16 --mode stream --prompt-len 2016 --max-new-tokens 2 --batch-size 32"
  for format in auto int4; do
    step ${format}16_prefill 120 $flags --weight-format $format --gpu-cached-layers 0 --repeats 3
  done
}

drive() { # mixed, from the drive, whose rate wanders: the formats there and back
  local flags="--synthetic Llama-3.1-70B:layers=8 --mode mixed --gpu-cached-layers 0 --cpu-cache-layers 4"
  flags="$flags --prefetch-distance 2 --prompt-len 128 --max-new-tokens 4 --warmup-rounds 0"
  for turn in auto_1 exact_1 int4_1 exact_2 auto_2; do
    step ${turn}_8_drive 150 $flags --weight-format ${turn%_*}
  done
  rm -rf "$drive"/*.wsm
}

calibrate() { # the speed of quantising that looks at the inputs
  local began=$SECONDS words=$out/words.txt
  for number in $(seq 4000); do echo "the $number cat sat $((number * number)) times"; done >"$words"
  "$python" bench_infer.py pack --synthetic Llama-3.1-70B:layers=8 --weight-format int4 --calibrate "$words" \
    --to "$drive/c.wsm" --manifest "$drive/c.json" --yes --gpu-mem-gb 24 --cache-dir "$drive" >"$out/calibrate.log" 2>&1
  echo "calibrate: exit $?, $((SECONDS - began)) s"
  rm -f "$drive/c.wsm"
}

for part in "${@:-exact24}"; do
  $part
done
"$python" - "$out" <<'PYTHON'
"""A line for each result: what a pass took, against its floor, and memory against the plan."""
import json, pathlib, sys

for path in sorted(pathlib.Path(sys.argv[1]).glob("*.json")):
    r = json.loads(path.read_text())
    prefill, decode = r["phases"]["prefill"], r["phases"]["decode"]
    memory, plan = r["memory"], r["plan"]
    gpu = (memory["gpu_peak_reserved_bytes"] + memory["gpu_context_bytes"]) / 2**30
    print(
        f"{path.stem}: {r['output']['sha256'][:8]} prefill {prefill['wall_ms']} ms, {prefill['roofline_pct']} % of floor "
        f"({prefill['bound_by']}); a pass {r['tpot_ms']['mean']} ms (p50 {r['tpot_ms']['p50']}), {decode['roofline_pct']} % "
        f"({decode['bound_by']}), floor {decode['floor_ms']} of {decode['wall_ms']}; {r['decode_tok_s']} tok/s; GPU {gpu:.2f} "
        f"of {plan['gpu_bytes'] / 2**30:.2f} GiB planned; page-locked {memory['cpu_page_locked_bytes'] / 1e9:.3f} GB, planned "
        f"{plan['cpu_page_locked_bytes'] / 1e9:.3f}; ssd {decode['bytes'].get('ssd_read')} busy {decode['busy_ms'].get('ssd')}"
    )
PYTHON
