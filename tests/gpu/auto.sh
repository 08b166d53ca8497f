#!/usr/bin/env bash
# Advice and --auto against a sweep, on one GPU: bash tests/gpu/auto.sh OUTDIR (about 3 minutes, 30 GiB of memory).
set -u
out=${1:?the folder for the results}
python=${PYTHON:-python3}
mkdir -p "$out"
flags="--synthetic Llama-3.1-70B:layers=8 --mode stream --gpu-mem-gb 12 --prompt-len 128 --max-new-tokens 12"
flags="$flags --temperature 0 --ignore-eos"

# The guide's 4 resident layers do not fit 12 GiB: the advice, followed.
"$python" bench_infer.py $flags --gpu-cached-layers 4 --out-json "$out/advised.json" 2>"$out/advice.txt"
echo "4 resident layers: exit $?"
advice=$(sed -n 's/.*it fits with \(--.*\)$/\1/p' "$out/advice.txt" | head -1)
"$python" bench_infer.py $flags --gpu-cached-layers 4 $advice --out-json "$out/advised.json" >"$out/advised.log" 2>&1
echo "followed ($advice): exit $?"

"$python" bench_infer.py $flags --auto --out-json "$out/auto.json" >"$out/auto.log" 2>&1
echo "--auto: exit $?"
grep -h "auto chose\|to keep" "$out/auto.log"
"$python" bench_infer.py sweep $flags --no-probe --gpu-cached-layers 2,3 --group-prefetch-depth 2,4 \
  --embedding gpu,cpu --out-dir "$out/grid" >"$out/grid.log" 2>&1
echo "sweep: exit $?"
"$python" - "$out" <<'PY'
import json, pathlib, sys

out = pathlib.Path(sys.argv[1])
paths = [out / "advised.json", out / "auto.json", *sorted((out / "grid").glob("*.json"))]
for path in paths:
    tpot = json.loads(path.read_text()).get("tpot_ms") or {}
    print(f"{path.name}: {tpot.get('p50', 'failed')} ms a pass")
PY
