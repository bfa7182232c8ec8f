"""The adapter folder of mlx-lm: what its configuration says, and what it has to say."""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING

from lorameta_rs import files
from lorameta_rs.config_fields import FILE_NAME
from lorameta_rs.errors import InvalidAdapter

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_LARGEST = 4 << 20
_OF_BLOCK = re.compile(r"^model\.layers\.\d+\.(.+)$")


def scale(folder: Path) -> float:
    """The factor that mlx-lm multiplies ΔW with, from the folder's `adapter_config.json`.

    Raises:
        MissingFile, UnreadableFile: It cannot be read.
        InvalidAdapter: It is not that of an MLX LoRA adapter.
    """
    path = folder / FILE_NAME
    with files.reading(path) as file:
        text = file.read(_LARGEST)
    try:
        config = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise InvalidAdapter(f"`{path}`: not JSON in UTF-8: {error}") from error
    match config:
        case {"fine_tune_type": str(kind)} if kind != "lora":
            raise InvalidAdapter(
                f'`{path}`: `fine_tune_type` is {json.dumps(kind)[:60]}, expected "lora": the '
                "others are no plain LoRA"
            )
        case {"lora_parameters": {"scale": int() | float() as number}} if math.isfinite(number):
            return float(number)
    raise InvalidAdapter(
        f"`{path}`: `lora_parameters` has no finite `scale`, by which mlx-lm multiplies the adapter"
    )


def mlx_config(modules: Sequence[str], rank: int, scale: float) -> dict[str, object]:
    """The configuration of an adapter that changes `modules`, all of one rank and scale."""
    # A block's modules are named from the block, all others from the model.
    keys = {_OF_BLOCK.sub(r"\1", module) for module in modules}
    return {
        "fine_tune_type": "lora",
        "lora_parameters": {"dropout": 0.0, "keys": sorted(keys), "rank": rank, "scale": scale},
        # All blocks, of which mlx-lm would count this many from the last: how many the base has,
        # the adapter does not say, and what it has no tensors for changes nothing.
        "num_layers": -1,
    }
