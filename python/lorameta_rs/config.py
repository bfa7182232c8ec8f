"""An adapter's configuration, PEFT's `adapter_config.json`, and that of a merged adapter."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lorameta_rs.config_fields import Fields, read
from lorameta_rs.errors import InvalidAdapter

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Mapping, Sequence

T = TypeVar("T")


@dataclass(frozen=True)
class AdapterConfig:
    """What `adapter_config.json` says of a plain LoRA adapter; defaults are PEFT's.

    Attributes:
        path: The file.
        peft_type: Always `LORA`.
        base_model_name_or_path: The base model as its author named it.
        task_type: PEFT's task, such as `CAUSAL_LM`.
        r: Rank of the modules that no pattern names.
        lora_alpha: Alpha of the modules that no pattern names.
        use_rslora: Whether alpha is divided by √r, not by r.
        rank_pattern: Ranks by regular expression over module names; the first that matches counts.
        alpha_pattern: Alphas, likewise.
        fan_in_fan_out: Whether the base stores these weights [in, out], as GPT-2 does.
        use_dora: Whether a magnitude for each row of the base's weights was trained as well.
        target_modules: Names, or one regular expression, or `all-linear`.
        target_parameters: Single parameters beside them, such as all experts' matrices.
        layer_replication: Ranges of layers that the base repeats.
        extra: All other fields, as they were found.
        warnings: What is doubtful in the file; each names its field.
    """

    path: Path
    peft_type: str = "LORA"
    base_model_name_or_path: str | None = None
    task_type: str | None = None
    r: int = 8
    lora_alpha: float = 8.0
    use_rslora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    fan_in_fan_out: bool = False
    use_dora: bool = False
    target_modules: list[str] | str | None = None
    target_parameters: list[str] = field(default_factory=list)
    layer_replication: list[object] | None = None
    extra: dict[str, object] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str],
        drop_unsupported: bool = False,
        dora: bool = False,
    ) -> AdapterConfig:
        """Read an adapter's configuration.

        Args:
            source: The adapter's folder, or the file itself.
            drop_unsupported: Take what is more than plain LoRA as if it were not there, and warn.
            dora: Take DoRA as it is.

        Raises:
            MissingFile: There is no such file.
            UnreadableFile: The operating system refused it.
            InvalidAdapter: It is not a configuration, or not one of a plain LoRA adapter.
        """
        return cls.parse(*read(Path(source)), drop_unsupported, dora)

    @classmethod
    def parse(
        cls, path: Path, data: bytes, drop_unsupported: bool = False, dora: bool = False
    ) -> AdapterConfig:
        """The configuration that `data`, which was found in `path`, holds.

        Raises:
            InvalidAdapter: As `load`.
        """
        fields = Fields(path, data, drop_unsupported, dora)
        return cls(
            path=path,
            peft_type=fields.peft_type(),
            base_model_name_or_path=fields.base_model(),
            task_type=fields.text("task_type"),
            r=fields.take("r", cls.r, fields.rank),
            lora_alpha=fields.take("lora_alpha", cls.lora_alpha, fields.alpha),
            use_rslora=fields.flag("use_rslora"),
            rank_pattern=fields.pattern("rank_pattern", fields.rank),
            alpha_pattern=fields.pattern("alpha_pattern", fields.alpha),
            fan_in_fan_out=fields.fan_in_fan_out(),
            use_dora=fields.use_dora(),
            target_modules=fields.target_modules(),
            target_parameters=fields.target_parameters(),
            layer_replication=fields.layer_replication(),
            extra=fields.remaining(),
            warnings=tuple(fields.warnings),
        )

    @classmethod
    def stated(
        cls,
        path: Path,
        ranks: Mapping[str, int],
        alphas: Mapping[str, float],
        base_model: str | None = None,
    ) -> AdapterConfig:
        """The configuration of an adapter that has none, as its file or another format states it.

        Args:
            path: That file.
            ranks: The rank of each module.
            alphas: The alpha of modules; of others it is the rank, so that the scaling is 1.
            base_model: `base_model_name_or_path`.
        """
        said = {name: alphas.get(name, float(rank)) for name, rank in ranks.items()}
        return cls(
            path=path,
            base_model_name_or_path=base_model,
            r=next(iter(ranks.values())),
            lora_alpha=next(iter(said.values())),
            rank_pattern=_pattern(ranks),
            alpha_pattern=_pattern(said),
            target_modules=sorted(ranks),
        )

    def ranks(self, modules: Sequence[str]) -> list[int]:
        """The rank that the configuration gives each module.

        Args:
            modules: Module names without `base_model.model.`, as PEFT matches them.

        Raises:
            InvalidAdapter: A key of `rank_pattern` is not a regular expression.
        """
        return self._per_module("rank_pattern", self.rank_pattern, self.r, modules)

    def scalings(self, modules: Sequence[tuple[str, int]]) -> list[float]:
        """The factor s of each module's ΔW = s·B·A.

        Args:
            modules: Module names without `base_model.model.`, each with its tensors' rank.

        Raises:
            InvalidAdapter: A key of `alpha_pattern` is not a regular expression.
        """
        names = [name for name, _ in modules]
        alphas = self._per_module("alpha_pattern", self.alpha_pattern, self.lora_alpha, names)
        return [
            alpha / (math.sqrt(rank) if self.use_rslora else rank)
            for alpha, (_, rank) in zip(alphas, modules, strict=True)
        ]

    def parameters(self, module: str) -> list[str]:
        """Which of `target_parameters` a module's factors may be of; none if it is a module's own.

        PEFT's names do not say it: of several parameters in one place, the later ones hold the
        earlier in `base_layer`.
        """
        place = module.replace(".base_layer", "")
        parts = [target.rpartition(".") for target in self.target_parameters]
        return [
            f"{place}.{name}"
            for path, _, name in parts
            if not path or f".{place}".endswith(f".{path}")
        ]

    def _per_module(
        self, name: str, pattern: dict[str, T], default: T, modules: Sequence[str]
    ) -> list[T]:
        """The value of the first key that matches each module, or the default."""
        if not pattern:
            return [default] * len(modules)
        # Python's `re` backtracks: a hostile key would keep it busy for ever. The core's does not.
        from lorameta_rs._core import first_match

        keys = [self.parameters(module) or [module] for module in modules]
        try:
            matches = iter(first_match(list(pattern), [key for own in keys for key in own]))
        except InvalidAdapter as error:
            raise InvalidAdapter(f"`{self.path}`: `{name}`: {error}") from error
        values = list(pattern.values())
        found = []
        for module, own in zip(modules, keys, strict=True):
            here = islice(matches, len(own))
            first, *others = [default if match is None else values[match] for match in here]
            if any(other != first for other in others):
                raise InvalidAdapter(
                    f"`{self.path}`: `{name}` tells {' from '.join(own)}, and which of them "
                    f"`{module}` is cannot be known without the model"
                )
            found.append(first)
        return found


def portable_config(
    base_model: str | None,
    r: int,
    lora_alpha: float,
    target_modules: Iterable[str],
    fan_in_fan_out: bool = False,
    task_type: str | None = None,
) -> dict[str, object]:
    """The configuration of an adapter that every client reads alike: plain LoRA, no patterns.

    Args:
        base_model: `base_model_name_or_path`.
        r: The rank of all modules.
        lora_alpha: Their alpha; written as an integer if it is one, since Ollama reads no other.
        target_modules: Module names or endings of them, in any order.
        fan_in_fan_out: Whether the base stores these weights [in, out].
        task_type: PEFT's task, if the members agree on one.
    """
    return {
        "alpha_pattern": {},
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(lora_alpha) if float(lora_alpha).is_integer() else lora_alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": {},
        "target_modules": sorted(set(target_modules)),
        "task_type": task_type,
        "use_dora": False,
        "use_rslora": False,
    }


def as_json(config: dict[str, object]) -> str:
    """`config` as PEFT writes it, keys sorted, to be saved in UTF-8."""
    return json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def _pattern(values: Mapping[str, T]) -> dict[str, T]:
    """A pattern that gives each module its value; none if all have the same.

    A name also means the modules that end with it: longer ones come first.
    """
    if len(set(values.values())) == 1:
        return {}
    longest_first = sorted(values, key=len, reverse=True)
    return {re.escape(name): values[name] for name in longest_first}
