"""One tiny world for all tests of the command line."""

from __future__ import annotations

import pytest

from tests.unit.cli.support import World, make_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Base, adapter and data on disk. Read only."""
    return make_world(tmp_path_factory.mktemp("world"))
