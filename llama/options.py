"""What is built: the flags that name a model, its place and its KV, on top of how it is paged. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from llama.kv import KV_DTYPES
from llama.speculation.shape import NGRAM, Speculating, nodes_for, speculating
from wsm.errors import UnusableInput
from wsm.formats import registry
from wsm.option import NAME, PATH, SWITCH, TEXT, TRUTH, Kind, one_of, option, options_of, whole
from wsm.settings import Settings

_BLOCKS = Kind("0 (all blocks) or at least 2", lambda value: type(value) is int and value >= 0 and value != 1, int, "K")
_DEPTH = Kind(
    "auto or a whole number of at least 1",
    lambda value: value == "auto" or (type(value) is int and value >= 1),
    lambda text: text if text == "auto" else int(text),
    "N",
)
_DTYPE = one_of("bfloat16", "float16", "float32", "auto")
PLAIN_FORMATS = {"bf16": "bfloat16", "float16": "float16", "float32": "float32"}
"""Weight formats that are nothing but a dtype."""
_ARGUMENTS = ("checkpoints", "device", "load_model", "tp")
"""Not in ``mode_config``: arguments of ``LLaMA.build``, or of torchrun."""
_model, _paging = partial(option, group="model"), partial(option, group="paging")
_speculation = partial(option, group="speculation")


def _of_gguf(text: str) -> str:
    """What to do instead of giving the name that GGUF files have for a mix of formats."""
    is_mix = re.fullmatch(r"q[45]_k_[sm]", text, re.IGNORECASE)
    if not is_mix:
        return ""
    return "; that is the mix of a GGUF file, which --checkpoints MODEL.gguf runs as it is; " + planned_alike(text[1])


def planned_alike(bits: str) -> str:
    """How to plan what a GGUF file of so many bits would do, without the file."""
    return f"without the file, plan --synthetic Llama-3.1-70B --weight-format q{bits}_K plans nearly the same"


_FORMATS = one_of("auto", *PLAIN_FORMATS, *registry.ALL)._replace(mend=_of_gguf)


@dataclass(frozen=True, slots=True)
class BuildOptions(Settings):
    """Which model, from where, onto what, and how it is paged."""

    checkpoints: Path | None = _model(
        None, PATH, "Meta or Hugging Face directory, or a GGUF file", metavar="PATH", shown="built-in model"
    )
    synthetic: str | None = _model(
        None, NAME, "random weights in a real model's shape", metavar="NAME[:layers=N][:cycle]"
    )
    dtype: str | None = _model(
        None, _DTYPE, "weights are converted when loaded or packed", metavar="TYPE", shown="as stored"
    )
    weight_format: str = _model(
        "auto",
        _FORMATS,
        "how the layers' matrices lie on every tier, auto: as in the checkpoint or store (docs/FORMATS.md)",
        metavar="FORMAT",
    )
    tp: int | None = _model(
        None, whole(1), "ranks that share the model (docs/PARALLEL.md)", shown="torchrun's number", swept=False
    )
    cache_dir: Path = _model(
        Path("~/.cache/wsm-bench"), PATH, "packed files, the built-in model, ceilings", metavar="DIR"
    )
    device: str | None = _model(None, NAME, "compute device: cpu, cuda or cuda:N", metavar="DEV", shown="auto")
    load_model: bool | None = _model(
        None, TRUTH, "whole model on the device, as old scripts say it", shown="by mode", flags=("--load_model",)
    )
    raw_device: str | None = _paging(None, TEXT, "instead of the devices that the manifest names", metavar="DEV[,DEV]")
    manifest: Path | None = _paging(None, PATH, "of the packed store", shown="a packed file in the cache")
    auto: bool = _paging(False, SWITCH, "choose layers and pools for the memory budgets")
    topk_blk: int = _paging(
        8, _BLOCKS, "KV blocks from below the GPU per decode step, row, layer and KV head; 0: all (docs/KV.md)"
    )
    kv_dtype: str = _paging("auto", one_of(*KV_DTYPES), "how KV is stored, auto: as computed (docs/KV.md)")
    kv_device: str | None = _paging(
        None, TEXT, "file or block device for KV that CPU memory has no room for, never the store's", metavar="PATH"
    )
    prefill_chunk_tokens: int | None = _paging(
        None, whole(1), "tokens per chunk, inside one load of a layer", shown="auto"
    )
    micro_batch: int | None = _paging(
        None, whole(1), "rows whose KV is moved and attended together (docs/KV.md)", metavar="ROWS", shown="auto"
    )

    draft: str | None = _speculation(
        None,
        TEXT,
        "who proposes tokens (docs/SPECULATION.md): `ngram`, a checkpoint, a packed store's manifest, or "
        "`synthetic:NAME[:layers=N][:agree=P,second=Q]`",
        metavar="DRAFT",
        shown="none",
    )
    draft_depth: int | Literal["auto"] = _speculation(
        "auto",
        _DEPTH,
        "tokens that it proposes behind a row's last, auto: as many as the link hides, as the warm-up shows",
    )
    draft_width: int | None = _speculation(
        None, whole(1), "nodes that a tree grows a level; 1 is a chain", shown="as many as fill the nodes"
    )
    draft_weight_format: str = _speculation("auto", _FORMATS, "of the draft, as `--weight-format`", metavar="FORMAT")
    verify_rows: int | None = _speculation(
        None,
        whole(1),
        "nodes of a row, its last token among them, in every decode pass; without a draft padding",
        shown="1; with a draft its depth + 1, or 16",
    )

    @property
    def speculating(self) -> Speculating | None:
        """How the run speculates; UnusableInput for flags that contradict each other."""
        return speculating(self.draft, self.draft_depth, self.draft_width, self.verify_rows)

    @property
    def nodes(self) -> int:
        """Nodes of a row in every decode pass."""
        return nodes_for(self.draft, self.draft_depth, self.verify_rows)

    def check_together(self) -> None:
        """Raises UnusableInput for flags that contradict each other."""
        _ = self.speculating
        if self.draft_weight_format != "auto" and self.draft in (None, NGRAM):
            why = "without --draft" if self.draft is None else "for ngram, which has no weights"
            raise UnusableInput(
                f"--draft-weight-format {self.draft_weight_format} {why}: name a draft, or leave it out"
            )
        if self.checkpoints is not None and self.synthetic is not None:
            raise UnusableInput("--checkpoints and --synthetic exclude each other: give one")
        named = PLAIN_FORMATS.get(self.weight_format, "bfloat16" if self.weight_format == "exact" else None)
        if named is not None and self.dtype not in (None, "auto", named):
            raise UnusableInput(
                f"--weight-format {self.weight_format} holds {named}, not --dtype {self.dtype}: leave one of them out"
            )
        if self.raw_device and not self.manifest:
            raise UnusableInput("--raw-device needs --manifest, which says what lies where on it")
        if self.load_model and self.mode in ("mixed", "stream"):
            raise UnusableInput(
                f"--load-model=True contradicts --mode {self.mode}, which never loads the whole model on the device: "
                "leave it out, or use --mode full"
            )
        if self.load_model is False and self.mode in ("full", "preload"):
            raise UnusableInput(
                f"--load-model=False contradicts --mode {self.mode}, which loads the whole model: leave it out, or use "
                "--mode stream or mixed"
            )


def build_options(mode_config: Mapping[str, Any], **given: Any) -> BuildOptions:
    """Options from ``LLaMA.build``'s arguments; UnusableInput for a name that is not known, or a value not allowed."""
    known = options_of(BuildOptions)
    if unknown := sorted(name for name in mode_config if name not in known or name in _ARGUMENTS):
        raise UnusableInput(f"mode_config has unknown entries: {', '.join(unknown)}")
    values = {**given, **mode_config}
    paths = {name: Path(text) for name, text in values.items() if text is not None and known[name].kind is PATH}
    return BuildOptions(**{**values, **paths})
