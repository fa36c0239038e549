"""Official SDKs against one gateway process, started once for all of their tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from sdk.gateway_process import RunningGateway, running_gateway


@pytest.fixture(scope="session", autouse=True)
def plain_environment() -> Iterator[None]:
    """Keep what SDKs read from the environment away from them: accounts, addresses, proxies."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(("OPENAI_", "ANTHROPIC_")):
                patch.delenv(name)
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.setenv("no_proxy", "127.0.0.1")
        yield


@pytest.fixture(scope="session")
def gateway(tmp_path_factory: pytest.TempPathFactory, plain_environment: None) -> Iterator[RunningGateway]:
    """Serve with the mock provider; leaving asserts a clean end."""
    with running_gateway(tmp_path_factory.mktemp("gateway")) as running:
        yield running
