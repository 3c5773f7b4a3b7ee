"""What every refusal of a request looks like."""

from __future__ import annotations

from fxopt.errors import FxoptError


def assert_sentence(error: BaseException, *words: str) -> None:
    """A ValueError with one line that holds these words."""
    text = str(error)
    assert isinstance(error, FxoptError)
    assert isinstance(error, ValueError)
    assert "\n" not in text
    for word in words:
        assert word in text, text
