#!/usr/bin/env bash
# The two-GPU runs behind docs/LOG.md and docs/PERFORMANCE.md: bash tests/gpu/parallel.sh OUTDIR [step …]
# Two GPUs of one host, 256 GiB of memory; about 8 minutes in all. Every step has a limit of its own; the log of one that
# was stopped at it says how long each thing had taken ("stopped; times so far").
# Without steps named, all of them: one two two_layers full1 full2 all80 int4_80 exact_80 kill.
set -u
out=${1:?the folder for the results}
shift
steps=${*:-one two two_layers full1 full2 all80 int4_80 exact_80 kill}
python=${PYTHON:-python3}
mkdir -p "$out"
export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0}
common="--temperature 0 --ignore-eos --prompt-len 128 --cache-dir ${CACHE:-/tmp}/wsm-parallel"
shape24="--synthetic Llama-3.1-70B:layers=24 --mode stream --gpu-mem-gb 24 --max-new-tokens 12 --repeats 3"
full8b="--synthetic Llama-3.1-8B --mode full --max-new-tokens 32 --repeats 3"
ranks="-m torch.distributed.run --standalone --nproc-per-node 2"

run() { # run NAME LIMIT RANKS-COMMAND FLAGS: a result and a log of that name
  local name=$1 limit=$2 launcher=$3
  shift 3
  timeout -s INT -k 15 "$limit" "$python" $launcher bench_infer.py "$@" $common --out-json "$out/$name.json" \
    >"$out/$name.log" 2>&1
  echo "$name: exit $?"
}

kill_one() { # rank 1 is killed in the middle of decode: how long the other takes to end, and what it says
  timeout -k 15 170 "$python" $ranks bench_infer.py $shape24 --gpu-cached-layers 8 $common --no-probe \
    --max-new-tokens 1500 --out-json "$out/kill.json" >"$out/kill.log" 2>&1 &
  local launcher=$! rank1 begun
  for _ in $(seq 150); do
    sleep 1
    grep -q "Weight streaming enabled" "$out/kill.log" && break
  done
  sleep 8
  rank1=$(pgrep -P "$(pgrep -P $launcher | head -1)" | sort -n | tail -1)
  begun=$(date +%s.%N)
  kill -9 "$rank1"
  wait $launcher
  echo "kill: exit $?, $(echo "$(date +%s.%N) - $begun" | bc) s after the kill"
  grep "bench_infer.py:" "$out/kill.log"
  nvidia-smi --query-compute-apps=pid,used_memory --format=csv,noheader
}

for step in $steps; do
  case $step in
    one) CUDA_VISIBLE_DEVICES=0 run one 100 "" $shape24 --gpu-cached-layers 4 ;;
    two) run two 100 "$ranks" $shape24 --gpu-cached-layers 8 ;; # the same resident bytes a GPU
    two_layers) run two_layers 100 "$ranks" $shape24 --gpu-cached-layers 4 ;; # the same layers, half the bytes a GPU
    full1) CUDA_VISIBLE_DEVICES=0 run full1 60 "" $full8b ;;
    full2) run full2 60 "$ranks" $full8b ;;
    all80) run all80 240 "$ranks" --synthetic Llama-3.1-70B --mode stream --gpu-mem-gb 24 --gpu-cached-layers 8 \
      --max-new-tokens 6 ;;
    int4_80 | exact_80) run $step 200 "$ranks" --synthetic Llama-3.1-70B --weight-format ${step%_80} --mode stream \
      --gpu-mem-gb 24 --auto --embedding cpu --max-new-tokens 12 ;;
    kill) kill_one ;;
  esac
done
"$python" tests/gpu/parallel_summary.py "$out"
