"""Wanting an error."""

import pytest


def refused(error, *words):
    """A context that wants this error, with all these words in its message."""
    return pytest.raises(error, match="(?s)" + "".join(f"(?=.*{word})" for word in words))
