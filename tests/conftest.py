"""What every test shares: both event loops, hypothesis profiles, recorded provider replies."""

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

_RECORDINGS = Path(__file__).parents[2] / "shared" / "recordings"

settings.register_profile("ci", deadline=None, max_examples=50)
settings.register_profile(
    "full", deadline=None, max_examples=1000, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("full" if os.environ.get("PENSTOCK_TESTS") == "full" else "ci")


@pytest.fixture(
    params=[
        pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
        pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
    ]
)
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """Run every test marked ``anyio`` on both event loops."""
    return request.param


@pytest.fixture(scope="session")
def recordings() -> Path:
    """Return the folder of recorded provider replies; without it the test is skipped, and loudly."""
    if not _RECORDINGS.is_dir():
        message = f"no recorded provider replies at {_RECORDINGS}: the tests that read them are skipped"
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn(message, stacklevel=2)
        pytest.skip(message)
    return _RECORDINGS
