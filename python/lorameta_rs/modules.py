"""The modules that the members of a bank change: who lacks some, and whose are of another shape."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from lorameta_rs.errors import LayoutMismatch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lorameta_rs.member import Member


def lacking(members: Sequence[Member]) -> str | None:
    """What to tell of members without modules that others of them have; None if all have all."""
    names = {member.name: {module.name for module in member.modules} for member in members}
    every = set().union(*names.values())
    without = {name: sorted(every - own) for name, own in names.items() if own != every}
    if not without:
        return None
    first, *others = without
    if not others:
        modules = without[first]
        more = f" and {len(modules) - 1} other modules" if len(modules) > 1 else ""
        return f"`{first}`: has no `{modules[0]}`{more}, which others have; it counts as zero there"
    listed = ", ".join(f"`{name}`" for name in list(without)[:3])
    count = len(without) - 3
    more = f" and {count} other member{'s' if count > 1 else ''}" if count > 0 else ""
    return f"{listed}{more} lack modules that others have, and count as zero there"


def _outer_shapes(member: Member) -> dict[str, tuple[int, ...]]:
    """Of each module, the shape of the matrix that it changes: all of A and B but the rank."""
    return {
        module.name: (module.b_shape[0], *module.a_shape[1:], *module.b_shape[2:])
        for module in member.modules
    }


def usual_shapes(members: Sequence[Member]) -> dict[str, tuple[int, ...]]:
    """Of each module, the shape that most members have; of several the first."""
    counted: dict[str, Counter[tuple[int, ...]]] = {}
    # Members with one layout have the same shapes: they are counted together.
    layouts = Counter(member.adapter.layout for member in members)
    seen = set()
    for member in members:
        layout = member.adapter.layout
        if layout not in seen:
            seen.add(layout)
            for name, shape in _outer_shapes(member).items():
                counted.setdefault(name, Counter())[shape] += layouts[layout]
    return {name: counter.most_common(1)[0][0] for name, counter in counted.items()}


def other_shape(member: Member, usual: Mapping[str, tuple[int, ...]]) -> LayoutMismatch | None:
    """What is wrong with a member that changes a matrix of another shape than `usual_shapes`."""
    for name, shape in _outer_shapes(member).items():
        if shape != usual[name]:
            return LayoutMismatch(
                f"`{member.adapter.path}`: `{name}` changes a matrix of shape {shape}, in the "
                f"rest of the bank it is {usual[name]}: an adapter of another base model?"
            )
    return None
