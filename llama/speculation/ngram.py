"""Prompt lookup: what came after the last tokens when they stood there before (Saxena 2023; needs no model)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llama.nodes.tree import Tree, within_block
from llama.speculation.tree import padded

LONGEST = 4
"""So many last tokens are looked for first, then fewer: longer agreement is better evidence."""
_NO_TOKEN, _NO_TAIL = -1, -2
TOKEN_BYTES = 8 * (2 + 4)
"""That a place in a row takes: the history, one more while it grows, and what is compared and ranked."""


class NgramDraft:
    """A chain of ``depth`` tokens behind each row's last, copied from the row itself.

    A continuation that runs into the row's end goes on from its own beginning: text that repeats is a loop. Rows in
    which the last token never stood before propose nothing. A tree has ``nodes``, padding included.
    """

    def __init__(self, depth: int, nodes: int, room: int, device: torch.device) -> None:
        self.depth, self.nodes, self.room = depth, nodes, room
        self._device = device
        self._history = torch.empty(0, room + 1, dtype=torch.int64, device=device)

    def prepare(self, rows: int) -> None:
        """Nothing is made once."""

    def prefill(self, prompts: Sequence[Sequence[int]]) -> None:
        rows = pad_sequence([torch.tensor(list(prompt)) for prompt in prompts], True, _NO_TOKEN)
        shape = len(prompts), self.room + 1  # the last place takes what is not to be kept
        self._history = torch.full(shape, _NO_TOKEN, dtype=torch.int64, device=self._device)
        self._history[:, : rows.shape[1]] = rows.to(self._device)

    def propose(self, roots: Tensor, starts: Tensor) -> Tree:
        self._history.scatter_(1, starts.unsqueeze(1), roots.unsqueeze(1))
        tokens, found = continued(self._history[:, : self.room], starts, self.depth)
        nodes = torch.arange(self.depth + 1, device=starts.device).expand(len(roots), -1)
        real = found.unsqueeze(1) | (nodes == 0)
        tree = Tree(torch.cat((roots.unsqueeze(1), tokens), 1), (nodes - 1).clamp(min=0), nodes, real)
        return padded(within_block(tree, starts), self.nodes)

    def accepted(self, starts: Tensor, path: Tensor, counts: Tensor, tokens: Tensor) -> None:
        new = torch.arange(tokens.shape[1], device=starts.device)
        places = starts.unsqueeze(1) + 1 + new
        self._history.scatter_(1, places.where(new < counts.unsqueeze(1), self.room).clamp(max=self.room), tokens)


def continued(history: Tensor, last: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """How each row ``[B, room]`` may go on behind its place ``last`` (int64 ``[B]``).

    ``count`` tokens, int64 ``[B, count]``, and whether they are worth anything, bool ``[B]``: they followed the latest
    earlier place where the most of the row's last tokens, up to :data:`LONGEST`, stood.
    """
    rows, room = history.shape
    last, places = last.unsqueeze(1), torch.arange(room, device=history.device)
    agrees = (places < last).expand(rows, -1)
    length = torch.zeros_like(history)
    for back in range(LONGEST):
        before = history.roll(back, 1) if back else history
        tail = history.gather(1, (last - back).clamp(min=0)).masked_fill(last < back, _NO_TAIL)
        agrees = agrees & (before == tail) & (places >= back)
        length += agrees
    found = (length * room + places).argmax(1, keepdim=True)
    period = (last - found).clamp(min=1)
    following = found + 1 + torch.arange(count, device=history.device) % period
    # Tokens of the vocabulary also where they are worth nothing: the model computes padding, too.
    tokens = history.gather(1, following.clamp(max=room - 1)).clamp(min=0)
    return tokens, length.gather(1, found).squeeze(1) > 0
