"""The model card of a generated adapter: `README.md` as the Hub renders it."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Any

from lorameta_rs.member import GGUF_WEIGHTS
from lorameta_rs.runtimes import gguf_commands, mlx_command, transformers_code, vllm_command

if TYPE_CHECKING:
    from pathlib import Path

    from lorameta_rs.provenance import Provenance

_SHOWN = 20
_LIBRARIES = {"peft": "peft", "gguf": "llama.cpp", "mlx": "mlx"}


def model_card(
    record: Provenance,
    config: dict[str, object],
    out: Path,
    to: str = "peft",
    *,
    gguf: Path | None = None,
    served: bool = True,
) -> str:
    """What a stranger should know of the adapter, in Markdown with the Hub's front matter.

    Args:
        record: What it was made of.
        config: The configuration that it has in PEFT.
        out: Its folder seen from beside the output: of several formats that is one in the output's.
        to: Its format.
        gguf: The base model as GGUF, seen from there too.
        served: Whether vLLM takes it.
    """
    base = config["base_model_name_or_path"]
    front = [f"library_name: {_LIBRARIES[to]}", "tags: [lora, lorameta-rs]"]
    if base is not None:
        front.insert(0, f"base_model: {json.dumps(base)}")
    lines = ["---", *front, "---", "", f"# {out.parts[0]}", "", _summary(record), ""]
    lines += [*_table(record), "", *_relevance(record)]
    known = None if base is None else str(base)
    lines += ["## Use", "", *_use(known, config, out, to, gguf, served)]
    lines += [
        "`lorameta.json` beside this file holds what is needed to make the adapter again:",
        "",
        "```sh",
        f"lorameta-rs merge --repeat {shlex.quote(str(out))}/lorameta.json -o again",
        "```",
    ]
    return "\n".join(lines) + "\n"


def _use(
    base: str | None,
    config: dict[str, object],
    folder: Path,
    to: str,
    gguf: Path | None,
    served: bool,
) -> list[str]:
    """How the adapter is run, seen from beside the output."""
    name = folder.parts[0]
    if to == "gguf":
        found = gguf_commands(gguf, folder / GGUF_WEIGHTS, name)
        return ["```sh", *(f"{line}  # {name}" for name, line in found.items()), "```", ""]
    if to == "mlx":
        return ["```sh", *mlx_command(base, folder).values(), "```", ""]
    lines = ["```python", transformers_code(base, str(folder)), "```", ""]
    rank = config["r"]
    assert isinstance(rank, int), "the configuration of a result has one rank"
    command = vllm_command(base, name, str(folder), rank) if served else None
    return lines if command is None else [*lines, "```sh", command, "```", ""]


def _summary(record: Provenance) -> str:
    count = len(record.members)
    made = (
        f"A LoRA adapter that [lorameta-rs](https://pypi.org/project/lorameta-rs/) "
        f"{record.version} combined from {count} other{'s' if count != 1 else ''} "
        f"(`{record.method}`), without training"
    )
    if record.target is None:
        return made + ", by coefficients that its maker gave."
    settings = record.settings
    return (
        made + ": each weighs the more, the more its dataset is like the new one "
        f"(metric `{settings['metric']}`, pipeline `{settings['pipeline']}`; "
        "[arXiv 2507.01806](https://arxiv.org/abs/2507.01806))."
    )


def _table(record: Provenance) -> list[str]:
    sizes = record.sizes
    largest = sorted(record.members, key=lambda member: -abs(sizes[member["name"]]))
    lines = ["| adapter | distance | coefficient |", "| --- | --- | --- |"]
    for member in largest[:_SHOWN]:
        distance = "" if member["distance"] is None else f"{member['distance']:.4f}"
        name = member["name"].replace("|", "\\|")
        lines.append(f"| {name} | {distance} | {sizes[member['name']]:.4f} |")
    if record.refined is not None:
        lines += ["", _refined(record.refined)]
    elif record.modules:
        lines += ["", "Coefficients differ from module to module; these are their means."]
    if len(largest) > _SHOWN:
        lines += ["", f"… and {len(largest) - _SHOWN} more with smaller coefficients."]
    return lines


def _refined(found: dict[str, Any]) -> str:
    """What the base model had to say of the coefficients."""
    rows = f"{found['rows']} rows of the new dataset"
    loss = f"the loss of answers that were held out is {found['after']:.3f}"
    if found["after"] < found["before"]:
        what = f"The coefficients were refined with the base model on {rows}"
        said = f"{what}: {loss}, and was {found['before']:.3f} before."
    else:
        said = f"Refining with the base model on {rows} found no better coefficients: {loss}."
    mixed = ", ".join(f"{name} {weight:.2f}" for name, weight in found["weights"].items())
    return f"{said} The candidates, and their weights in the mixture: {mixed}."


def _relevance(record: Provenance) -> list[str]:
    found = record.relevance
    if found is None:
        return []
    text = f"The nearest dataset is that of `{found['nearest']}`, at {found['distance']:.4f}"
    if found["percentile"] is not None:
        text += f": farther than {found['percentile']:.0f} % of the bank's own are from theirs"
    return [f"{text}. In effect {found['effective_number']:.1f} adapters take part.", ""]
