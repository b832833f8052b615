"""The history of aliases. Aliases that are there already begin it with the version that they point to."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the table, and the first move of every alias."""
    key = sa.BigInteger().with_variant(sa.Integer, "sqlite")
    op.create_table(
        "moves",
        sa.Column("id", key, primary_key=True, autoincrement=True),
        sa.Column("name_id", key, sa.ForeignKey("names.id", ondelete="CASCADE"), nullable=False),
        sa.Column("alias", sa.String(128), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("before", sa.Integer),
        sa.Column("after", sa.Integer),
        sa.Column("undone", sa.Integer, nullable=False),
        sa.Column("required", sa.Text, nullable=False),
        sa.Column("at", sa.Float(53), nullable=False),
        sa.Column("by", sa.Text, nullable=False),
    )
    op.create_index("moves_of_alias", "moves", ["name_id", "alias", "id"])
    op.execute(
        'INSERT INTO moves (name_id, alias, kind, before, "after", undone, required, at, "by") '
        "SELECT aliases.name_id, aliases.alias, 'promote', NULL, versions.number, 0, '', versions.created, '' "
        "FROM aliases JOIN versions ON versions.id = aliases.version_id"
    )
