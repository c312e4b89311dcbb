"""Rows of a data set of the hub, streamed through the ``datasets`` library."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from weaver.errors import WeaverError, require_extra

_OPTIONS = ("split", "text")


def hub_rows(location: str) -> tuple[str, Iterator[dict[str, Any]]]:
    """The rows of ``hf:NAME[,config][,split=train][,text=column]``.

    Args:
        location: ``NAME`` is a name on the hub or a local folder that ``datasets`` can load;
            ``text=column`` names the field that holds the text.

    Returns:
        The group of rows that name none (the config, else the last part of the name), and the rows.

    Raises:
        WeaverError: the location is malformed; and, once the rows are read, the data set cannot be
            loaded or has no such column.
    """
    name, *parts = location.removeprefix("hf:").split(",")
    configs = [part for part in parts if "=" not in part]
    options = dict(part.split("=", 1) for part in parts if "=" in part)
    if not name or len(configs) > 1 or not set(options) <= set(_OPTIONS):
        raise WeaverError(
            f"{location}: not a location on the hub",
            why="it is hf:NAME[,config][,split=train][,text=column]",
            fix="--data hf:wikitext,wikitext-2-raw-v1,split=validation",
        )
    config = configs[0] if configs else None
    rows = _stream(name, config, options.get("split", "train"), location)
    if "text" in options:
        rows = _with_text(rows, options["text"], location)
    return config or name.rstrip("/").rpartition("/")[2], rows


def _stream(name: str, config: str | None, split: str, location: str) -> Iterator[dict[str, Any]]:
    require_extra("datasets", "data", location)
    import datasets

    # datasets, the hub client and the file readers each raise their own kinds of error.
    try:
        yield from datasets.load_dataset(name, config, split=split, streaming=True)
    except Exception as error:
        raise WeaverError(
            f"{location}: cannot be read through datasets {datasets.__version__}",
            why=f"{type(error).__name__}: {error}",
            fix="check the name, config and split (and the network), or give a local file",
        ) from error


def _with_text(
    rows: Iterator[dict[str, Any]], column: str, location: str
) -> Iterator[dict[str, Any]]:
    for row in rows:
        if column not in row:
            raise WeaverError(
                f"{location}: has no column {column!r}",
                why=f"its columns are {', '.join(row)}",
                fix="name one of them with text=",
            )
        yield {**row, "text": row[column]}
