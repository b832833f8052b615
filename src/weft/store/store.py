"""Store: adapters kept by name and version, in one place.

Listing needs no torch: what reads or writes adapters is imported when it is asked for. Puts the parts together: blobs hold the files, the index says what they are and whose. A version counts from the moment at
which the index is committed; files are there before.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.errors import DamagedError, NotInStoreError, StoreError
from weft.store.blobs import MAX_PROVENANCE, Blobs, Files, LocalBlobs
from weft.store.collect import collect, verify
from weft.store.database import Database, sqlite_url
from weft.store.index import Index
from weft.store.lineage import Lineage, lineage
from weft.store.names import parse_name
from weft.store.places import INDEX_FILE, default_index, default_owner, default_place
from weft.store.query import Filter
from weft.store.records import Collected, Move, Verified, Version
from weft.store.remote import open_blobs

if TYPE_CHECKING:
    from weft.adapter import Adapter, Provenance
    from weft.store.differing import Difference
    from weft.store.exchange import Transfer

__all__ = ["Store"]

_ATTEMPTS = 20
DAY = 86400.0


class Store:
    """Adapters by name, version, alias and digest.

    Safe for threads, and for many processes on one machine (SQLite) or many machines (PostgreSQL) at once.

    Args:
        url: where the blobs are: a directory, or a URL that fsspec knows (``s3://bucket/prefix``). Default: ``WEFT_STORE``, or ``weft/store``
            in the user's data directory.
        index: a database: ``postgresql://user@host/name`` or ``sqlite:////path/index.sqlite``. Default: ``WEFT_STORE_INDEX``, or
            ``index.sqlite`` in the directory.
        owner: whose adapters are seen and changed. Default: ``WEFT_OWNER``, or ``local``.
        options: for the filesystem of a URL, e.g. ``{"endpoint_url": "http://127.0.0.1:9000"}``.
        create: make it where there is none; False: that is an error.

    Raises:
        StoreError: it can't be opened, a later weft made it, or index and blobs belong to different stores.
        MissingDependencyError: a library for such a URL is missing.

    Example:
        >>> store = weft.Store("adapters")  # doctest: +SKIP
        >>> ref = store.put(adapter, name="medical", tags={"domain": "health"})  # doctest: +SKIP
        >>> str(ref), store.get("medical") == adapter  # doctest: +SKIP
        ('medical@1', True)
    """

    def __init__(
        self,
        url: str | os.PathLike[str] | None = None,
        *,
        index: str | None = None,
        owner: str | None = None,
        options: Mapping[str, Any] | None = None,
        create: bool = True,
    ) -> None:
        place = default_place() if url is None else os.fspath(url)
        self.blobs: Blobs = open_blobs(place, options)
        wanted = index if index is not None else default_index()
        if wanted is None and not isinstance(self.blobs, LocalBlobs):
            raise StoreError(
                f"{place}: blobs there need an index elsewhere: give index=… or WEFT_STORE_INDEX, a URL such as postgresql://user@host/name. "
                "To fetch what was pushed there: weft store pull"
            )
        if wanted is None:
            assert isinstance(self.blobs, LocalBlobs)
            if not create and not (self.blobs.root / INDEX_FILE).is_file():
                raise NotInStoreError(
                    f"there is no store in {self.blobs.root} yet: weft store put PATH --name NAME makes it"
                )
            self._make(self.blobs.root)
            database = Database.at(sqlite_url(self.blobs.root / INDEX_FILE))
        else:
            database = Database.at(wanted)
        self.index = Index(database, owner if owner is not None else default_owner())
        key = self.index.key()
        there = self.blobs.mark(key)
        if there != key:
            raise StoreError(
                f"{self.blobs.shown} holds the blobs of another store than the index {database.shown}: give both as they belong together"
            )

    def __repr__(self) -> str:
        return f"Store({self.blobs.shown!r}, index={self.index.database.shown!r}, owner={self.owner!r})"

    @property
    def owner(self) -> str:
        """Whose adapters are seen and changed."""
        return self.index.owner

    @property
    def place(self) -> str:
        """Where the blobs are."""
        return self.blobs.shown

    def close(self) -> None:
        """Close the connections to the index; the next call opens them again."""
        self.index.database.close()

    # put and get

    def put(
        self,
        adapter: Adapter | str | os.PathLike[str],
        name: str,
        *,
        tags: Mapping[str, str] | None = None,
        metrics: Mapping[str, float] | None = None,
        note: str = "",
        again: bool = False,
        number: int | None = None,
    ) -> Version:
        """Keep an adapter as the next version of a name. When this returns, it is on the disk.

        Args:
            adapter: an adapter, or whatever `weft.load` reads.
            name: new or known.
            tags: labels.
            metrics: in addition to those of ``adapter.provenance.evaluation``; the given ones win.
            note: one remark for people.
            again: make a version also where the newest one is the same adapter with the same provenance, tags and metrics. Else that one
                is given back, so that a put can be tried again after a failure.
            number: the number of a version that comes from another store.

        Returns:
            The version.

        Raises:
            StoreError: a name, tag or metric that can't be; a disk that is full; nothing was changed then.
            FormatError: the adapter can't be read.
        """
        from weft.adapter import Adapter
        from weft.store.packing import address_of, draft_of, pack_provenance

        parse_name(name)
        value = adapter if isinstance(adapter, Adapter) else _load(adapter)
        provenance, said = pack_provenance(value.provenance)
        draft = draft_of(value, provenance, tags or {}, metrics or {}, note)
        where = f"provenance/{provenance}.json"
        for _ in range(_ATTEMPTS):
            files = self._write(value, where, said)
            if files is None:
                continue
            address = address_of(value)
            settle = functools.partial(self._settle, address, where, files)
            version = self.index.add(name, draft, address, settle, number=number, again=again)
            if version is not None:
                return version
        raise StoreError(
            f"{self.place}: a blob of {name} is removed by others as often as it is written; try again, with a longer grace time of gc"
        )

    def _settle(self, address: str, provenance: str, mine: Files, known: Files | None) -> Files | None:
        """Which files a blob has, of those that the index knows and those that were written; None if it went away."""
        asked = (files for files in (known, mine) if files and self.blobs.seems(address, files, provenance))
        return next(asked, None)

    def _write(self, adapter: Adapter, name: str, provenance: bytes) -> Files | None:
        """See to it that a blob is there, with a provenance; None if somebody removed it in between."""
        from weft.store.packing import address_of, has_digest, pack

        with self.blobs.stage() as folder:
            files = None
            if not has_digest(adapter):  # computing it costs as much as writing, and goes on meanwhile
                files = pack(adapter, folder, name, provenance)
            address = address_of(adapter)
            known = self.index.files(address) if self.blobs.sizes(address) else None
            try:
                if known and self.blobs.holds(address, known):
                    self.blobs.add(address, name, provenance)
                    return known
                files = files or pack(adapter, folder, name, provenance)
                self.blobs.install(address, folder, files, known)
            except FileNotFoundError:
                return None
        return files

    def get(self, ref: str | Version) -> Adapter:
        """The adapter that a reference means, every byte of it verified.

        Args:
            ref: ``"medical"`` (the newest version), ``"medical@3"``, ``"medical@prod"``, the first digits of a digest, or a version.

        Raises:
            NotInStoreError: it means nothing here; names near ones.
            DamagedError: files are not what was put; says which.
        """
        from weft.store.packing import unpack

        version = self.version(ref)
        try:
            provenance = self._provenance(version)
            files = self.index.files(version.address)
            with self.blobs.fetch(version.address, files) as folder:
                return unpack(folder, version.digest, provenance, files)
        except DamagedError:
            self.version(str(version))  # removed while it was read: then this says so
            raise

    def provenance(self, ref: str | Version) -> Provenance:
        """Where a version comes from.

        Raises:
            NotInStoreError, DamagedError: as `get`.
        """
        return self._provenance(self.version(ref))

    def _provenance(self, version: Version) -> Provenance:
        from weft.store.packing import unpack_provenance

        name = version.provenance
        data = self.blobs.read(version.address, f"provenance/{name}.json", MAX_PROVENANCE)
        return unpack_provenance(data, name, f"{self.place}: blob {version.address[:12]}")

    def files(self, ref: str | Version) -> dict[str, int]:
        """Name and bytes of each file of a version."""
        return {name: facts.size for name, facts in self.index.files(self.version(ref).address).items()}

    def export(self, ref: str | Version, out: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write a version as a plain adapter directory, as ``adapter.save`` does; PEFT reads it, if it can hold such an adapter.

        Raises:
            FormatError: an adapter stands there already, or it can't be written.
            NotInStoreError, DamagedError: as `get`.
        """
        version = self.version(ref)
        for_peft = "adapter_config.json" in self.index.files(version.address)
        return self.get(version).save(out, overwrite=overwrite, for_peft=for_peft)

    def push(
        self, url: str, *refs: str, options: Mapping[str, Any] | None = None, progress: bool | None = None
    ) -> Transfer:
        """Copy versions to another place, with numbers, tags, metrics, provenance and aliases.

        Args:
            url: a directory, ``s3://bucket/prefix``, ``hf://org/name``, or the directory of another store.
            refs: names (all their versions) and versions; none: everything that the owner has.
            options: for fsspec's filesystem.
            progress: None: a bar on a terminal; False: silence.

        Raises:
            StoreError: a version is there already with another adapter; the place can't be written.
            DamagedError: a version's files are not what was put; nothing of it was pushed.
        """
        from weft.store.exchange import push

        return push(self, url, refs, options, progress)

    def pull(
        self,
        url: str,
        *refs: str,
        name: str | None = None,
        options: Mapping[str, Any] | None = None,
        progress: bool | None = None,
    ) -> Transfer:
        """Copy versions from another place; every byte is verified. Aliases that are new here come with them.

        Args:
            url: as in `push`; or the address of ``weft store serve-index``.
            refs: names (all their versions) and versions; none: everything that is there.
            name: what the name is to be here.
            progress: None: a bar on a terminal; False: silence.

        Raises:
            NotInStoreError: it isn't there.
            StoreError: a version is here already with another adapter.
            FormatError, DamagedError: what is there can't be trusted: says why.
        """
        from weft.store.exchange import pull

        return pull(self, url, refs, name, options, progress)

    # looking

    def version(self, ref: str | Version) -> Version:
        """What a reference means.

        Raises:
            NotInStoreError: nothing; names near ones.
        """
        return self.index.version(str(ref))

    def versions(self, name: str) -> list[Version]:
        """All versions of a name, the newest first.

        Raises:
            NotInStoreError: no such name.
        """
        return self.index.versions(name)

    def find(
        self,
        *,
        name: str | None = None,
        base: str | None = None,
        tags: Mapping[str, str] | None = None,
        where: str | None = None,
        data: str | None = None,
        alias: str | None = None,
        all_versions: bool = False,
        limit: int = 100,
    ) -> list[Version]:
        """The newest version of each name that a filter lets through, the newest first.

        Args:
            name: exact, or its start: ``"med*"``.
            base: first digits of a base's fingerprint, or its name.
            tags: that it has to have.
            where: a condition over metrics and fields: ``"eval_loss<2 and rank>=8 or tag.domain=health"``.
            data: first digits of the digest, or the source, of a data set that it was trained on.
            alias: only versions that such an alias points to.
            all_versions: every version, not the newest of each name alone.
            limit: at most as many.

        Raises:
            StoreError: a filter that can't be read; says where.
        """
        return self.index.find(Filter(name, base, tags or {}, where, data, alias, all_versions, limit))

    def lineage(self, ref: str | Version) -> Lineage:
        """What an adapter was made of, and that of what: ``.text()`` and ``.svg()``.

        Raises:
            NotInStoreError: no such adapter.
        """
        return lineage(self, ref)

    def diff(self, first: str | Version, second: str | Version) -> Difference:
        """What differs between two versions: settings, sites, updates, metrics, tags, data.

        Raises:
            NotInStoreError, DamagedError: as `get`.
        """
        from weft.store.differing import difference

        one, two = self.version(first), self.version(second)
        return difference(one, self.get(one), two, self.get(two))

    def moves(self, name: str) -> list[Move]:
        """The history of a name's aliases, the newest first.

        Raises:
            NotInStoreError: no such name.
        """
        return self.index.moves(name)

    # changing

    def tag(
        self,
        ref: str | Version,
        add: Mapping[str, str] | None = None,
        *,
        remove: Iterable[str] = (),
        metrics: Mapping[str, float] | None = None,
    ) -> Version:
        """Set and remove tags; add metrics, which then never change.

        Raises:
            NotInStoreError: no such version, or a tag to remove that it hasn't.
            StoreError: a metric that it has with another value.
        """
        reference = str(self.version(ref))
        if metrics:
            self.index.measure(reference, metrics)
        return self.index.tag(reference, add or {}, remove)

    def promote(self, ref: str | Version, alias: str, *, require: str | None = None) -> Move:
        """Point an alias to a version, in one step; both stay as they are if the requirement isn't met.

        Args:
            require: a condition over the version's metrics. A word on the right is an alias of the same name:
                ``"eval_loss<=prod"`` asks for no worse a loss than that of the version that ``prod`` points to. An alias that
                doesn't exist yet can be required of only when it is the one to be moved; then there is nothing to compare with.

        Raises:
            RequirementError: it isn't met; says by which numbers.
            NotInStoreError: no such version.
        """
        return self.index.promote(str(ref), alias, require)

    def rollback(self, name: str, alias: str) -> Move:
        """Take back an alias's last promotion; called again, the one before it.

        Raises:
            NotInStoreError: there is nothing before, or it was removed.
        """
        return self.index.rollback(name, alias)

    def remove(self, ref: str | Version) -> list[Version]:
        """Remove a version, or with a name alone all its versions. Files stay until `gc`; numbers are never given again.

        Raises:
            StoreError: an alias points to it.
        """
        return self.index.remove(str(ref))

    def unalias(self, name: str, alias: str) -> Move:
        """Remove an alias; the version stays.

        Raises:
            NotInStoreError: no such alias.
        """
        return self.index.unalias(name, alias)

    # keeping

    def gc(self, *, grace: float = DAY, dry_run: bool = False) -> Collected:
        """Remove blobs that no version of any owner refers to, and that nobody counted on for a while.

        Args:
            grace: seconds. A put that runs meanwhile is safe with any value: it sees that its blob went away, and writes it again.
            dry_run: only say what would be removed.
        """
        return collect(self.index.database, self.blobs, grace, dry_run)

    def verify(self, *, progress: bool | None = None) -> Verified:
        """Hash every byte of every blob, of all owners, and compare it with the index.

        Args:
            progress: None: a bar on a terminal; False: silence.
        """
        return verify(self.index.database, self.blobs, progress)

    def _make(self, root: Path) -> None:
        """The directory of a local store."""
        try:
            root.mkdir(parents=True, exist_ok=True)
            (root / "blobs").mkdir(exist_ok=True)
        except OSError as problem:
            raise StoreError(
                f"{root}: no store can be here: {problem.strerror}; give another directory, or set WEFT_STORE"
            ) from problem


def _load(source: str | os.PathLike[str]) -> Adapter:
    from weft.formats import load

    return load(source)
