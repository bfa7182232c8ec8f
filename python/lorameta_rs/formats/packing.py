"""A bank whose members are in another format: smaller on the disk, faster to read from it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorameta_rs import files
from lorameta_rs.bank import TOKENIZER
from lorameta_rs.bank_settings import FILE_NAME, BankSettings
from lorameta_rs.errors import InvalidSetting
from lorameta_rs.formats.conversion import write
from lorameta_rs.index import make_fingerprints
from lorameta_rs.staging import staged

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from lorameta_rs.bank import Bank
    from lorameta_rs.formats.base import Base
    from lorameta_rs.merge import Options


def pack(
    bank: Bank,
    out: Path,
    to: str,
    dtype: str,
    base: Base | None,
    options: Options,
    progress: Callable[[str], object] | None = None,
) -> int:
    """Write all members of a bank in another format, with all that the new bank needs.

    That is their fingerprints, which are made if they are missing, the tokenizer, and a `bank.toml`
    with the base and the members' families: the datasets themselves stay where they are. A bank
    that has neither fingerprints nor datasets is written without: weights given by hand need none.

    Args:
        bank: Its members.
        out: The folder to be made; it appears whole or not at all, and replaces nothing.
        to: `peft` or `gguf`: a bank's members are in one of these.
        dtype: As `conversion.write`, and so are `base` and `options`.
        base: The base model, for `gguf`; what is known of it is written into the new `bank.toml`.
        options: `memory`, `threads`, `io` and `allow_nan` are used.
        progress: Told each member's name before its turn.

    Returns:
        The bytes of the new adapters.

    Raises:
        LoraMetaError: As `conversion.write`; a member that cannot be written stops all.
    """
    if to == "mlx":
        raise InvalidSetting("a bank has members of PEFT or GGUF: convert adapters one by one")
    compared = _has_fingerprints_or_datasets(bank)
    if compared:
        make_fingerprints(bank)
    size = 0
    with staged([out]) as (stage,):
        for member in bank.members:
            if progress is not None:
                progress(member.name)
            folder = stage / member.name
            folder.mkdir()
            write(member, folder, to, dtype, base, options)
            size += sum(file.stat().st_size for file in folder.iterdir())
            if compared:
                bank.fingerprint(member).save(folder / bank.fingerprint_path(member).name)
        if bank.has_tokenizer:
            with files.reading(bank.tokenizer.path) as file:
                files.write_whole(stage / TOKENIZER, file.read())
        settings = _settings(bank, base).toml
        if settings:
            files.write_whole(stage / FILE_NAME, settings.encode())
    return size


def _settings(bank: Bank, base: Base | None) -> BankSettings:
    """What is still so in another folder, where no path leads to what it did."""
    table = {} if base is None else base.table
    return BankSettings(
        base_model=bank.settings.base_model,
        families={name: bank.families[name] for name in bank.names if name in bank.families},
        base={key: value for key, value in table.items() if value is not None},
    )


def _has_fingerprints_or_datasets(bank: Bank) -> bool:
    nothing = bank.unfingerprinted().keys() - bank.outdated().keys()
    return any(member.name not in nothing or bank.dataset(member) for member in bank.members)
