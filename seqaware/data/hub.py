"""Rows of a dataset on the Hugging Face hub (or a mirror, by HF_ENDPOINT), through `datasets.load_dataset`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

from seqaware.data.arrow_rows import stored_rows
from seqaware.data.resolve_source import HubId
from seqaware.errors import DataError


def hub_rows(
    hub: HubId, split: str, *, streaming: bool, begin: int = 0, end: int | None = None
) -> Iterator[dict[str, Any]]:
    """The rows of one split; of these only [begin, end), counted from 0.

    Raises:
        DataError: no such dataset, configuration or split; no network; a gated dataset.
    """
    with _hub_errors(hub):
        dataset = _load(hub, split, streaming=streaming)
        if streaming:
            dataset = dataset.decode(False).skip(begin)
            yield from islice(dataset, None if end is None else max(0, end - begin))
        else:
            end = len(dataset) if end is None else min(end, len(dataset))
            if begin < end:  # `datasets` selects no empty range
                yield from stored_rows(dataset.select(range(begin, end)))


def count_hub_rows(hub: HubId, split: str) -> int:
    """How many rows one split has. It is downloaded for that.

    Raises:
        DataError: as `hub_rows`.
    """
    with _hub_errors(hub):
        return len(_load(hub, split, streaming=False))


def _load(hub: HubId, split: str, *, streaming: bool) -> Any:
    import datasets

    return datasets.load_dataset(hub.repository, hub.subset, split=split, revision=hub.revision, streaming=streaming)


@contextmanager
def _hub_errors(hub: HubId) -> Iterator[None]:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except datasets.exceptions.DatasetNotFoundError as error:
        what = f"the hub has no dataset {hub.repository}, or it is gated"
        do = "correct dataset.name, or log in with `hf auth login` and accept its terms"
        raise DataError(what, got=_first_line(error), do=do) from error
    except (HfHubHTTPError, OSError) as error:
        do = "check the network and HF_ENDPOINT, or copy the data here and write its path as dataset.name"
        raise DataError(
            f"the dataset {hub.repository} cannot be read from the hub", got=_first_line(error), do=do
        ) from error
    except datasets.exceptions.DatasetGenerationError as error:
        cause = error.__cause__ or error
        raise DataError(f"the dataset {hub.repository} cannot be read", got=_first_line(cause)) from error
    except (ValueError, RuntimeError) as error:
        raise DataError(
            f"the dataset {hub.repository} cannot be read", got=_first_line(error), do=_advice(error)
        ) from error


def _advice(error: Exception) -> str:
    text = str(error)
    if "scripts are no longer supported" in text:
        return "write dataset.revision: refs/convert/parquet, the hub's own conversion"
    if "Config name is missing" in text or "BuilderConfig" in text:
        return "write one of these as dataset.subset"
    return "correct dataset.split, dataset.subset or dataset.revision"


def _first_line(error: BaseException) -> str:
    """The message on one line: what the library lists under it (configurations, splits) is what a person needs."""
    return " ".join(str(error).split())[:400] or type(error).__name__
