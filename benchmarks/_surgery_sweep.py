"""Going through models one by one, whatever happens on the way."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, Protocol, TypeVar

from _harness import save_row


class _Row(Protocol):
    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]


R = TypeVar("R", bound=_Row)


def swept(
    names: Iterable[str], examine: Callable[[str], R | None], failed: Callable[[str, str], R], table: str | None
) -> Iterator[R]:
    """The rows that `examine` gives, put into `results/<table>.csv` as soon as they are known, if that is given.

    A model that can't be made or run does not end the sweep: its row is `failed(name, "failed: …")`. None is no row.
    """
    for name in names:
        try:
            row = examine(name)
        except Exception as error:  # as said: whatever it is
            row = failed(name, f"failed: {type(error).__name__}: {''.join(str(error).splitlines()[:1])[:150]}")
        gc.collect()
        if row is None:
            continue
        if table:
            save_row(table, dataclasses.asdict(row))
        yield row
