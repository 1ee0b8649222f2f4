"""Search for the flags that can be disabled together, on simulated jobs."""

from collections.abc import Callable, Iterable

from hypothesis import given
from hypothesis import strategies as st

from dreplica.commands.flags.search import find_disabled

FLAGS = ("mode", "fill", "cudnn", "benchmark", "workspace")
Asked = list[frozenset[str]]


def search(
    order: str, job: Callable[[frozenset[str]], bool], confirms: Callable[[frozenset[str]], bool] = lambda _: True
) -> tuple[frozenset[str], Asked, Asked]:
    """Return the disabled flags, the sets that were tried and those tried once more."""
    tried: Asked = []
    confirmed: Asked = []

    def agrees(flags: frozenset[str]) -> bool:
        tried.append(flags)
        return job(flags)

    def again(flags: frozenset[str]) -> bool:
        confirmed.append(flags)
        return confirms(flags)

    return find_disabled(order.split(), agrees, again), tried, confirmed


def test_search_confirms_job_that_needs_no_flag() -> None:
    """A job that needs no flag is tried without all of them, and once more to confirm."""
    found, tried, confirmed = search("a b c", lambda _: True)
    assert found == {"a", "b", "c"}
    assert tried == confirmed == [{"a", "b", "c"}]


def test_search_disables_more_expensive_of_two_sufficient_flags() -> None:
    """Where either of two flags suffices, the more expensive one is disabled."""
    assert search("a b", lambda flags: flags != {"a", "b"})[0] == {"a"}
    assert search("b a", lambda flags: flags != {"a", "b"})[0] == {"b"}


def test_search_retries_flag_needed_only_with_another() -> None:
    """A flag that is needed only together with another is tried again without that one."""
    # cuBLAS without its workspace raises in strict mode, and is left alone in mode off.
    job = {frozenset({"mode"}): True, frozenset({"mode", "workspace"}): True}
    found, tried, _ = search("workspace other mode", lambda flags: job.get(flags, False))
    assert found == {"mode", "workspace"}
    assert tried.count(frozenset({"workspace"})) == 1


def test_unconfirmed_set_loses_its_last_flag() -> None:
    found, tried, confirmed = search(
        "a b c", lambda flags: flags != {"a", "b", "c"}, confirms=lambda flags: "b" not in flags
    )
    assert confirmed == [{"a", "b"}, {"a", "c"}]
    assert found == {"a", "c"}
    assert len(tried) == len(set(tried)), "no set is tried twice"


def test_unconfirmed_full_set_is_searched() -> None:
    found, _, confirmed = search("a b", lambda _: True, confirms=lambda flags: flags != {"a", "b"})
    assert confirmed == [{"a", "b"}, {"a"}]
    assert found == {"a"}


def test_nothing_can_be_disabled() -> None:
    found, tried, confirmed = search("a b", lambda _: False)
    assert found == frozenset()
    assert tried == [{"a", "b"}, {"a"}, {"b"}]
    assert confirmed == []


def test_dependent_flag_is_disabled_too() -> None:
    def closed(flags: Iterable[str]) -> frozenset[str]:
        return frozenset(flags) | (frozenset({"fill"}) if "mode" in flags else frozenset())

    tried: Asked = []
    found = find_disabled(
        ["mode", "cudnn", "fill"],
        lambda flags: not tried.append(flags) and "cudnn" not in flags,
        lambda _: True,
        closed,
    )
    assert found == {"mode", "fill"}
    assert {"mode"} not in tried


@given(st.permutations(FLAGS), st.sets(st.sampled_from(FLAGS)))
def test_needed_flags_remain_gives_up_the_others(order: list[str], needs: set[str]) -> None:
    assert find_disabled(order, lambda flags: not flags & needs, lambda _: True) == set(FLAGS) - needs


@given(st.permutations(FLAGS), st.sets(st.frozensets(st.sampled_from(FLAGS))))
def test_result_agrees_and_cannot_grow(order: list[str], parts: set[frozenset[str]]) -> None:
    def agrees(flags: frozenset[str]) -> bool:
        return flags not in parts

    found = find_disabled(order, agrees, lambda _: True)
    assert not found or agrees(found)
    assert not any(agrees(found | {flag}) for flag in set(FLAGS) - found)
