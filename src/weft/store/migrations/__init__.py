"""Migrations of the index, in Alembic's layout. `weft.store.database` runs them; by hand nobody has to."""
