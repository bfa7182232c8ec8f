"""How to run an adapter: the commands of the runtimes that load its format."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from lorameta_rs.member import GGUF_WEIGHTS
from lorameta_rs.servers import VLLM_RANK, vllm_rank

# What stands where the base model is not known.
_UNKNOWN = "BASE"


def transformers_code(base: str | None, folder: str) -> str:
    """Python that loads the adapter onto its base model; `folder` is where it lies."""
    return "\n".join(
        (
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM",
            "",
            f"model = AutoModelForCausalLM.from_pretrained({json.dumps(base or _UNKNOWN)})",
            f"model = PeftModel.from_pretrained(model, {json.dumps(folder)})",
        )
    )


def vllm_command(base: str | None, name: str, folder: str, rank: int) -> str | None:
    """The command that serves the adapter as `name`; None if vLLM loads no rank so large."""
    most = vllm_rank(rank)
    if most is None:
        return None
    words = ["vllm", "serve", base or _UNKNOWN, "--enable-lora"]
    if rank > VLLM_RANK:
        words += ["--max-lora-rank", str(most)]
    return shlex.join([*words, "--lora-modules", f"{name}={folder}"])


def commands(
    to: str,
    base: str | None,
    out: Path,
    rank: int,
    gguf: Path | None = None,
    name: str | None = None,
) -> dict[str, str]:
    """One line for each runtime that loads an adapter of a format, by the runtime's name.

    Args:
        to: The format.
        base: The base model's name.
        out: The adapter's folder, or its GGUF file.
        rank: The adapter's.
        gguf: The base model as GGUF.
        name: What servers call the adapter; None for what its folder or file is called.
    """
    if to == "gguf":
        return gguf_commands(gguf, out / GGUF_WEIGHTS if out.is_dir() else out, name)
    if to == "mlx":
        return mlx_command(base, out)
    last = transformers_code(base, str(out)).splitlines()[-1]
    served = vllm_command(base, name or out.absolute().name, str(out), rank)
    return {"transformers": last} | ({} if served is None else {"vLLM": served})


def gguf_commands(base: Path | None, file: Path, name: str | None = None) -> dict[str, str]:
    """Those for a GGUF adapter; `base` is its base model as GGUF, `name` as `commands` has it."""
    model, adapter = _of_modelfile(base or Path(f"{_UNKNOWN}.gguf")), _of_modelfile(file)
    modelfile = shlex.join(["printf", "%s\\n", f"FROM {model}", f"ADAPTER {adapter}"])
    own = file.absolute().parent.name if file.name == GGUF_WEIGHTS else file.stem
    return {
        "llama.cpp": shlex.join(["llama-cli", "-m", model, "--lora", str(file)]),
        "Ollama": f"{modelfile} > Modelfile && {shlex.join(['ollama', 'create', name or own])}",
    }


def gguf_conversion(folder: Path) -> str:
    """The command that makes a GGUF adapter of one of PEFT, beside it."""
    words = ["lorameta-rs", "convert", str(folder), "-o", f"{folder}.gguf", "--to", "gguf"]
    return shlex.join([*words, "--base-config", _UNKNOWN])


def _of_modelfile(path: Path) -> str:
    """A path as a Modelfile beside it has it: one without `/` may be the name of a model."""
    return str(path) if path.is_absolute() else f"./{path}"


def mlx_command(base: str | None, folder: Path) -> dict[str, str]:
    """That for an MLX adapter."""
    words = ["mlx_lm.chat", "--model", base or _UNKNOWN, "--adapter-path", str(folder)]
    return {"MLX": shlex.join(words)}
