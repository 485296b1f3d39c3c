"""The runs of these tests take their data from the recipe alone."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def own_data_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable that names the shared data would win over the recipe's folder."""
    monkeypatch.delenv("SCALEMERGE_DATA", raising=False)
