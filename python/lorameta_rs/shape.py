"""What a bank's adapters look like from afar: how large their ΔW are, and which are related."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lorameta_rs import _core

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lorameta_rs.index import Index
    from lorameta_rs.member import Member

RELATED = 0.3
"""The cosine of two A from which on they began training as one. Of the lab's adapters those trained
from one A have 0.40 to 0.82, those from A of their own at most 0.14."""


def delta_norms(
    members: Sequence[Member],
    index: Index | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> list[dict[str, float]]:
    """‖ΔW‖ (Frobenius) of each module of each member, by the module's name.

    From the r × r Gram matrices of A and B: ‖s B A‖² = s² ⟨BᵀB, A Aᵀ⟩. Members whose norms `index`
    has are not read again.

    Raises:
        UnreadableFile, NotFinite: A member cannot be read.
    """
    from lorameta_rs.merge import Options

    products = [None if index is None else index.norms(member) for member in members]
    unknown = [i for i, own in enumerate(products) if own is None]
    adapters = [members[i].adapter for i in unknown]
    found = _core.norms(adapters, Options(threads=1), progress)
    for i, own in zip(unknown, found, strict=True):
        products[i] = own
    return [
        {
            module.name: abs(scaling) * norm
            for module, scaling, norm in zip(
                member.modules, member.scalings, own or [], strict=True
            )
        }
        for member, own in zip(members, products, strict=True)
    ]


def shared_a(members: Sequence[Member]) -> list[list[int]]:
    """Groups of members that began training from the same A, as indices, the largest first.

    Only they can be added factor by factor without much loss. Two members are related if their A
    have a cosine of at least `RELATED` in the first module that most members have.

    Raises:
        UnreadableFile, NotFinite: A member cannot be read.
    """
    from lorameta_rs.merge import Options

    # A of another shape cannot be the same: members are compared within their shape.
    shapes: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for i, member in enumerate(members):
        for module in member.modules:
            shapes.setdefault((module.name, tuple(module.a_shape)), []).append(i)
    groups: list[list[int]] = []
    left = set(range(len(members)))
    for (name, _), holders in sorted(shapes.items(), key=lambda item: (-len(item[1]), item[0])):
        these = [i for i in holders if i in left]
        left.difference_update(these)
        if len(these) < 2:
            continue
        adapters = [members[i].adapter for i in these]
        cosines = np.array(_core.cosines(adapters, name, Options()))
        groups += [[these[i] for i in group] for group in _connected(cosines >= RELATED)]
    return sorted(groups, key=lambda group: (-len(group), group))


def _connected(related: np.ndarray[tuple[int, int], np.dtype[np.bool_]]) -> list[list[int]]:
    """The groups of two or more that a relation connects."""
    groups = []
    left = set(range(len(related)))
    while left:
        group, new = set(), {left.pop()}
        while new:
            group |= new
            new = {int(j) for i in new for j in np.flatnonzero(related[i])} - group
        left -= group
        if len(group) > 1:
            groups.append(sorted(group))
    return groups
