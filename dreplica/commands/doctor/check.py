"""The result of one check of `dreplica doctor`."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["ok", "warn", "bad", "unknown"]
"""`bad`: strict mode does not hold here. `warn`: it holds, but a loop that sets no flags, or another machine, may get
other numbers. `unknown`: the check is not possible here."""


@dataclass(frozen=True)
class Check:
    """A check: what was found, why it matters and what to do."""

    name: str
    status: Status
    seen: str
    why: str = ""
    remedy: tuple[str, ...] = ()
    """Lines to paste, or instructions. A remark follows a `#`."""

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON values."""
        return asdict(self)
