"""What ranks have to find alike in what they read."""

from __future__ import annotations

from pathlib import Path

import pytest

from llama.inputs import Inputs
from llama.opening import open_inputs
from llama.options import BuildOptions
from llama.parallel.world import World
from wsm.errors import UnusableInput
from wsm.layout.model import Shard


class Told(World):
    """A rank that hears what ``others`` say too, and notes what it says itself."""

    def __init__(self, rank: int, others: list[str | None]) -> None:
        super().__init__(Shard(rank, 2), Shard(rank, 2))
        self.others, self.said = others, list[str | None]()

    def exchange(self, text: str, limit_s: float | None = None) -> list[str | None]:
        self.said.append(text)
        return [text, *self.others]


def test_ranks_plan_images_of_one_size_though_their_shares_are_encoded_to_several(tmp_path: Path) -> None:
    options = BuildOptions(synthetic="Llama-3.2-1B:layers=2", weight_format="exact", device="cpu", cache_dir=tmp_path)

    def rank(number: int, others: list[str | None]) -> tuple[Inputs, Told]:
        world = Told(number, others)
        return open_inputs(options, world), world

    said, sizes = list[str | None](), list[list[int]]()
    for number in (0, 1):
        inputs, world = rank(number, [])
        sizes.append([layout.nbytes for layout in inputs.layouts.values()])
        said += world.said
    assert sizes[0] != sizes[1]
    for number in (0, 1):
        inputs, _ = rank(number, said)
        assert [layout.nbytes for layout in inputs.layouts.values()] == list(map(max, *sizes))


def test_a_share_that_blocks_do_not_fill_is_refused_with_the_ranks_that_can_be(tmp_path: Path) -> None:
    """5120 and 13824 inputs are 20 and 54 blocks of 256, which 2 ranks can cut, and of 32 enough for 8."""

    def opened(weight_format: str, ranks: int) -> Inputs:
        options = BuildOptions(
            synthetic="Llama-2-13B:layers=1", weight_format=weight_format, device="cpu", cache_dir=tmp_path
        )
        world = Told(0, [])
        world.shard = Shard(0, ranks)
        return open_inputs(options, world)

    for ranks, matrix in ((4, "w2"), (8, "wo")):
        with pytest.raises(UnusableInput, match=rf"its {matrix} being in q4_K.*--nproc-per-node 1 or 2$"):
            opened("q4_K", ranks)
    assert opened("q4_K", 2).layouts
    assert opened("q4_0", 8).layouts
