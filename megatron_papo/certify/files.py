"""RUN/certificate: of every certificate its JSON, step_N.json, and the page beside it.

That of a run's start stays, and every one that failed; of the others the last two.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from megatron_papo.certify.certificate import Certificate
from megatron_papo.certify.page import certificate_page

_KEPT = 2


class Folder:
    """RUN/certificate."""

    def __init__(self, path: Path, warn: Callable[[str], None]):
        self.path, self._warn = path, warn

    def page_of(self, step: int) -> Path:
        return self.path / f"step_{step:08d}.html"

    def write(self, certificate: Certificate) -> None:
        """Both files, each whole or not at all, and away with the oldest. A full disk costs the files, not the run."""
        page = self.page_of(certificate.step)
        text = json.dumps(certificate.as_json(), indent=1, allow_nan=False)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for path, content in ((page, certificate_page(certificate)), (page.with_suffix(".json"), text)):
                draft = path.with_name(path.name + ".tmp")
                draft.write_text(content, "utf-8")
                draft.replace(path)
            self._remove_old()
        except OSError as error:
            self._warn(f"{error.strerror}: {error.filename}: the certificate of step {certificate.step} is not written")

    def _remove_old(self) -> None:
        found = {path: json.loads(path.read_text()) for path in sorted(self.path.glob("step_*.json"))}
        plain = [path for path, tree in found.items() if tree["passed"] and not tree["at_start"]]
        for path in plain[:-_KEPT]:
            path.unlink()
            path.with_suffix(".html").unlink(missing_ok=True)
