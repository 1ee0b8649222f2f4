"""The template of a remedy's text and command."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class RemedyTemplate:
    """The templates of one remedy."""

    text: str
    """The instruction, or an explanation of the command."""
    command: str | None = None
    """A line to paste. None where there is none, and for settings."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Config keys to new values: the command is made from them."""
