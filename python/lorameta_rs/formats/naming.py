"""Files that name their factors as image models do: those of kohya's scripts and of diffusers.

Such a file may be for several models of one pipeline, its components: the image model and its text
encoders. Each of them is an adapter of its own.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lorameta_rs import _core, files
from lorameta_rs.base_weights import tensors_of
from lorameta_rs.errors import InvalidAdapter, InvalidSetting

if TYPE_CHECKING:
    from pathlib import Path

# How a factor's name may end, and which half it is. What is before it is the module.
_HALVES = {
    ".lora_linear_layer.down.weight": "A",
    ".lora_linear_layer.up.weight": "B",
    ".lora.down.weight": "A",
    ".lora.up.weight": "B",
    ".lora_down.weight": "A",
    ".lora_up.weight": "B",
    "_lora.down.weight": "A",
    "_lora.up.weight": "B",
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
}
_ALPHA = ".alpha"
_METADATA = "lora_adapter_metadata"

# Of each type the bytes of one number, and what `struct` calls it.
_SCALARS = {"F64": (8, "<d"), "F32": (4, "<f"), "F16": (2, "<e"), "BF16": (2, "<f")}

# How kohya's names begin, and diffusers' folder of that model in a pipeline.
_KOHYA = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
    "lora_transformer_": "transformer",
}
_COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")

# Old names of attention processors: in a text encoder, and in an image model.
_OLD = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


@dataclass
class Component:
    """The adapter of one model, in a file that names it otherwise than PEFT."""

    name: str
    """As diffusers calls the model in its pipeline; empty where the file does not say."""
    names: dict[str, str] = field(default_factory=dict)
    """PEFT's name of each of its tensors in the file."""
    alphas: dict[str, float] = field(default_factory=dict)
    """The alpha of each module that has one; of the others it is the rank."""
    config: dict[str, object] | None = None
    """What diffusers recorded of PEFT's configuration, where it did."""


def components(path: Path, base: Path | None) -> tuple[str, list[Component]] | None:
    """The format of a file, `kohya` or `diffusers`, and its adapters; None if it is neither.

    Args:
        path: A safetensors file.
        base: The base model, whose module names kohya's are compared with: the folder of a model
            or of a pipeline of them, or one safetensors file.

    Raises:
        InvalidAdapter: A tensor is no half of a plain LoRA, or names no module of the base.
        InvalidSetting: kohya's names cannot be resolved without a base's safetensors.
        MissingFile, UnreadableFile: A file cannot be read.
    """
    tensors = {
        name: (dtype, shape, start) for name, dtype, shape, start, _ in _core.file_tensors(path)
    }
    kohya = any(name.startswith(tuple(_KOHYA)) for name in tensors)
    if not kohya and not any(_is_diffusers(name) for name in tensors):
        return None
    resolve = _Kohya(path, base).module if kohya else _diffusers_module
    found: dict[str, Component] = {}
    for name, (dtype, shape, start) in tensors.items():
        owner, half = _taken_apart(path, name)
        component, module = resolve(owner)
        one = found.setdefault(component, Component(component))
        if half is None:
            one.alphas[module] = _scalar(path, name, dtype, shape, start)
        else:
            one.names[name] = f"base_model.model.{module}.lora_{half}.weight"
    recorded = _recorded(path)
    for name, one in found.items():
        begin = f"{name}."
        own = {
            key.removeprefix(begin): value
            for key, value in recorded.items()
            if key.startswith(begin)
        }
        one.config = own or None
    return ("kohya" if kohya else "diffusers"), list(found.values())


def _recorded(path: Path) -> dict[str, object]:
    """What diffusers keeps in a file's metadata: configurations, by component."""
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        text = (file.metadata() or {}).get(_METADATA, "{}")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidAdapter(f"`{path}`: `{_METADATA}` is not JSON: {error}") from error
    return found if isinstance(found, dict) else {}


def _is_diffusers(name: str) -> bool:
    """Whether a name is one of diffusers'; PEFT's own endings count where a component is named."""
    of_component = name.partition(".")[0] in _COMPONENTS
    return any(
        name.endswith(end) and (of_component or not end.startswith((".lora_A", ".lora_B")))
        for end in _HALVES
    )


def _taken_apart(path: Path, name: str) -> tuple[str, str | None]:
    """A tensor's module as its file names it, and which half it is; None for an alpha."""
    for end, half in _HALVES.items():
        if name.endswith(end):
            return name.removesuffix(end), half
    if name.endswith(_ALPHA):
        return name.removesuffix(_ALPHA), None
    raise InvalidAdapter(
        f"`{path}`: `{name}` is no half of a plain LoRA, nor its alpha: DoRA, LoHa, LoKr and "
        "others of their kind cannot be converted"
    )


def _diffusers_module(owner: str) -> tuple[str, str]:
    """The component and the module that diffusers means."""
    first, _, rest = owner.partition(".")
    component, module = (first, rest) if first in _COMPONENTS else ("", owner)
    module = module.replace(".processor.", ".")
    parent, _, last = module.rpartition(".")
    if last in _OLD and component.startswith("text_encoder"):
        return component, f"{parent}.{_OLD[last]}"
    if last == "to_out":
        return component, f"{module}.0"
    return component, module


class _Kohya:
    """Module names of which kohya wrote `_` for every dot: found again among those of the base."""

    def __init__(self, path: Path, base: Path | None) -> None:
        self.path = path
        self.base = base
        self.known: dict[str, dict[str, str]] = {}

    def module(self, owner: str) -> tuple[str, str]:
        """The component and the module that kohya means.

        Raises:
            InvalidSetting, InvalidAdapter: As `components`.
        """
        prefix = next((one for one in _KOHYA if owner.startswith(one)), None)
        if prefix is None:
            raise InvalidAdapter(f"`{self.path}`: `{owner}` is not one of kohya's names, as others")
        component = _KOHYA[prefix]
        if self.base is None:
            raise InvalidSetting(
                f"`{self.path}` has kohya's names, in which `_` stands for `.` too, so that they "
                "cannot be undone without the base model's\n"
                "give its folder with --base-config, or a safetensors file of it"
            )
        if component not in self.known:
            self.known[component] = _by_kohya_name(self.base, component)
        module = self.known[component].get(owner.removeprefix(prefix))
        if not module:
            why = "names several modules" if module == "" else "names no module"
            raise InvalidAdapter(
                f"`{self.path}`: `{owner}` {why} of the base model in `{self.base}`\n"
                "kohya names those of SDXL as Stability's own file does, diffusers otherwise: give "
                "the base in the form that the adapter was trained on"
            )
        return component, module


def _by_kohya_name(base: Path, component: str) -> dict[str, str]:
    """The base's modules by the names that kohya gives them; empty where two have the same."""
    found: dict[str, str] = {}
    for module in _modules_of(base, component):
        name = module.replace(".", "_")
        found[name] = "" if name in found else module
    return found


def _modules_of(base: Path, component: str) -> set[str]:
    """The modules of a base model that have a weight."""
    if base.is_dir():
        folder = base / component if (base / component).is_dir() else base
        paths = sorted(folder.glob("*.safetensors"))
    else:
        paths = [base]
    need = "kohya's names need those of the base model's tensors"
    names = {name for path in paths for name, *_ in tensors_of(path, need)}
    if not names:
        raise InvalidSetting(f"`{base}` holds no safetensors file, whose names are needed")
    return {name.removesuffix(".weight") for name in names if name.endswith(".weight")}


def _scalar(path: Path, name: str, dtype: str, shape: list[int], start: int) -> float:
    """The number in a tensor of one number."""
    if math.prod(shape) != 1 or dtype not in _SCALARS:
        raise InvalidAdapter(f"`{path}`: `{name}` is {dtype} {shape}, expected one number")
    size, code = _SCALARS[dtype]
    with files.reading(path) as file:
        file.seek(start)
        data = file.read(size)
    # A bfloat16 is the upper half of a float32.
    (number,) = struct.unpack(code, b"\0\0" + data if dtype == "BF16" else data)
    if not math.isfinite(number):
        raise InvalidAdapter(f"`{path}`: `{name}` is {number}, expected a finite number")
    return float(number)
