"""Write a bank of adapters of any size and shape, without torch.

    python benches/bank.py /tmp/bank --members 64                    Mistral-7B, rank 16, float32
    python benches/bank.py /tmp/bank --members 8 --shape tiny --dtype bfloat16

The numbers are Gaussian and different in every member; they mean nothing.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Layers, and each target module's (out, in).
SHAPES: dict[str, tuple[int, dict[str, tuple[int, int]]]] = {
    "mistral-7b": (32, {"q_proj": (4096, 4096), "k_proj": (1024, 4096), "v_proj": (1024, 4096)}),
    "llama-1b": (16, {"q_proj": (2048, 2048), "k_proj": (512, 2048), "v_proj": (512, 2048)}),
    "llama-70b": (80, {"q_proj": (8192, 8192), "k_proj": (1024, 8192), "v_proj": (1024, 8192)}),
    "tiny": (4, {"q_proj": (192, 192), "k_proj": (96, 192), "v_proj": (96, 192)}),
}
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def tensor_shapes(shape: str, rank: int) -> dict[str, tuple[int, int]]:
    """The names and shapes of an adapter's tensors, sorted by name as PEFT writes them."""
    layers, modules = SHAPES[shape]
    shapes = {}
    for layer in range(layers):
        for module, (rows, columns) in modules.items():
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            shapes[f"{name}.lora_A.weight"] = (rank, columns)
            shapes[f"{name}.lora_B.weight"] = (rows, rank)
    return dict(sorted(shapes.items()))


def as_bytes(numbers: NDArray[np.float32], dtype: str) -> bytes:
    """The numbers in a file's type; bfloat16 by rounding to nearest even."""
    if dtype == "bfloat16":
        bits = numbers.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()
    return numbers.astype("<f2" if dtype == "float16" else "<f4").tobytes()


def write_adapter(
    folder: Path, shape: str, rank: int, dtype: str, rng: np.random.Generator
) -> None:
    """Write one adapter folder."""
    folder.mkdir(parents=True)
    shapes = tensor_shapes(shape, rank)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    size = 4 if dtype == "float32" else 2
    end = 0
    for name, (rows, columns) in shapes.items():
        start, end = end, end + rows * columns * size
        offsets = [start, end]
        header[name] = {
            "dtype": DTYPES[dtype],
            "shape": [rows, columns],
            "data_offsets": offsets,
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    # Gaussian numbers are slow to draw: every tensor is another window of one pool.
    pool = rng.standard_normal(1 << 21, dtype=np.float32) * np.float32(0.02)
    with (folder / "adapter_model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for rows, columns in shapes.values():
            start = int(rng.integers(0, len(pool) - rows * columns))
            file.write(as_bytes(pool[start : start + rows * columns], dtype))
    config = {
        "base_model_name_or_path": shape,
        "lora_alpha": 2 * rank,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": list(SHAPES[shape][1]),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))


def write_bank(folder: Path, members: int, shape: str, rank: int, dtype: str) -> None:
    """Write `members` adapters into `folder`."""
    for index in range(members):
        rng = np.random.default_rng(index)
        write_adapter(folder / f"member{index:03d}", shape, rank, dtype, rng)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--members", type=int, default=64)
    parser.add_argument("--shape", choices=SHAPES, default="mistral-7b")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    arguments = parser.parse_args()
    write_bank(**vars(arguments))


if __name__ == "__main__":
    main()
