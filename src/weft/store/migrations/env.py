"""What Alembic runs: the steps, on the connection and in the transaction that `weft.store.database` holds."""

from __future__ import annotations

from alembic import context

connection = context.config.attributes["connection"]
context.configure(connection=connection, target_metadata=None, transactional_ddl=True)
context.run_migrations()
