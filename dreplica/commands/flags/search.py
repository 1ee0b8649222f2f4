"""The search for a largest set of flags that can be disabled together, as pure functions."""

from collections.abc import Callable, Iterable, Sequence

FlagSet = frozenset[str]


def find_disabled(
    order: Sequence[str],
    agrees: Callable[[FlagSet], bool],
    confirmed: Callable[[FlagSet], bool],
    closed: Callable[[Iterable[str]], FlagSet] = frozenset,
) -> FlagSet:
    """Return a set of flags without which the job agrees, and which no other flag can be added to.

    Tries all flags at once. If the job does not agree without them, flags are disabled one after another, each
    permanently if the job still agrees. This repeats from the first flag until a pass disables none, because a flag may
    be needed only in combination with another. The result cannot grow, but need not be the only such set.

    Args:
        order: Flags in the order in which to disable them, the most expensive first.
        agrees: Returns True if the job has agreed without these flags in all tries. Called once per set.
        confirmed: Tries a set once more. If it fails, the flag disabled last is needed after all.
        closed: Adds the flags that have no effect without one of these.
    """
    known: dict[FlagSet, bool] = {}

    def may_disable(flags: FlagSet) -> bool:
        if flags not in known:
            known[flags] = agrees(flags)
        return known[flags]

    everything = closed(order)
    if may_disable(everything):
        known[everything] = confirmed(everything)
        if known[everything]:
            return everything
    while True:
        disabled = _disable_in_order(order, may_disable, closed)
        if not disabled or confirmed(disabled):
            return disabled
        known[disabled] = False


def _disable_in_order(
    order: Sequence[str], may_disable: Callable[[FlagSet], bool], closed: Callable[[Iterable[str]], FlagSet]
) -> FlagSet:
    disabled: FlagSet = frozenset()
    while True:
        before = disabled
        for flag in order:
            wider = closed(disabled | {flag})
            if wider != disabled and may_disable(wider):
                disabled = wider
        if disabled == before:
            return disabled
