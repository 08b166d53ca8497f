"""Sampling: the numbers are those of Random123, and a draw follows from seed, row and position alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llama.sampling import MASS, masses, nucleus, philox, sample, uniform


def draw(logits: Tensor, *, temperature: float, top_p: float, seed: int) -> Tensor:
    """A token for each of the logits, as of so many rows."""
    rows = torch.arange(len(logits))
    return sample(logits, rows, rows * 0, temperature=temperature, top_p=top_p, seed=seed)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # Random123's kat_vectors of philox4x32 with 10 rounds
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_the_random_words_are_those_of_random123(counter: str, key: str, words: str) -> None:
    c0, c1, c2, c3 = (torch.tensor([int(word, 16)]) for word in counter.split())
    low, high = (int(word, 16) for word in key.split())
    found = philox(high << 32 | low, (c0, c1, c2, c3))
    assert " ".join(f"{int(word):08x}" for word in found) == words


def test_uniform_numbers_are_uniform_and_differ_by_seed_row_and_position() -> None:
    rows, positions = torch.meshgrid(torch.arange(100), torch.arange(100), indexing="ij")
    numbers = torch.cat([uniform(seed, rows, positions).flatten() for seed in (0, 1)])
    assert numbers.unique().numel() == 20_000
    assert ((numbers >= 0) & (numbers < 1)).all()
    counts = torch.histc(numbers, 20, 0, 1)
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8, "chi-square of 19 degrees of freedom at 0.1 %"


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**40), st.lists(st.integers(0, 40), min_size=1, max_size=40))
def test_a_draw_depends_on_nothing_that_is_drawn_beside_it(seed: int, keys: list[int]) -> None:
    rows, positions = torch.tensor(keys), torch.tensor(keys) * 7
    logits = torch.randn(41, 50, generator=torch.Generator().manual_seed(0))[rows]
    together = sample(logits, rows, positions, temperature=0.9, top_p=0.95, seed=seed)
    order = torch.randperm(len(keys), generator=torch.Generator().manual_seed(seed))
    shuffled = sample(logits[order], rows[order], positions[order], temperature=0.9, top_p=0.95, seed=seed)
    assert shuffled.equal(together[order])
    alone = sample(logits[:1], rows[:1], positions[:1], temperature=0.9, top_p=0.95, seed=seed)
    assert alone.equal(together[:1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_has_the_numbers_of_the_cpu() -> None:
    rows, positions = torch.arange(1000), torch.arange(1000) * 3
    assert uniform(2**63 + 5, rows.cuda(), positions.cuda()).cpu().equal(uniform(2**63 + 5, rows, positions))


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-300])
def test_sampling_next_to_temperature_0_is_greedy(temperature: float) -> None:
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    drawn = draw(logits, temperature=temperature, top_p=1.0, seed=0)
    assert drawn.tolist() == logits.argmax(-1).tolist()


@settings(deadline=None)
@given(st.lists(st.integers(-40, 40), min_size=1, max_size=40), st.floats(0.001, 1.0))
def test_the_nucleus_is_the_smallest_set_that_reaches_top_p(sixteenths: list[int], top_p: float) -> None:
    probs = torch.softmax(torch.tensor(sixteenths) / 16, dim=-1).sort(descending=True).values.unsqueeze(0)
    mass = masses(probs)
    kept = nucleus(mass, mass.cumsum(-1), top_p)[0]
    count = int(kept.sum())
    assert count >= 1
    assert kept[:count].all(), "the likeliest tokens come first"
    exact = probs[0].double()
    assert exact[:count].sum() >= top_p - 1e-6
    assert exact[: count - 1].sum() < top_p + 1e-6


@pytest.mark.parametrize("top_p", [0.5, 0.9, 1.0])
def test_the_nucleus_is_exact_to_the_unit(top_p: float) -> None:
    reaches = math.ceil(top_p * MASS)
    for first, count in ((reaches - 1, 2), (reaches, 1), (reaches + 1, 1)):
        mass = torch.tensor([[first, 1, 1]])
        assert int(nucleus(mass, mass.cumsum(-1), top_p).sum()) == count


@settings(deadline=None)
@given(st.integers(0, 10_000), st.floats(0.05, 1.0))
def test_only_tokens_of_the_nucleus_are_drawn(seed: int, top_p: float) -> None:
    logits = torch.randn(20, 12, generator=torch.Generator().manual_seed(seed)) * 2
    drawn = draw(logits, temperature=0.7, top_p=top_p, seed=seed)
    probs = torch.softmax(logits.double() / 0.7, dim=-1)
    likelier = (probs * (probs > probs.gather(-1, drawn.unsqueeze(-1)))).sum(-1)
    assert (likelier < top_p + 1e-6).all()


def test_drawn_tokens_have_the_frequencies_of_their_probabilities() -> None:
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    rows = probs.log().repeat(20_000, 1)
    drawn = draw(rows, temperature=1.0, top_p=0.9, seed=0)
    frequencies = torch.bincount(drawn, minlength=4) / 20_000
    assert torch.allclose(frequencies, torch.tensor([0.5, 0.3, 0.15, 0.0]) / 0.95, atol=0.015)
