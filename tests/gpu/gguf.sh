#!/usr/bin/env bash
# A 70B-shaped GGUF of eight layers, streamed and mixed: bash tests/gpu/gguf.sh OUTDIR [stream] [mixed]
# The file and the packed store lie in ${FAST:-/dev/shm}, a stand-in for a fast drive; on a real one, FAST=/tmp REPEATS=1.
set -u
out=${1:?the folder for the results}
shift
modes=${*:-stream mixed}
fast=${FAST:-/dev/shm}/wsm-gguf
python=${PYTHON:-python3}
mkdir -p "$out" "$fast"
began=$SECONDS
"$python" tests/gpu/gguf_shape.py Llama-3.1-70B "${LAYERS:-8}" "$fast/model.gguf" >"$out/write.log" 2>&1
echo "write: exit $?, $((SECONDS - began)) s"

step() {
  local name=$1 began=$SECONDS
  shift
  timeout -s INT -k 10 90 "$python" bench_infer.py --checkpoints "$fast/model.gguf" --quiet --temperature 0 --prompt-len 128 \
    --max-new-tokens 24 --repeats "${REPEATS:-3}" --gpu-mem-gb 24 --cache-dir "$fast" --out-json "$out/$name.json" "$@" \
    >"$out/$name.log" 2>&1
  echo "$name: exit $?, $((SECONDS - began)) s"
}

for mode in $modes; do
  case $mode in
    stream) step stream --mode stream --gpu-cached-layers 2 ;;
    mixed) step mixed --mode mixed --gpu-cached-layers 2 --cpu-cache-layers 3 --prefetch-distance 2 ;;
  esac
done
rm -rf "$fast"
"$python" - "$out" <<'PYTHON'
import json, pathlib, sys

for path in sorted(pathlib.Path(sys.argv[1]).glob("*.json")):
    r = json.loads(path.read_text())
    decode = r["phases"]["decode"]
    print(
        f"{path.stem}: {r['output']['sha256'][:8]} {r['weights']['weight_format']} a pass {r['tpot_ms']['mean']} ms (p50 "
        f"{r['tpot_ms']['p50']}), {decode['roofline_pct']} % of floor ({decode['bound_by']}), floor {decode['floor_ms']} of "
        f"{decode['wall_ms']} ms; decoding {decode['decoded_weights']}; bytes {decode['bytes']}; {r['warnings']}"
    )
PYTHON
