"""Remedies: what to do about a cause, as data with a text and, where there is one, a command."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dreplica.agreement.verdict.remedy_texts import REMEDIES
from dreplica.agreement.verdict.rendering import plain, render


@dataclass(frozen=True)
class Remedy:
    """One thing to do about a cause."""

    code: str
    """Stable identifier for programs: a key of `REMEDIES`."""
    text: str
    """The instruction, or an explanation of the command, rendered from `data`."""
    command: str | None = None
    """A line to paste: settings of the trainer, a shell command or code. None where there is none."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """The values that text and command are made from, as JSON values. `settings`: config keys to their new values."""

    @classmethod
    def of(cls, code: str, /, **data: Any) -> "Remedy":
        """Create the remedy of a code of the catalogue.

        Args:
            code: A key of `REMEDIES`.
            **data: The fields of its text and command. `settings` maps config keys to new values; the command is then
                made from it.
        """
        template = REMEDIES[code]
        settings = data.get("settings") or template.settings
        command = template.command and render(template.command, data)
        if settings:
            data = {**data, "settings": dict(settings)}
            command = " ".join(f"--{key} {_spell(value)}" for key, value in settings.items())
        return cls(code, render(template.text, data), command, plain(data))

    @property
    def settings(self) -> Mapping[str, Any]:
        """Config keys to the values that the remedy gives them; empty for other remedies."""
        settings: Mapping[str, Any] = self.data.get("settings", {})
        return settings

    def as_dict(self) -> dict[str, Any]:
        """Return code, text, command and data as JSON values."""
        return {"code": self.code, "text": self.text, "command": self.command, "data": dict(self.data)}

    def __str__(self) -> str:
        return f"{self.command}  # {self.text}" if self.command else self.text


def _spell(value: Any) -> str:
    return shlex.quote(value if isinstance(value, str) else json.dumps(value))
