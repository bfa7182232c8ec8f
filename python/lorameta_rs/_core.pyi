"""The compiled core: paths and a few hundred floats in, files out.

Anything wrong with a file or an argument is raised as a class of `lorameta_rs.errors`.
"""

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import final

from lorameta_rs.errors import LoraMetaError
from lorameta_rs.merge import Options
from lorameta_rs.sums import Terms

@final
class Adapter:
    """One adapter file whose header has been read and checked.

    `container` is peft, gguf or mlx; `metadata` are the keys of a GGUF file, without lists and long
    texts.
    """

    @property
    def path(self) -> Path: ...
    @property
    def size(self) -> int: ...
    @property
    def mtime_ns(self) -> int: ...
    @property
    def layout(self) -> Layout: ...
    @property
    def container(self) -> str: ...
    @property
    def metadata(self) -> dict[str, str | int | float | bool]: ...
    def with_experts(self, experts: Sequence[int]) -> Adapter: ...

@final
class Layout:
    """The modules of an adapter.

    Adapters opened together that have the same tensors in the same places have equal layouts.
    """

    @property
    def modules(self) -> list[Module]: ...
    @property
    def notes(self) -> list[str]: ...
    def __eq__(self, other: object) -> bool: ...
    def __hash__(self) -> int: ...

@final
class Module:
    """One module of a layout; `kind` is linear, embedding or conv, `rank` that of each expert."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def rank(self) -> int: ...
    @property
    def experts(self) -> int: ...
    @property
    def dora(self) -> bool: ...
    @property
    def a_shape(self) -> list[int]: ...
    @property
    def b_shape(self) -> list[int]: ...
    @property
    def dtypes(self) -> tuple[str, str]: ...

@final
class Plan:
    """What a job will read, and allocate and keep mapped at most, in bytes."""

    @property
    def bytes(self) -> int: ...
    @property
    def memory(self) -> int: ...
    @property
    def threads(self) -> int: ...

@final
class Outcome:
    """What became of one target.

    `rank` is None where the method keeps the members'. `kept` has for each module its name, the
    squared norm of the exact sum, that of what was kept, and whether the first is exact.
    """

    @property
    def rank(self) -> int | None: ...
    @property
    def kept(self) -> list[tuple[str, float, float, bool]]: ...

def version() -> str: ...
def open_adapters(
    paths: Sequence[str | PathLike[str]],
    drop_unsupported: bool = False,
    heads: tuple[int, int] | None = None,
    names: Mapping[str, str] | None = None,
    dora: bool = False,
) -> list[Adapter | LoraMetaError]: ...
def file_tensors(path: str | PathLike[str]) -> list[tuple[str, str, list[int], int, int]]: ...
def gguf_metadata(path: str | PathLike[str]) -> dict[str, str | int | float | bool]: ...
def gguf_tensor_name(module: str) -> str | None: ...
def peft_module_name(tensor: str, architecture: str) -> str | None: ...
def gguf_permutes(architecture: str) -> bool: ...
def first_match(patterns: Sequence[str], names: Sequence[str]) -> list[int | None]: ...
def scan(adapter: Adapter) -> list[tuple[str, str]]: ...
def plan(terms: Terms, settings: Options) -> Plan: ...
def combine(
    terms: Terms,
    outputs: Sequence[str | PathLike[str]],
    settings: Options,
    progress: Callable[[int, int], object] | None = None,
) -> tuple[Plan, list[Outcome]]: ...
def convert(
    adapter: Adapter,
    strengths: Sequence[float],
    out: str | PathLike[str] | None,
    container: str,
    dtype: str,
    settings: Options,
    *,
    architecture: str | None = None,
    alpha: float = 0.0,
    heads: tuple[int, int] | None = None,
    rank: int | None = None,
    metadata: Mapping[str, str | int | float | bool] = ...,
    progress: Callable[[int, int], object] | None = None,
) -> None: ...
def soup_errors(terms: Terms, settings: Options) -> tuple[list[float], bool]: ...
def norms(
    adapters: Sequence[Adapter],
    settings: Options,
    progress: Callable[[int, int], object] | None = None,
) -> list[list[float]]: ...
def gram(
    adapters: Sequence[Adapter],
    strengths: Sequence[Sequence[float]] | None,
    of_modules: bool,
    settings: Options,
    progress: Callable[[int, int], object] | None = None,
) -> list[tuple[str | None, bytes]]: ...
def dora_norms(terms: Terms, settings: Options) -> list[list[float]]: ...
def cosines(adapters: Sequence[Adapter], module: str, settings: Options) -> list[list[float]]: ...
