"""The budgets plugin without what it counts with: one line that says what to enable."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock import ConfigurationError
from penstock.testing import Harness

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(("others", "missing"), [((), "store"), (("store",), "prices")])
async def test_says_which_plugin_to_enable(tmp_path: Path, others: tuple[str, ...], missing: str) -> None:
    config = {"store": {"url": f"sqlite:///{tmp_path}/penstock.db"}} if others else {}
    with pytest.raises(ConfigurationError, match=f'put "{missing}" into \\[gateway\\] plugins'):
        async with Harness([*others, "budgets"], config=config, gateway={"anonymous": True}, bare=True):
            pass
