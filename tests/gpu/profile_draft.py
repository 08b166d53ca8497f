"""Where a draft's time goes on one CUDA device: python tests/gpu/profile_draft.py [depth width nodes format]

Growing one tree of the 1B shape: as one captured graph, between events, and then kernel by kernel, with its single
kernels by how long all of them take. Some 20 s; 8 GiB of GPU memory.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from llama.config import PRESETS
from llama.kv.cache import KVCache
from llama.model import Transformer
from llama.products import Scratch
from llama.speculation.model_draft import ModelDraft
from llama.speculation.shape import TreeShape
from tests.gpu.decode_rates import GPU, milliseconds
from tests.gpu.profile_layer import Resident

PROMPT, TOKENS, SHOWN = 160, 768, 40


@torch.inference_mode()
def main(depth: int = 12, width: int = 12, nodes: int = 64, form: str = "int4") -> None:
    config = PRESETS["Llama-3.2-1B"]
    weights = Resident(config, None if form == "auto" else form)
    model = Transformer(config, weights, GPU, TOKENS, scratch=Scratch(256 << 20, GPU))
    kv = KVCache(config, 1, TOKENS, GPU, torch.bfloat16)
    draft = ModelDraft(model, kv, TreeShape(depth, width, nodes), nodes, chunk_tokens=PROMPT, wave_rows=1)
    draft.prepare(1)
    draft.prefill([list(range(PROMPT))])
    root, start = (torch.full((1,), number, device=GPU) for number in (11, PROMPT))
    samples = []
    for _ in range(12):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        draft.propose(root, start)
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end))
    print(f"depth {depth}, width {width}, {nodes} nodes, {form}: {sorted(samples)[len(samples) // 2]:.2f} ms a tree")
    head = torch.randn(16, config.dim, device=GPU).bfloat16()
    print(f"the head for 16 rows: {milliseconds(lambda: model.head(head, 16)):.3f} ms")
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        draft.propose(root, start)
        torch.cuda.synchronize()
    rows = sorted(found.key_averages(), key=lambda row: -row.self_device_time_total)
    total = sum(row.self_device_time_total for row in rows)
    print(f"{sum(row.count for row in rows)} kernels, {total / 1e3:.2f} ms in them:")
    for row in rows[:SHOWN]:
        print(f"  {row.self_device_time_total / 1e3:7.3f} ms {row.count:6} x  {row.key[:110]}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), *sys.argv[4:5])
