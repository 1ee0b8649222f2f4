"""Evidence: the observations that a verdict rests on, as data with a text."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dreplica.agreement.verdict.evidence_texts import EVIDENCE
from dreplica.agreement.verdict.rendering import plain, render


@dataclass(frozen=True)
class Evidence:
    """One observation that a verdict rests on."""

    code: str
    """Stable identifier for programs: a key of `EVIDENCE`."""
    text: str
    """The observation in words, rendered from `data`."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """The values that the text is made from, as JSON values."""

    @classmethod
    def of(cls, code: str, /, **data: Any) -> "Evidence":
        """Create the evidence of a code of the catalogue.

        Args:
            code: A key of `EVIDENCE`.
            **data: The fields of its text. Further ones are kept as data only.
        """
        return cls(code, render(EVIDENCE[code], data), plain(data))

    def as_dict(self) -> dict[str, Any]:
        """Return code, text and data as JSON values."""
        return {"code": self.code, "text": self.text, "data": dict(self.data)}

    def __str__(self) -> str:
        return self.text
