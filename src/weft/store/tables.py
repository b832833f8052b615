"""The tables of the index, as they are after the last migration.

Made and changed by `weft.store.migrations` alone; a test compares both. Times are seconds since 1970, in UTC.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

__all__ = [
    "HEAD",
    "aliases",
    "blobs",
    "datasets",
    "meta",
    "metadata",
    "metrics",
    "moves",
    "names",
    "parents",
    "tags",
    "versions",
]

HEAD = "0002"
"""The last migration. Numbers, so that an older weft sees that a store is newer than itself."""

metadata = MetaData()

_Key = BigInteger().with_variant(Integer, "sqlite")  # SQLite counts up INTEGER keys only


def _id() -> Column[int]:
    return Column("id", _Key, primary_key=True, autoincrement=True)


def _of(table: str, *, cascade: bool = True) -> Column[int]:
    return Column(
        f"{table}_id", _Key, ForeignKey(f"{table}s.id", ondelete="CASCADE" if cascade else None), nullable=False
    )


meta = Table("meta", metadata, Column("key", String(64), primary_key=True), Column("value", Text, nullable=False))
"""``store``: the id of the store, which stands beside its blobs too."""

blobs = Table(
    "blobs",
    metadata,
    Column("address", String(96), primary_key=True),  # the folder: the digest, and the proof's where there is one
    Column("bytes", BigInteger, nullable=False, default=0),
    Column("files", Text),  # JSON: size and hash by name, see weft.hashes; NULL until the files are known to be there
    Column("touched", Float(53), nullable=False),  # the last put that counted on it
)

names = Table(
    "names",
    metadata,
    _id(),
    Column("owner", String(128), nullable=False),
    Column("name", String(128), nullable=False),
    Column("folded", String(128), nullable=False),  # lower case: two names never differ by case alone
    Column("last", Integer, nullable=False, default=0),  # the highest number ever given; numbers are never given again
    Column("created", Float(53), nullable=False),
    UniqueConstraint("owner", "folded", name="one_name"),
    Index("names_by_name", "owner", "name", postgresql_ops={"name": "text_pattern_ops"}),  # also by its start
)

_NUMBERS = ("rank", "sites", "parameters", "bytes", "created")

versions = Table(
    "versions",
    metadata,
    _id(),
    _of("name", cascade=False),
    Column("owner", String(128), nullable=False),
    Column("number", Integer, nullable=False),
    Column("newest", Integer, nullable=False),  # 1 for the highest number that is there
    Column("address", String(96), ForeignKey("blobs.address"), nullable=False),
    Column("digest", String(64), nullable=False),
    Column("provenance", String(64), nullable=False),  # sha256 of provenance/<sha256>.json in the blob
    Column("created", Float(53), nullable=False),
    Column("note", Text, nullable=False, default=""),
    Column("base", String(64), nullable=False, default=""),  # fingerprint of the base: its weights
    Column("base_layout", String(64), nullable=False, default=""),
    Column("base_name", Text, nullable=False, default=""),
    Column("base_leaf", Text, nullable=False, default=""),  # the last part of base_name
    Column("architecture", Text, nullable=False, default=""),
    Column("rank", Integer, nullable=False),  # the largest
    Column("sites", Integer, nullable=False),
    Column("parameters", BigInteger, nullable=False),
    Column("bytes", BigInteger, nullable=False),  # of the blob's files
    UniqueConstraint("name_id", "number", name="one_version"),
    Index("versions_of_owner", "owner", "newest", "id", "name_id", *_NUMBERS),  # answers filters by itself
    Index("versions_by_digest", "digest"),
    Index("versions_by_address", "address"),
    Index("versions_by_base", "base"),
    Index("versions_by_base_name", "base_leaf"),
)

tags = Table(
    "tags",
    metadata,
    _of("version"),
    Column("key", String(128), nullable=False),
    Column("value", Text, nullable=False),
    UniqueConstraint("version_id", "key", name="one_tag"),
    Index("tags_by_value", "key", "value", "version_id"),
)

metrics = Table(
    "metrics",
    metadata,
    _of("version"),
    Column("key", String(128), nullable=False),
    Column("value", Float(53), nullable=False),
    UniqueConstraint("version_id", "key", name="one_metric"),
    Index("metrics_by_value", "key", "value", "version_id"),
)

parents = Table(
    "parents",
    metadata,
    _of("version"),
    Column("position", Integer, nullable=False),
    Column("digest", String(64), nullable=False),
    Column("weight", Float(53)),
    UniqueConstraint("version_id", "position", name="one_parent"),
    Index("parents_by_digest", "digest", "version_id"),
)

datasets = Table(
    "datasets",
    metadata,
    _of("version"),
    Column("position", Integer, nullable=False),
    Column("digest", Text, nullable=False),
    Column("source", Text, nullable=False),
    Column("role", Text, nullable=False),
    UniqueConstraint("version_id", "position", name="one_dataset"),
    Index("datasets_by_digest", "digest", "version_id"),
    Index("datasets_by_source", "source", "version_id"),
)

aliases = Table(
    "aliases",
    metadata,
    _of("name"),
    Column("alias", String(128), nullable=False),
    Column("version_id", _Key, ForeignKey("versions.id"), nullable=False),  # an alias keeps its version
    UniqueConstraint("name_id", "alias", name="one_alias"),
    Index("aliases_of_version", "version_id"),
)

moves = Table(
    "moves",
    metadata,
    _id(),
    _of("name"),
    Column("alias", String(128), nullable=False),
    Column("kind", String(16), nullable=False),  # promote, rollback, remove
    Column("before", Integer),  # numbers of versions
    Column("after", Integer),
    Column("undone", Integer, nullable=False, default=0),  # 1: a rollback took it back
    Column("required", Text, nullable=False, default=""),
    Column("at", Float(53), nullable=False),
    Column("by", Text, nullable=False, default=""),
    Index("moves_of_alias", "name_id", "alias", "id"),
)
