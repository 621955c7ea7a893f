"""RUN/certificate: the JSON of every certificate, step_N.json, and its page, step_N.html.

The certificates of a run's starts are kept, and all that failed; of the others, the last two.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from megatron_papo.files.small_files import STEP_NAME, read_object, write_atomically
from megatron_papo.parity.certificate import Certificate
from megatron_papo.parity.certificate_page import certificate_page

_NUM_KEPT = 2


class CertificateFolder:
    """The folder RUN/certificate, which holds the certificates of a run and their page."""

    def __init__(self, path: Path, warn: Callable[[str], None]):
        self.path, self._warn = path, warn
        self._unreadable: set[Path] = set()

    def page_of(self, step: int) -> Path:
        """Where the page of the certificate after `step` steps lies."""
        return self.path / f"step_{step:08d}.html"

    def write(self, certificate: Certificate) -> None:
        """Writes both files, each whole or not at all, and removes old ones. A full disk is a warning."""
        page = self.page_of(certificate.step)
        text = json.dumps(certificate.as_json(), indent=1, allow_nan=False)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for path, content in ((page, certificate_page(certificate)), (page.with_suffix(".json"), text)):
                write_atomically(path, content)
            self._remove_old()
        except OSError as error:
            self._warn(f"{error.strerror}: {error.filename}: the certificate of step {certificate.step} is not written")

    def _remove_old(self) -> None:
        """Removes the oldest that passed. One that cannot be read may have failed: it stays, with one warning."""
        removable = []
        for path in sorted(self.path.glob("step_*.json")):
            if not STEP_NAME.fullmatch(path.stem) or path in self._unreadable:
                continue
            try:
                tree = read_object(path)
            except ValueError as error:
                self._unreadable.add(path)
                self._warn(f"{error}: a certificate that is damaged; it is left as it is")
                continue
            if tree.get("passed") is True and tree.get("at_start") is False:
                removable.append(path)
        for path in removable[:-_NUM_KEPT]:
            path.unlink()
            path.with_suffix(".html").unlink(missing_ok=True)
