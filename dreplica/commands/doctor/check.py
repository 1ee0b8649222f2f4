"""One thing that the doctor looks at."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["ok", "warn", "bad", "unknown"]
"""`bad`: strict mode would not hold here. `warn`: it would, but a loop that sets no flags of its own, or another
machine, may come to other numbers. `unknown`: what it takes to find out is not there."""


@dataclass(frozen=True)
class Check:
    """What was looked at, what was seen, why it matters and what to do."""

    name: str
    status: Status
    seen: str
    why: str = ""
    remedy: tuple[str, ...] = ()
    """Lines to paste, or things to do; a remark follows a `#`."""

    def as_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)
