"""Models of both kinds of head."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(params=["tied", "untied"])
def any_model(request: pytest.FixtureRequest, tiny_model: Path, tiny_untied_model: Path) -> Path:
    return tiny_model if request.param == "tied" else tiny_untied_model
