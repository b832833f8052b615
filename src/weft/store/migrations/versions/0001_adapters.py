"""Blobs, names, versions, aliases, and what versions can be searched by."""

from __future__ import annotations

import secrets

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def _key() -> sa.types.TypeEngine[int]:
    return sa.BigInteger().with_variant(sa.Integer, "sqlite")


def _of(table: str, ondelete: str | None = "CASCADE") -> sa.Column[int]:
    return sa.Column(f"{table}_id", _key(), sa.ForeignKey(f"{table}s.id", ondelete=ondelete), nullable=False)


def upgrade() -> None:
    """Make the tables."""
    meta = op.create_table(
        "meta",
        sa.Column("key", sa.String(64), primary_key=True),
        sa.Column("value", sa.Text, nullable=False),
    )
    op.bulk_insert(meta, [{"key": "store", "value": secrets.token_hex(16)}])
    op.create_table(
        "blobs",
        sa.Column("address", sa.String(96), primary_key=True),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.Column("files", sa.Text),
        sa.Column("touched", sa.Float(53), nullable=False),
    )
    op.create_table(
        "names",
        sa.Column("id", _key(), primary_key=True, autoincrement=True),
        sa.Column("owner", sa.String(128), nullable=False),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("folded", sa.String(128), nullable=False),
        sa.Column("last", sa.Integer, nullable=False),
        sa.Column("created", sa.Float(53), nullable=False),
        sa.UniqueConstraint("owner", "folded", name="one_name"),
    )
    op.create_index("names_by_name", "names", ["owner", "name"], postgresql_ops={"name": "text_pattern_ops"})
    op.create_table(
        "versions",
        sa.Column("id", _key(), primary_key=True, autoincrement=True),
        _of("name", None),
        sa.Column("owner", sa.String(128), nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("newest", sa.Integer, nullable=False),
        sa.Column("address", sa.String(96), sa.ForeignKey("blobs.address"), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("provenance", sa.String(64), nullable=False),
        sa.Column("created", sa.Float(53), nullable=False),
        sa.Column("note", sa.Text, nullable=False),
        sa.Column("base", sa.String(64), nullable=False),
        sa.Column("base_layout", sa.String(64), nullable=False),
        sa.Column("base_name", sa.Text, nullable=False),
        sa.Column("base_leaf", sa.Text, nullable=False),
        sa.Column("architecture", sa.Text, nullable=False),
        sa.Column("rank", sa.Integer, nullable=False),
        sa.Column("sites", sa.Integer, nullable=False),
        sa.Column("parameters", sa.BigInteger, nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.UniqueConstraint("name_id", "number", name="one_version"),
    )
    numbers = ["rank", "sites", "parameters", "bytes", "created"]
    op.create_index("versions_of_owner", "versions", ["owner", "newest", "id", "name_id", *numbers])
    op.create_index("versions_by_digest", "versions", ["digest"])
    op.create_index("versions_by_address", "versions", ["address"])
    op.create_index("versions_by_base", "versions", ["base"])
    op.create_index("versions_by_base_name", "versions", ["base_leaf"])
    for table, value in (("tags", sa.Text), ("metrics", sa.Float(53))):
        op.create_table(
            table,
            _of("version"),
            sa.Column("key", sa.String(128), nullable=False),
            sa.Column("value", value, nullable=False),
            sa.UniqueConstraint("version_id", "key", name=f"one_{table[:-1]}"),
        )
        op.create_index(f"{table}_by_value", table, ["key", "value", "version_id"])
    op.create_table(
        "parents",
        _of("version"),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("weight", sa.Float(53)),
        sa.UniqueConstraint("version_id", "position", name="one_parent"),
    )
    op.create_index("parents_by_digest", "parents", ["digest", "version_id"])
    op.create_table(
        "datasets",
        _of("version"),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("digest", sa.Text, nullable=False),
        sa.Column("source", sa.Text, nullable=False),
        sa.Column("role", sa.Text, nullable=False),
        sa.UniqueConstraint("version_id", "position", name="one_dataset"),
    )
    op.create_index("datasets_by_digest", "datasets", ["digest", "version_id"])
    op.create_index("datasets_by_source", "datasets", ["source", "version_id"])
    op.create_table(
        "aliases",
        _of("name"),
        sa.Column("alias", sa.String(128), nullable=False),
        sa.Column("version_id", _key(), sa.ForeignKey("versions.id"), nullable=False),
        sa.UniqueConstraint("name_id", "alias", name="one_alias"),
    )
    op.create_index("aliases_of_version", "aliases", ["version_id"])
