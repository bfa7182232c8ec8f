"""The rows of a parquet file, for `rows`: some columns of it, a few rows at a time.

Memory is bounded by a few rows and the largest page, which pyarrow unpacks whole.
"""

from __future__ import annotations

import itertools
import tempfile
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

from lorameta_rs.errors import LoraMetaError, MissingExtra
from lorameta_rs.rows import excerpt

if TYPE_CHECKING:
    import io
    from collections.abc import Iterator

    from lorameta_rs.rows import Row, Source

_MAX_UNPACKED = 4 << 30
_BUFFER = 1 << 16

# A dictionary lets a file of a kilobyte have many rows of megabytes each: more of them at a time
# would be faster by some microseconds a row.
_BATCH = 4

_TEXT = ("string", "large_string", "string_view")


def parquet_rows(source: Source, stream: io.BufferedReader) -> Iterator[Row]:
    """Each row with its place, as an object of the columns that `source` selects.

    Raises:
        InvalidDataset: the file is broken, or a column holds what no text is made of.
        MissingExtra: pyarrow is not installed.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        what = "parquet needs pyarrow: pip install 'lorameta-rs[parquet]'"
        raise MissingExtra(f"`{source.path}`: {what}") from error
    numbers = itertools.count(1)
    with _seekable(source, stream) as file:
        try:
            # So, and without threads, a page is read at a time; else a whole row group, which may
            # be the whole file.
            table = parquet.ParquetFile(file, buffer_size=_BUFFER, pre_buffer=False)
            schema = table.schema_arrow
            columns = list(source.select(schema.names))
            for name in columns:
                _check_column(source, schema, name)
            batches = table.iter_batches(batch_size=_BATCH, columns=columns, use_threads=False)
            for batch in batches:
                for row in batch.to_pylist():
                    yield f"row {next(numbers)}", row
        except LoraMetaError:
            raise
        # The last two come from values that Python has no form for.
        except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise source.fault(f"not valid parquet: {excerpt(str(error), 120)}") from None


def _check_column(source: Source, schema: Any, name: str) -> None:
    """See that it is there once, and of what JSON has too: a text is made of nothing else."""
    from pyarrow import types

    places = schema.get_all_field_indices(name)
    if len(places) > 1:
        raise source.fault(f"column `{excerpt(name)}` is there twice")
    kind = inner = schema.field(places[0]).type
    lists = (types.is_list, types.is_large_list, types.is_fixed_size_list)
    while any(one(inner) for one in (types.is_dictionary, *lists)):
        inner = inner.value_type
    others = (types.is_integer, types.is_floating, types.is_boolean, types.is_null, types.is_struct)
    if str(inner) not in _TEXT and not any(one(inner) for one in others):
        expected = "expected text, numbers, or lists of texts, numbers or structs"
        raise source.fault(f"column `{excerpt(name)}` is of type {kind}, {expected}")


@contextmanager
def _seekable(source: Source, stream: io.BufferedReader) -> Iterator[IO[bytes]]:
    """Parquet is read from its end: what is compressed is unpacked to the disk before."""
    if not source.compressed:
        yield stream
        return
    with tempfile.TemporaryFile() as file:
        while chunk := stream.read(1 << 20):
            if file.tell() > _MAX_UNPACKED:
                raise source.fault(f"more than {_MAX_UNPACKED:,} bytes when unpacked")
            file.write(chunk)
        file.seek(0)
        yield file
