"""What a bank's adapters look like from afar: how large their ΔW are, and which are related."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lorameta_rs import _core

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from lorameta_rs.index import Index
    from lorameta_rs.member import Member

RELATED = 0.3
"""The cosine of two A from which on they began training as one. Of the lab's adapters those trained
from one A have 0.40 to 0.82, those from A of their own at most 0.14."""


def delta_norms(
    members: Sequence[Member],
    index: Index | None = None,
    progress: Callable[[int, int], object] | None = None,
    base_weights: Sequence[Path] = (),
) -> list[dict[str, float]]:
    """‖ΔW‖ (Frobenius) of each module of each member, by the module's name.

    From the r × r Gram matrices of A and B: ‖s B A‖² = s² ⟨BᵀB, A Aᵀ⟩. Members whose norms `index`
    has are not read again. Those of DoRA members take a pass over `base_weights`, the base's files.

    Raises:
        UnreadableFile, NotFinite: A member cannot be read.
    """
    dora = [member for member in members if member.config.use_dora]
    plain = [member for member in members if not member.config.use_dora]
    of_dora = iter(_dora_norms(dora, base_weights))
    of_plain = iter(_plain_norms(plain, index, progress))
    norms = [next(of_dora if member.config.use_dora else of_plain) for member in members]
    return [
        {module.name: norm for module, norm in zip(member.modules, own, strict=True)}
        for member, own in zip(members, norms, strict=True)
    ]


def _plain_norms(
    members: Sequence[Member],
    index: Index | None,
    progress: Callable[[int, int], object] | None,
) -> list[list[float]]:
    from lorameta_rs.merge import Options

    products = [None if index is None else index.norms(member) for member in members]
    unknown = [member.adapter for member, own in zip(members, products, strict=True) if own is None]
    found = iter(_core.norms(unknown, Options(threads=1), progress))
    return [
        [
            abs(scaling) * norm
            for scaling, norm in zip(
                member.scalings, next(found) if own is None else own, strict=True
            )
        ]
        for member, own in zip(members, products, strict=True)
    ]


def _dora_norms(members: Sequence[Member], base_weights: Sequence[Path]) -> list[list[float]]:
    from lorameta_rs.merge import Options
    from lorameta_rs.sums import Terms

    if not members:
        return []
    adapters, strengths = [one.adapter for one in members], [one.scalings for one in members]
    terms = Terms(adapters, [[[1.0]] * len(members)], strengths, base_weights)
    return _core.dora_norms(terms, Options(threads=1))


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
