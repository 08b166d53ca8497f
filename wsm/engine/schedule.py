"""What to fetch next: a pure function of the state.

Every tier is fetched in one cyclic order, one line a kind. Within a kind nothing overtakes; between the two kinds
a later group may overtake one that is held up, within the bounds of :class:`Balance`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from wsm.layout.groups import KINDS, GroupId, Kind
from wsm.settings import Settings


@dataclass(frozen=True, slots=True)
class Cycle:
    """The endless sequence of those groups of one kind that a tier has to be fed.

    ``ordinal`` n stands for the n-th of them, counted over all passes; its ``step`` counts all groups of all passes.

    Args:
        groups: the groups in pass order.
        indices: the place of each in a pass.
        steps_a_pass: groups in a pass, fed or not.
    """

    groups: tuple[GroupId, ...]
    indices: tuple[int, ...]
    steps_a_pass: int

    def group(self, ordinal: int) -> GroupId:
        return self.groups[ordinal % len(self.groups)]

    def step(self, ordinal: int) -> int:
        passes, place = divmod(ordinal, len(self.groups))
        return passes * self.steps_a_pass + self.indices[place]


def cycle_of(order: list[GroupId], kind: Kind, layers: frozenset[int]) -> Cycle:
    """The cycle of one kind over the given layers of a pass ``order``."""
    places = [(group, index) for index, group in enumerate(order) if group.kind == kind and group.layer in layers]
    return Cycle(tuple(group for group, _ in places), tuple(index for _, index in places), len(order))


@dataclass(frozen=True, slots=True)
class Balance:
    """How far one kind may run ahead of the other (``WSM_BALANCE_*``, ``WSM_PAIR_AHEAD``, ``WSM_KIND_AHEAD_CAP``)."""

    on: bool
    tolerance: int
    pair_ahead: int
    kind_ahead_cap: int

    @classmethod
    def of(cls, settings: Settings) -> Balance:
        return cls(settings.balance_prefetch, settings.balance_tol, settings.pair_ahead, settings.kind_ahead_cap)

    def allows(self, step: int, ahead: int, held_step: int, held_ahead: int) -> bool:
        """Whether the group at ``step`` may overtake the held-up one at ``held_step`` of the other kind.

        ``ahead`` and ``held_ahead`` count the groups of each kind fetched and not yet used.
        """
        layers = step // 2 - held_step // 2
        if self.on:
            return abs(ahead + 1 - held_ahead) <= self.tolerance and layers <= self.pair_ahead
        return layers <= self.kind_ahead_cap


@dataclass(frozen=True, slots=True)
class Head:
    """The next group of one kind: its step, whether it can be fetched now, and how many of its kind are ahead."""

    step: int
    ready: bool
    ahead: int


def choose(heads: Mapping[Kind, Head], balance: Balance) -> Kind | None:
    """The kind to fetch from next: the earlier step if it is ready, else the other if it may overtake."""
    line = sorted((heads[kind].step, kind) for kind in KINDS if kind in heads)
    for place, (_, kind) in enumerate(line):
        head = heads[kind]
        if not head.ready:
            continue
        if place == 0:
            return kind
        held = heads[line[0][1]]
        if balance.allows(head.step, head.ahead, held.step, held.ahead):
            return kind
    return None
