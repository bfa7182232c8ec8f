"""What each server refuses of a PEFT adapter, or takes otherwise than PEFT: rules and plain checks.

The rules are those that the servers' loaders had when they were read; none of vLLM, SGLang, LoRAX
and Ollama was run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from lorameta_rs.member import Member

VLLM_RANK = 16
"""The rank up to which vLLM loads adapters unless started with `--max-lora-rank`."""

_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_STACKED = frozenset({"q_proj", "k_proj", "v_proj"})


@dataclass(frozen=True)
class Rule:
    """One thing that a server requires."""

    server: str
    breach: Callable[[Member], str | None]
    """What of an adapter breaks it, if anything does."""

    def of(self, member: Member) -> str | None:
        """What is to be said of an adapter that breaks it."""
        found = self.breach(member)
        return None if found is None else f"{self.server} {found}"


def vllm_rank(rank: int) -> int | None:
    """The `--max-lora-rank` that vLLM needs for a rank; None if it has none so large."""
    return next((most for most in _VLLM_RANKS if most >= rank), None)


def _rank(member: Member) -> str | None:
    rank = max(member.ranks)
    if rank <= VLLM_RANK:
        return None
    if (most := vllm_rank(rank)) is None:
        return f"loads no rank over {_VLLM_RANKS[-1]}: this is {rank}"
    return f"refuses rank {rank} unless it is started with --max-lora-rank {most}"


def _patterns(member: Member) -> str | None:
    given = [name for name in ("rank_pattern", "alpha_pattern") if getattr(member.config, name)]
    if not given or len(set(member.scalings)) == 1:
        return None
    return f"does not read `{given[0]}`: it takes one scaling for all modules, which is wrong here"


def _rslora(member: Member) -> str | None:
    if not member.config.use_rslora:
        return None
    return "does not read `use_rslora`: it divides alpha by r, not by √r"


def _fractional_alpha(member: Member) -> str | None:
    alpha = member.config.lora_alpha
    return (
        None if alpha.is_integer() else f"reads no `lora_alpha` but an integer: this is {alpha:g}"
    )


def _targets(member: Member) -> str | None:
    if member.config.target_modules is not None:
        return None
    return "requires `target_modules`, which the configuration does not have"


def _kinds(member: Member) -> str | None:
    other = next((module for module in member.modules if module.kind != "linear"), None)
    return None if other is None else f"serves linear layers alone: `{other.name}` is {other.kind}"


def _stacked(member: Member) -> str | None:
    for block, names in _blocks(member).items():
        present = _STACKED & names
        if present and present != _STACKED:
            lacking = ", ".join(sorted(_STACKED - present))
            return f"requires q, k and v of a layer together: `{block}` has no {lacking}"
    return None


def _every_layer(member: Member) -> str | None:
    kinds: dict[str, dict[str, set[str]]] = {}
    for block, names in _blocks(member).items():
        kinds.setdefault(block.rpartition(".")[2], {})[block] = names
    for alike in kinds.values():
        everywhere = set().union(*alike.values())
        for block, names in alike.items():
            if lacking := sorted(everywhere - names):
                return f"drops `{lacking[0]}` everywhere, because `{block}` does not have it"
    return None


def _blocks(member: Member) -> dict[str, set[str]]:
    """The last names of modules by the block that they belong to."""
    blocks: dict[str, set[str]] = {}
    for module in member.modules:
        block, _, last = module.name.rpartition(".")
        blocks.setdefault(block, set()).add(last)
    return blocks


RULES = (
    Rule("vLLM", _rank),
    Rule("vLLM", _patterns),
    Rule("vLLM", _targets),
    Rule("vLLM", _kinds),
    Rule("SGLang", _patterns),
    Rule("SGLang", _rslora),
    Rule("SGLang", _targets),
    Rule("SGLang", _stacked),
    Rule("SGLang", _kinds),
    Rule("LoRAX", _patterns),
    Rule("LoRAX", _every_layer),
    Rule("LoRAX", _kinds),
    Rule("Ollama", _patterns),
    Rule("Ollama", _rslora),
    Rule("Ollama", _fractional_alpha),
)


def breaches(member: Member) -> list[str]:
    """What servers refuse of a PEFT adapter, or get wrong; each begins with the server's name."""
    return [text for rule in RULES if (text := rule.of(member)) is not None]


def refusing(member: Member) -> set[str]:
    """The servers that refuse a PEFT adapter, or get it wrong, however they are started."""
    always = (rule for rule in RULES if rule.breach is not _rank)
    return {rule.server for rule in always if rule.of(member) is not None}
