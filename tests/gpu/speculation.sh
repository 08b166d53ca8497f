#!/usr/bin/env bash
# A 70B shape with a draft of known agreement: bash tests/gpu/speculation.sh OUTDIR [part ...]
# Parts: int4 (80 layers in int4, 24 GiB: chains, trees, and none at the same --verify-rows), worst (a draft that is never
# right), exact (a host that holds 110 GB), alone (what a run without any of it takes). Without a part: int4 worst.
# All runs of a part have the residents and slots that --auto chose beside the largest tree. Every step has a limit.
set -u
out=${1:?the folder for the results}
shift
cache=${DRIVE:-/tmp}/wsm-speculation
python=${PYTHON:-python3}
mkdir -p "$out" "$cache"
pair=synthetic:Llama-3.2-1B:agree=0.8,second=0.1
never=synthetic:Llama-3.2-1B:agree=0,second=0
target="--synthetic Llama-3.1-70B:cycle --mode stream --gpu-mem-gb ${GPU_GB:-24} --embedding cpu --prompt-len 128"
beside="--draft-weight-format ${DRAFT_FORMAT:-int4}" # of a draft, which takes 3.0 GB in bf16 (auto)

step() {
  local name=$1 limit=$2 began=$SECONDS
  shift 2
  timeout -s INT -k 10 "$limit" "$python" bench_infer.py $target "$@" --quiet --temperature 0 --cache-dir "$cache" \
    --out-json "$out/$name.json" >"$out/$name.log" 2>&1
  echo "$name: exit $?, $((SECONDS - began)) s"
}

kept() { # the flags of what --auto chose in a result
  "$python" - "$out/$1.json" <<'PYTHON'
import json, sys

chosen = json.load(open(sys.argv[1]))["config"]["resolved"]
for name in ("gpu_cached_layers", "cpu_cache_layers", "prefetch_distance", "group_prefetch_depth"):
    print(f"--{name.replace('_', '-')}={chosen[name]}", end=" ")
PYTHON
}

chain() { echo "--draft-depth $1 --draft-width 1 --verify-rows $(($1 + 1))"; }

int4() {
  local flags="--weight-format int4 --max-new-tokens ${TOKENS:-256}"
  step int4_tree64 150 $flags --auto $beside --draft $pair --draft-depth 12 --verify-rows 64
  flags="$flags $(kept int4_tree64)"
  [ -n "${SHORT:-}" ] || step int4_tree24 120 $flags $beside --draft $pair --draft-depth 12 --verify-rows 24
  [ -n "${SHORT:-}" ] || step int4_chain8 150 $flags $beside --draft $pair $(chain 8)
  step int4_chain12 150 $flags $beside --draft $pair $(chain 12)
  for rows in ${NONE:-9 13 24 64}; do
    step int4_none$rows 200 $flags --verify-rows $rows --max-new-tokens ${NONE_TOKENS:-256}
  done
}

worst() {
  local flags="--weight-format int4 --max-new-tokens 40"
  step worst_tree24 90 $flags --auto $beside --draft $never --draft-depth 12 --verify-rows 24
  flags="$flags $(kept worst_tree24)"
  step worst_chain12 90 $flags $beside --draft $never $(chain 12)
  step worst_none13 90 $flags --verify-rows 13
  step worst_none24 90 $flags --verify-rows 24
}

exact() {
  local flags="--weight-format exact"
  step exact_tree64 300 $flags --max-new-tokens 256 --auto $beside --draft $pair --draft-depth 12 --verify-rows 64
  flags="$flags $(kept exact_tree64)"
  step exact_chain12 300 $flags --max-new-tokens 256 $beside --draft $pair $(chain 12)
  step exact_none13 200 $flags --max-new-tokens 16 --verify-rows 13
}

alone() { # as before there were drafts: all of the memory for the target
  step alone_int4 150 --weight-format int4 --max-new-tokens 64 --auto
}

[ $# -gt 0 ] || set -- int4 worst
for part in "$@"; do
  $part
done
"$python" - "$out" <<'PYTHON'
"""A line for each result: tokens a pass beside bytes and rates, and a pass against the one without a draft."""
import json, pathlib, sys

found = {path.stem: json.loads(path.read_text()) for path in sorted(pathlib.Path(sys.argv[1]).glob("*.json"))}


def without_draft(name, result):
    """The run of the same part and as many rows, else the part's last."""
    rows, part = result["config"]["resolved"]["verify_rows"], name.partition("_")[0]
    others = [other for other in found if other.startswith(f"{part}_none")]
    return found.get(f"{part}_none{rows}") or (found[others[-1]] if others else None)


for name, r in found.items():
    decode, memory, plan, s = r["phases"]["decode"], r["memory"], r["plan"], r["speculation"]
    gpu = ((memory["gpu_peak_reserved_bytes"] or 0) + (memory["gpu_context_bytes"] or 0)) / 2**30
    idle = 100 * (decode["idle_ms"]["h2d"] or 0) / decode["wall_ms"]
    line = (
        f"{name}: {r['output']['sha256'][:8]} {r['decode_tok_s']:.3f} tok/s, a pass {r['tpot_ms']['mean']:.1f} ms (p50 "
        f"{r['tpot_ms']['p50']:.1f}), link {(r['io_bw_MBps']['weight_h2d_MBps'] or 0) / 1e3:.1f} GB/s, idle {idle:.1f} %"
    )
    if s is not None:
        line += (
            f"; {s['tokens_a_pass']:.2f} tokens a pass of depth {s['depth']}, width {s['width']}, {s['nodes']} nodes; "
            f"{s['weight_bytes_a_token'] / 1e9:.3f} GB a token; drafting {s['drafting_ms']} ms, "
            f"{s['drafting_hidden_pct']} % hidden; passes {s['row_passes']}"
        )
        if (pair := s["synthetic_agreement"]) is not None:
            line += f"; agreement {pair['realised_agree']} and {pair['realised_second']}"
        if (other := without_draft(name, r)) is not None:
            line += f"; a pass {r['tpot_ms']['mean'] / other['tpot_ms']['mean']:.4f} of that without"
            line += f", {r['decode_tok_s'] / other['decode_tok_s']:.3f} times its tok/s"
            if other["max_new_tokens"] == r["max_new_tokens"]:
                line += f", tokens {'equal' if other['output']['sha256'] == r['output']['sha256'] else 'DIFFERENT'}"
    print(f"{line}; GPU {gpu:.2f} of {plan['gpu_bytes'] / 2**30:.2f} GiB planned")
PYTHON
