"""Which flags can be given up together. Pure: what it takes to find out is the caller's."""

from collections.abc import Callable, Iterable, Sequence

FlagSet = frozenset[str]


def give_up(
    order: Sequence[str],
    agrees: Callable[[FlagSet], bool],
    confirmed: Callable[[FlagSet], bool],
    closed: Callable[[Iterable[str]], FlagSet] = frozenset,
) -> FlagSet:
    """A set of flags without which the job agrees, and to which none of the others can be added.

    All at once if that will do; otherwise one after another, each for good if the job agrees without it and those given
    up before, and again from the first until a whole pass gives up none: a flag may be needed only beside another. This
    ends in a set that cannot grow, which need not be the only one.

    Args:
        order: flags in the order in which to give them up: the most expensive first.
        agrees: whether the job agrees without these flags, as far as it has been tried; asked once for each set.
        confirmed: tries a set once more; where it fails, the flag given up last is needed after all.
        closed: adds the flags that have no effect without one of these.
    """
    known: dict[FlagSet, bool] = {}

    def may_go(flags: FlagSet) -> bool:
        if flags not in known:
            known[flags] = agrees(flags)
        return known[flags]

    everything = closed(order)
    if may_go(everything):
        known[everything] = confirmed(everything)
        if known[everything]:
            return everything
    while True:
        given_up = _as_many_as_may(order, may_go, closed)
        if not given_up or confirmed(given_up):
            return given_up
        known[given_up] = False


def _as_many_as_may(
    order: Sequence[str], may_go: Callable[[FlagSet], bool], closed: Callable[[Iterable[str]], FlagSet]
) -> FlagSet:
    given_up: FlagSet = frozenset()
    while True:
        before = given_up
        for flag in order:
            wider = closed(given_up | {flag})
            if wider != given_up and may_go(wider):
                given_up = wider
        if given_up == before:
            return given_up
