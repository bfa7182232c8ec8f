"""What the configuration of a merged adapter says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorameta_rs.config import portable_config
from lorameta_rs.errors import LayoutMismatch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorameta_rs.member import Member


def result_config(
    base_model: str | None, members: Sequence[Member], rank: int, alpha: float
) -> dict[str, object]:
    """The configuration of an adapter made of `members`: what PEFT reads, without patterns.

    `base_model` is what they were trained on; None for what the first of them says.

    Raises:
        LayoutMismatch: The members disagree on something that it must say.
    """
    for name in ("fan_in_fan_out", "layer_replication", "target_parameters"):
        values = [getattr(member.config, name) for member in members]
        for member, value in zip(members, values, strict=True):
            if value != values[0]:
                raise LayoutMismatch(
                    f"`{member.config.path}`: `{name}` is {value}, in `{members[0].name}` it is "
                    f"{values[0]}\nleave one of them out with --exclude NAME"
                )
    modules = ((member.config, module) for member in members for module in member.modules)
    whole = {module.name for config, module in modules if not config.parameters(module.name)}
    tasks = {member.config.task_type for member in members}
    config = portable_config(
        base_model or members[0].config.base_model_name_or_path,
        rank,
        alpha,
        _target_modules(whole),
        fan_in_fan_out=members[0].config.fan_in_fan_out,
        task_type=tasks.pop() if len(tasks) == 1 else None,
    )
    if members[0].config.layer_replication is not None:
        config["layer_replication"] = members[0].config.layer_replication
    if members[0].config.target_parameters:
        config["target_parameters"] = members[0].config.target_parameters
    return config


def _target_modules(names: set[str]) -> list[str]:
    """The modules by their last names where those mean the same modules, else in full.

    A last name stands for every module that ends with it. That is right if each block of the model
    has all of them; a number, as in `mlp.0`, would also stand for whole layers.
    """
    blocks: dict[str, set[str]] = {}
    for name in names:
        block, _, last = name.rpartition(".")
        blocks.setdefault(last, set()).add(block)
    same_layers = len({frozenset(_layers(found)) for found in blocks.values()}) == 1
    if same_layers and _gapless(names) and not any(last.isdigit() for last in blocks):
        return sorted(blocks)
    return sorted(names)


def _layers(blocks: set[str]) -> set[str]:
    """The layer numbers among the parts of module paths."""
    return {part for block in blocks for part in block.split(".") if part.isdigit()}


def _gapless(names: set[str]) -> bool:
    """Whether the layers are 0 to n − 1, as far as one can tell without the model."""
    layers = {int(part) for part in _layers(names)}
    return layers == set(range(len(layers)))
