"""What was rewritten, what was refused and why: printable, as data, as a diff and as a page."""

from __future__ import annotations

from pathlib import Path

from fxopt.errors import InvalidRequestError
from fxopt.report_data import ReportData
from fxopt.report_page import as_page
from fxopt.report_text import as_text


class Report(ReportData):
    """``fast.fxopt.report``: print it, ask it for a diff, or save it."""

    def __str__(self) -> str:
        return as_text(self)

    def save(self, path: str | Path) -> None:
        """Write ``.html`` (one page, no network), ``.json`` or ``.txt``."""
        path = Path(path)
        forms = {".html": as_page, ".json": ReportData.to_json, ".txt": as_text}
        if path.suffix not in forms:
            raise InvalidRequestError(f"{path} ends in {path.suffix!r}; a report is saved as {', '.join(forms)}")
        path.write_text(forms[path.suffix](self), encoding="utf-8")
