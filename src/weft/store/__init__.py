"""A store of adapters: content-addressed, versioned, and whole at any moment, whoever is killed while writing.

    store = Store()                                  # in WEFT_STORE, or in the user's data directory
    ref = store.put(adapter, name="medical", tags={"domain": "health"})
    store.promote(ref, "prod", require="eval_loss<=prod")
    adapter = store.get("medical@prod")

    names.py       what a name may be, what a reference means
    records.py     what the store says: Version, Move
    predicates.py  conditions, as in eval_loss<2            query.py     filters as SQL
    blobs.py       directories of files under an address    packing.py   adapters as such directories
    tables.py      the tables                               database.py  SQLite or PostgreSQL, transactions; migrations/
    index.py       versions, aliases, owners                collect.py   gc and verify
    shelves.py     where adapters are pushed to and pulled from               lineage.py   what was made of what
    pages.py       the index as pages and JSON, and a server of them          finder.py    references where directories are taken

`Store` puts these together.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weft.store.records import Collected, Move, Verified, Version
    from weft.store.store import Store

__all__ = ["Collected", "Move", "Store", "Verified", "Version"]


def __getattr__(name: str) -> Any:
    """The public names, imported when they are used: whether there is a store can be asked without a database."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(
        importlib.import_module(f"weft.store.{'store' if name == 'Store' else 'records'}"), name
    )
    return value
