"""docs/configuration.md says what the settings themselves say."""

from __future__ import annotations

import importlib.util
from pathlib import Path

TOOL = Path(__file__).parents[2] / "tools" / "document_settings.py"


def test_the_page_is_current():
    spec = importlib.util.spec_from_file_location("document_settings", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert tool.PAGE.read_text() == tool.page(), "run python tools/document_settings.py"
    assert "| `loss.perception_coef` | `0.02` | number ≥ 0 |" in tool.page()
