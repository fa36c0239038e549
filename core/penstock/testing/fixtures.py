"""pytest fixtures, there wherever penstock is installed; nothing is imported until a test asks for one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from penstock.testing.harness import Harness
    from penstock.testing.upstream import FakeUpstream


@pytest.fixture
def harness() -> type[Harness]:
    """Give ``Harness``: ``async with harness(plugins=[MyPlugin]) as gateway: ...``."""
    from penstock.testing.harness import Harness  # noqa: PLC0415 - runs of other projects do not pay for it

    return Harness


@pytest.fixture
def fake_upstream() -> type[FakeUpstream]:
    """Give ``FakeUpstream``: ``upstream = fake_upstream([[http_reply(b"{}")]])``."""
    from penstock.testing.upstream import FakeUpstream  # noqa: PLC0415

    return FakeUpstream
