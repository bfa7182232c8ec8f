"""What a format has to know of the base model: its architecture, and how many heads it has."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorameta_rs import _core, files
from lorameta_rs.bank_settings import FILE_NAME as BANK
from lorameta_rs.bank_settings import BankSettings
from lorameta_rs.errors import InvalidSetting
from lorameta_rs.provenance import FILE_NAME as PROVENANCE
from lorameta_rs.provenance import Provenance

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


CONFIG = "config.json"

_LARGEST = 16 << 20
_MAGIC = b"GGUF"

# Whose configurations leave `head_dim` out where it is another than hidden size by heads.
_OWN_HEAD_DIM = frozenset({"gemma", "gemma2", "gemma3", "qwen3", "qwen3moe"})

# What transformers calls an architecture (`model_type`), and what llama.cpp does.
_ARCHITECTURES = {
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "granite": "granite",
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2moe",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "smollm3": "smollm3",
}


@dataclass(frozen=True)
class Base:
    """A base model, as far as an adapter's format depends on it.

    Attributes:
        architecture: llama.cpp's name, such as `llama`, which is Mistral's too.
        heads: How many heads its attention has; None if that is not known.
        kv_heads: How many of them have keys and values of their own.
        gguf: The base model's file, where it was read from one.
        hidden_size: The numbers that a token is to it; None if that is not known.
        head_dim: The rows of one head; None if that is not known.
    """

    architecture: str
    heads: int | None = None
    kv_heads: int | None = None
    gguf: Path | None = None
    hidden_size: int | None = None
    head_dim: int | None = None

    @classmethod
    def load(cls, path: Path) -> Base:
        """Read it from a `config.json`, a folder that has one, or a GGUF file.

        Raises:
            MissingFile, UnreadableFile: There is no such file, or it cannot be read.
            InvalidSetting: It is none of these, or of an architecture without a known name.
            InvalidAdapter: It begins as a GGUF file, and is none.
        """
        with files.refusals(path):
            path = path / CONFIG if path.is_dir() else path
        with files.reading(path) as file:
            begin = file.read(len(_MAGIC))
            if begin == _MAGIC:
                return cls._of_gguf(path)
            text = begin + file.read(_LARGEST)
        try:
            config = json.loads(text.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise InvalidSetting(
                f"`{path}`: neither a GGUF file nor a model's {CONFIG}: {error}"
            ) from error
        # Models of several modalities keep that of their language model in its own table.
        config = config.get("text_config", config) if isinstance(config, dict) else {}
        return cls._of_config(path, config if isinstance(config, dict) else {})

    @classmethod
    def known(cls, given: Path | None, adapter: Path) -> Base | None:
        """The base that a user gives, or else what stands beside an adapter or in its bank.

        Args:
            given: What `load` takes; None if the user gives none.
            adapter: The folder of an adapter or of a bank, or a file: `lorameta.json` in it may
                know the base, and `bank.toml` in it or around it.

        Raises:
            LoraMetaError: As `load` and `of_table`; a file that is broken.
        """
        if given is not None:
            return cls.load(given)
        folder = adapter if adapter.is_dir() else adapter.parent
        record = folder / PROVENANCE
        if record.exists():
            table = Provenance.load(record).settings.get("base")
            if table is not None:
                return cls.of_table(f"`{record}`", table)
        for bank in (folder, folder.absolute().parent):
            table = BankSettings.load(bank).base if (bank / BANK).exists() else {}
            if "config" in table:
                return cls.load(bank / str(table["config"]))
            if table:
                return cls.of_table(f"`{bank / BANK}`", table)
        return None

    @classmethod
    def _of_config(cls, path: Path, config: Mapping[str, object]) -> Base:
        kind = config.get("model_type")
        if not isinstance(kind, str) or kind not in _ARCHITECTURES:
            raise InvalidSetting(
                f"`{path}`: `model_type` is {json.dumps(kind)[:60]}, whose name in GGUF is not "
                f"known; known are {', '.join(sorted(_ARCHITECTURES))}\n"
                "give the base model as a GGUF file instead"
            )
        architecture = _ARCHITECTURES[kind]
        heads = _count(path, given := config.get("num_attention_heads"))
        kv_heads = _count(path, config.get("num_key_value_heads", given))
        hidden = _count(path, config.get("hidden_size"), "hidden size")
        head_dim = _count(path, config.get("head_dim"), "size of a head")
        if head_dim is None and architecture not in _OWN_HEAD_DIM:
            head_dim = _even_head_dim(hidden, heads)
        return cls(architecture, heads, kv_heads, None, hidden, head_dim)

    @classmethod
    def _of_gguf(cls, path: Path) -> Base:
        found = _core.gguf_metadata(path)
        architecture = str(found.get("general.architecture", ""))
        own = found.get("general.type") == "adapter"
        keys = "lorameta" if own else f"{architecture}.attention"
        heads = _count(path, given := found.get(f"{keys}.head_count"))
        kv_heads = _count(path, found.get(f"{keys}.head_count_kv", given))
        if own:
            return cls(architecture, heads, kv_heads)
        hidden = _count(path, found.get(f"{architecture}.embedding_length"), "hidden size")
        head_dim = None
        # Others may have heads of several sizes, or more than queries in q.
        if architecture in _ARCHITECTURES.values():
            # Without the key llama.cpp takes the even share.
            size = found.get(f"{keys}.key_length", _even_head_dim(hidden, heads))
            head_dim = _count(path, size, "size of a head")
        return cls(architecture, heads, kv_heads, path, hidden, head_dim)

    @classmethod
    def of_table(cls, where: str, table: Mapping[str, object]) -> Base:
        """It, as `bank.toml` or `lorameta.json` has it; `where` is for what is said of it.

        Raises:
            InvalidSetting: The architecture is missing, or a number of heads is none.
        """
        architecture = table.get("architecture")
        if not isinstance(architecture, str) or not architecture:
            raise InvalidSetting(f"{where}: `architecture` of the base is missing, such as `llama`")
        heads = table.get("heads")
        kv_heads = table.get("kv_heads", heads)
        name = _ARCHITECTURES.get(architecture, architecture)
        return cls(name, _count(where, heads), _count(where, kv_heads))

    @property
    def table(self) -> dict[str, str | int | None]:
        """What `of_table` takes."""
        return {
            "architecture": self.architecture,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
        }

    @property
    def head_counts(self) -> tuple[int, int] | None:
        """The numbers of heads, if they are known."""
        if self.heads is None or self.kv_heads is None:
            return None
        return self.heads, self.kv_heads


def heads_in(bank: Path) -> tuple[int, int] | None:
    """The heads of a bank's base model, if its `bank.toml` or the `config` named there says them.

    Raises:
        LoraMetaError: As `BankSettings.load` and `Base.load`.
    """
    settings = BankSettings.load(bank)
    config = settings.base.get("config")
    return settings.heads if config is None else Base.load(bank / str(config)).head_counts


def _even_head_dim(hidden: int | None, heads: int | None) -> int | None:
    """The rows of a head where the heads share the hidden size, as in most models."""
    return None if hidden is None or heads is None else hidden // heads


def _count(where: object, value: object, what: str = "number of heads") -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**20:
        raise InvalidSetting(f"`{where}`: {json.dumps(value)[:60]} is no {what}")
    return value
