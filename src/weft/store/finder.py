"""References where directories are taken: ``weft.load("medical@prod")``, ``weft eval --adapter medical@prod``.

A file or directory of that name wins, and what else the name means is said. `weft.sources` asks here; nothing of a database is
imported while there is no store.
"""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING

from weft.errors import NotInStoreError, StoreError, WeftError
from weft.sources import Found
from weft.store.places import default_index, default_owner, default_place, is_there

if TYPE_CHECKING:
    from weft.store.store import Store

__all__ = ["find"]

logger = logging.getLogger(__name__)


def find(text: str, is_path: bool) -> Found | None:
    """What a name means in the store that nobody named; see `weft.sources.register`.

    Raises:
        StoreError: the store can't be opened, and the text is nothing but a reference.
    """
    if not is_there():
        return (
            None
            if is_path or "@" not in text
            else Found(
                text, hint=f"and there is no store in {default_place()} yet: weft store put DIR --name NAME makes it"
            )
        )
    if is_path and default_index() is not None:
        return None  # no connection for the sake of a remark
    try:
        store = _opened(default_place(), default_index(), default_owner())
        version = store.version(text)
    except NotInStoreError as problem:
        return None if is_path else Found(text, hint=f"and {problem}")
    except WeftError as problem:
        if is_path:
            logger.debug("%s: the store was not asked: %s", text, problem)
            return None
        if not isinstance(problem, StoreError) or "@" in text:
            raise
        return Found(text, hint=f"and as a name in the store: {problem}")
    if is_path:
        way_out = (
            f"{version.name}@{version.number} is the store's" if "@" not in text else "rename it to reach the store's"
        )
        logger.warning("%s is a path here, and %s in the store: the path is taken; %s", text, version, way_out)
        return None
    return Found(str(version), functools.partial(store.get, version), store.files(version))


@functools.lru_cache(maxsize=4)
def _opened(place: str, index: str | None, owner: str) -> Store:
    from weft.store.store import Store

    return Store(place, index=index, owner=owner, create=False)
