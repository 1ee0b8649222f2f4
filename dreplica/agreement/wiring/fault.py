"""The error of a wiring check."""

from collections.abc import Sequence
from typing import Any

from dreplica.agreement.verdict.remedy import Remedy
from dreplica.errors import DreplicaError


class WiringError(DreplicaError, ValueError):
    """A fault in how model, optimizer and scheduler are connected.

    Args:
        text: The message for people.
        code: The cause: `optimizer-not-bound`, `parameters-not-optimized`, `scheduler-not-bound` or `storage-shared`.
        tensor: Name of the first tensor concerned, None if the fault concerns no single tensor.
        remedies: What to do, each an alternative.
        **fields: Further data that the text is made from.

    Attributes:
        code: The cause, as in a verdict.
        fields: The data that the text is made from, `tensor` and `remedies` included.
    """

    def __init__(
        self, text: str, *, code: str, tensor: str | None = None, remedies: Sequence[Remedy] = (), **fields: Any
    ) -> None:
        super().__init__(text, code=code, tensor=tensor, remedies=list(remedies), **fields)

    @property
    def tensor(self) -> str | None:
        """Name of the first tensor concerned, None if the fault concerns no single tensor."""
        return self.fields["tensor"]

    @property
    def remedies(self) -> list[Remedy]:
        """What to do, each an alternative."""
        return self.fields["remedies"]
