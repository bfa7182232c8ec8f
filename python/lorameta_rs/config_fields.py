"""The fields of an `adapter_config.json`, taken out one by one.

The checks are PEFT's rules made strict: a value that PEFT would take in another sense than its
author's, such as `"use_rslora": "false"`, is refused; so is, by name, whatever a sum of LoRA
factors would silently lose.
"""

from __future__ import annotations

import codecs
import errno
import json
import math
import re
import stat
import sys
import warnings
from collections import Counter
from typing import TYPE_CHECKING, NoReturn, TypeGuard, TypeVar

from lorameta_rs.errors import InvalidAdapter, MissingFile, UnreadableFile

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

T = TypeVar("T")

FILE_NAME = "adapter_config.json"

# Real files have a few kilobytes, real ranks a few hundred: far more is an accident or an attack.
_LARGEST_FILE = 4 * 2**20
_LARGEST_RANK = 2**20
_LONGEST_REGEX = 2**14  # compiled in a tenth of a second

# Fields by which an adapter is more than its LoRA factors, and what it is.
_NOT_PLAIN_LORA = {
    "use_dora": "DoRA rescales the base's weights by its `lora_magnitude_vector` tensors; "
    "--base-weights lends them",
    "lora_bias": "`lora_B.bias` tensors are no part of the product of B and A",
    "modules_to_save": "whole weights that replace the base's cannot be summed",
    "trainable_token_indices": "embedding rows that replace the base's cannot be summed",
    "alora_invocation_tokens": "an activated LoRA works only after its invocation tokens",
    "use_qalora": "QA-LoRA pools the inputs of its modules",
    "use_bdlora": "BD-LoRA's factors are block-diagonal",
    "arrow_config": "Arrow routes every token to other adapters",
    "kasa_config": "KaSA has singular values beside B and A",
}

# Those that can be left out of an adapter, so that its factors alone remain. The others make the
# factors themselves something else.
_DROPPABLE = (
    *("use_dora", "lora_bias", "bias", "modules_to_save"),
    *("trainable_token_indices", "alora_invocation_tokens"),
)

# Initialisations that take their first A and B out of the base's weights.
_CHANGES_THE_BASE = ("corda", "loftq", "lora_ga", "olora", "pissa")


def read(path: Path) -> tuple[Path, bytes]:
    """The file that `path` means, and its bytes."""
    try:
        if path.is_dir():
            path /= FILE_NAME
        # Opening a pipe would wait for a writer, and a device may have no end.
        if not stat.S_ISREG(path.stat().st_mode):
            raise InvalidAdapter(f"`{path}`: expected a regular file")
        with path.open("rb") as file:
            data = file.read(_LARGEST_FILE + 1)
    except FileNotFoundError as error:
        reason = f"no such file; an adapter is a folder with `{FILE_NAME}`"
        raise MissingFile(errno.ENOENT, reason, str(path)) from error
    except OSError as error:
        raise UnreadableFile(error.errno, error.strerror, str(path)) from error
    if len(data) > _LARGEST_FILE:
        raise InvalidAdapter(f"`{path}`: larger than 4 MiB, expected a few kilobytes of JSON")
    return path, data


def _parse(path: Path, data: bytes) -> tuple[dict[str, object], list[str]]:
    """The fields of the file, and the names that it holds more than once."""
    repeated: set[str] = set()

    def last_of_each(pairs: list[tuple[str, object]]) -> dict[str, object]:
        repeated.update(name for name, n in Counter(name for name, _ in pairs).items() if n > 1)
        return dict(pairs)

    try:
        fields = json.loads(data.decode("utf-8-sig"), object_pairs_hook=last_of_each)
    except RecursionError:
        raise InvalidAdapter(f"`{path}`: JSON nested too deeply") from None
    except ValueError as error:
        raise InvalidAdapter(f"`{path}`: not JSON in UTF-8: {error}") from error
    if not isinstance(fields, dict):
        raise InvalidAdapter(f"`{path}`: expected a JSON object, found {_shown(fields)}")
    return fields, sorted(repeated)


class Fields:
    """The fields of one file, taken out one by one; every complaint names file and field."""

    def __init__(self, path: Path, data: bytes, drop_unsupported: bool, dora: bool) -> None:
        self.path = path
        self.drop_unsupported = drop_unsupported
        self.dora = dora
        self.warnings: list[str] = []
        self.fields, repeated = _parse(path, data)
        if data.startswith(codecs.BOM_UTF8):
            self.warnings.append("the file starts with a BOM, with which PEFT cannot read it")
        if repeated:
            # The file chooses how many: five are enough to find the place.
            names = ", ".join(_shown(name) for name in repeated[:5])
            self.warnings.append(f"given more than once, the last one counts: {names}")

    def peft_type(self) -> str:
        """`LORA`, or a refusal: of another method, or of what no sum of LoRA factors carries."""
        if "peft_type" not in self.fields and "fine_tune_type" in self.fields:
            raise InvalidAdapter(
                f"`{self.path}`: `fine_tune_type` belongs to an mlx-lm adapter"
                " (adapters.safetensors), expected PEFT's `peft_type`"
            )
        value = self.fields.pop("peft_type", None)
        if value is None:
            self.warnings.append('`peft_type` is missing, taken as "LORA": PEFT requires it')
        elif value != "LORA":
            self._fail("peft_type", value, '"LORA"', "leave this adapter out: it is not LoRA")
        if self.dora and self.fields.get("use_dora") and self.fields.get("fan_in_fan_out"):
            reason = "DoRA of weights that are stored [in, out] (`fan_in_fan_out`) is not supported"
            self._not_plain("use_dora", True, reason)
            self.dora = False
        if (bias := self.fields.get("bias")) not in (None, "none"):
            self._not_plain("bias", bias, "trained biases are no part of the product of B and A")
        for name, reason in _NOT_PLAIN_LORA.items():
            if (value := self.fields.get(name)) and not (name == "use_dora" and self.dora):
                self._not_plain(name, value, reason)
        return "LORA"

    def base_model(self) -> str | None:
        """The base model's name; without one nobody can tell what the adapter fits."""
        name = self.text("base_model_name_or_path")
        if not name:
            self.warnings.append("`base_model_name_or_path` is missing: the base model is unknown")
        return name or None

    def text(self, name: str) -> str | None:
        """A text, or None."""
        value = self.fields.pop(name, None)
        if value is None or _is_text(value):
            return value
        return self._fail(name, value, "text", "write it in quotes")

    def flag(self, name: str) -> bool:
        """True or false; false where it is missing."""
        value = self.fields.pop(name, None)
        if value is None or isinstance(value, bool):
            return bool(value)
        return self._fail(name, value, "true or false", "write it without quotes")

    def take(self, name: str, default: T, read: Callable[[str, object], T]) -> T:
        """The field as `read` reads it, or the default if the file has none; null is a value."""
        return read(name, self.fields.pop(name)) if name in self.fields else default

    def rank(self, name: str, value: object) -> int:
        """A rank as `take` reads it: a positive integer."""
        if isinstance(value, float) and value.is_integer():
            self.warnings.append(f"`{name}` is {value}, which PEFT takes only without the point")
            value = int(value)
        if type(value) is int and 0 < value <= _LARGEST_RANK:
            return value
        expected = f"an integer from 1 to {_LARGEST_RANK}"
        return self._fail(name, value, expected, "write the rank of the tensors")

    def alpha(self, name: str, value: object) -> float:
        """An alpha likewise: a finite number."""
        number = value if isinstance(value, int | float) else math.nan
        # NaN, infinity and integers beyond a double all fail the comparison.
        if isinstance(value, bool) or not abs(number) <= sys.float_info.max:
            self._fail(name, value, "a finite number", "write the alpha of the training")
        if number == 0:
            self.warnings.append(f"`{name}` is 0: the adapter changes nothing")
        elif number < 0:
            self.warnings.append(f"`{name}` is negative: it turns the adapter's effect around")
        return float(number)

    def pattern(self, name: str, read: Callable[[str, object], T]) -> dict[str, T]:
        """An object of module names and what `read` makes of their values."""
        value = self.fields.pop(name, None)
        if value is None:
            return {}
        if isinstance(value, dict) and all(map(_is_text, value)):
            return {key: read(f"{name}[{_shown(key)}]", entry) for key, entry in value.items()}
        return self._fail(name, value, "an object of module names", "write {} if there are none")

    def fan_in_fan_out(self) -> bool:
        """Whether the base stores its weights [in, out]."""
        value = self.flag("fan_in_fan_out")
        if value:
            self.warnings.append("`fan_in_fan_out` is true: it fits only a base of Conv1D layers")
        return value

    def use_dora(self) -> bool:
        """Whether it is DoRA, where that is taken."""
        if self.dora:
            return self.flag("use_dora")
        self.fields.pop("use_dora", None)
        return False

    def target_modules(self) -> list[str] | str | None:
        """Names, or one regular expression."""
        value = self.fields.pop("target_modules", None)
        if value is None or (isinstance(value, list) and all(map(_is_text, value))):
            return value
        if _is_text(value):
            if fault := _regex_fault(value):
                self.warnings.append(f"`target_modules` is not a usable expression: {fault}")
            return value
        expected = "a list of names or one regular expression"
        return self._fail("target_modules", value, expected, 'write for example ["q_proj"]')

    def target_parameters(self) -> list[str]:
        """The parameters, in the order in which PEFT matches them."""
        value = self.fields.pop("target_parameters", None)
        if value is None or (isinstance(value, list) and all(map(_is_text, value))):
            return sorted(set(value or []))
        expected = "a list of names"
        hint = 'write for example ["mlp.experts.down_proj"]'
        return self._fail("target_parameters", value, expected, hint)

    def layer_replication(self) -> list[object] | None:
        """Ranges of layers that the base repeats."""
        value = self.fields.pop("layer_replication", None)
        if value is not None and not isinstance(value, list):
            self._fail("layer_replication", value, "a list of ranges", "write null for none")
        if value:
            self.warnings.append(
                "`layer_replication` is set: it fits only a base whose layers are so repeated"
            )
        return value

    def remaining(self) -> dict[str, object]:
        """The fields that nothing has taken."""
        value = self.fields.get("init_lora_weights")
        if isinstance(value, str) and value.lower().startswith(_CHANGES_THE_BASE):
            self.warnings.append(
                f"`init_lora_weights` is {_shown(value)}: it fits only the base as that changed it"
            )
        return self.fields

    def _fail(self, name: str, value: object, expected: str, hint: str) -> NoReturn:
        raise InvalidAdapter(
            f"`{self.path}`: `{name}` is {_shown(value)}, expected {expected}\n{hint}"
        )

    def _not_plain(self, name: str, value: object, reason: str) -> None:
        droppable = name in _DROPPABLE
        if droppable and self.drop_unsupported:
            self.warnings.append(f"`{name}` is {_shown(value)}, and is left out: {reason}")
            return
        raise InvalidAdapter(
            f"`{self.path}`: `{name}` is {_shown(value)}, which cannot be merged: {reason}\n"
            "leave this adapter out, or train it as plain LoRA"
            + ("; --drop-unsupported takes its factors alone" if droppable else "")
        )


def _shown(value: object) -> str:
    """`value` as the file spells it, short, and harmless in a terminal."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:60] + "…"


def _is_text(value: object) -> TypeGuard[str]:
    """Whether `value` is text that UTF-8 can write: JSON can escape half a surrogate pair."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def _regex_fault(pattern: str) -> str | None:
    """What keeps `pattern` from being a regular expression, if anything does."""
    if len(pattern) > _LONGEST_REGEX:
        return f"longer than {_LONGEST_REGEX} characters"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # doubtful ones are compiled all the same
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            return str(error)
    return None
