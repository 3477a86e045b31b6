"""The rows of a data set: a file of JSON or Parquet, a folder, or a name on the hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from .. import jsonl
from ..errors import GenarmError
from ..models.loading import INSTALL_TRAIN, first_line

# The hub's client has had two libraries beneath it; all that go wrong there are kinds of this.
_HttpError: type[Exception] = HfHubHTTPError.__bases__[0]
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(?<!\.json)(?<!\.jsonl)(?<!\.gz)(?<!\.parquet)")


def rows(source: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a data set, each after its place, "source:row".

    `source` is a file (JSON lines, a JSON array, either compressed by gzip, or Parquet), or what the package datasets
    loads: a folder or OWNER/NAME on the hub, and if need be which part: "OWNER/NAME:SPLIT" or ":CONFIGURATION/SPLIT".
    The split is "train" if none is given; "train[:1000]" takes its first thousand rows.

    Raises:
        GenarmError: there is no such data set, it cannot be read, or a package that reads it is missing.
    """
    path = Path(source)
    if path.is_file():
        return _parquet(path) if _is_parquet(path) else jsonl.rows(path)
    name, _, part = str(source).partition(":")
    if path.is_dir():
        return _data_set(str(path), "")
    if Path(name).is_dir() or (isinstance(source, str) and _HUB_NAME.fullmatch(name)):
        return _data_set(name, part)
    return jsonl.rows(path)  # says why it cannot be read


def _is_parquet(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) == b"PAR1"
    except OSError:
        return False  # whoever reads it says why


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise GenarmError(f"{path}: a Parquet file needs pyarrow: {INSTALL_TRAIN}") from error
    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches()
        found = (row for batch in batches for row in batch.to_pylist())
        for place, row in enumerate(found, start=1):
            yield f"{path}:{place}", row
    except (OSError, ValueError) as error:  # pyarrow's own are kinds of these
        raise GenarmError(f"{path}: cannot be read: {first_line(error)}") from error


def _data_set(name: str, part: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import datasets
    except ImportError as error:
        raise GenarmError(f"{name}: a folder or a name on the hub needs datasets: {INSTALL_TRAIN}") from error
    # A split may be sliced ("train[:50%]") but holds no "/".
    configuration, _, split = part.rpartition("/")
    local = Path(name).is_dir()
    if not local and not datasets.config.HF_HUB_OFFLINE:
        _ask_hub(name)
    bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        if any((Path(name) / file).is_file() for file in ("state.json", "dataset_dict.json")):  # by save_to_disk
            loaded = datasets.load_from_disk(name)
            found = loaded if isinstance(loaded, datasets.Dataset) else loaded[split or "train"]
        else:
            found = datasets.load_dataset(name, configuration or None, split=split or "train")
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        what = "cannot be read" if local else "no such file, and no data set of the hub that can be read"
        raise GenarmError(f"{name}: {what}: {first_line(error)}") from error
    finally:
        if bars:
            datasets.enable_progress_bars()
    return ((f"{name}:{place}", row) for place, row in enumerate(found, start=1))


def _ask_hub(name: str) -> None:
    """Once: datasets would ask six times, over 24 seconds, before it says that the hub cannot be reached."""
    try:
        HfApi().dataset_info(name, timeout=10)
    except (_HttpError, OSError, ValueError) as error:
        raise GenarmError(
            f"{name}: no such file, and no data set of the hub that can be read: {first_line(error)} "
            "(HF_HUB_OFFLINE=1 takes one that was loaded before)"
        ) from error
