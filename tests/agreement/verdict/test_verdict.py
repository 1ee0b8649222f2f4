"""Groups, suspects, the report's fields and the exception."""

import json
import pickle

import pytest

from dreplica.agreement.verdict.evidence import Evidence
from dreplica.agreement.verdict.remedy import Remedy
from dreplica.agreement.verdict.verdict import Divergence, Verdict, split_into_groups, suspects_of


@pytest.mark.parametrize(
    ("digests", "groups", "suspects"),
    [
        ("a", [[0]], []),
        ("aa", [[0, 1]], []),
        ("ab", [[0], [1]], []),
        ("aab", [[0, 1], [2]], [2]),
        ("aba", [[0, 2], [1]], [1]),
        ("baa", [[1, 2], [0]], [0]),
        ("abc", [[0], [1], [2]], []),
        ("aabb", [[0, 1], [2, 3]], []),
        ("bbaa", [[0, 1], [2, 3]], []),
        ("abba", [[0, 3], [1, 2]], []),
        ("baaa", [[1, 2, 3], [0]], [0]),
        ("aabc", [[0, 1], [2], [3]], []),
        ("cabaa", [[1, 3, 4], [0], [2]], [0, 2]),
        ("abbaaab", [[0, 3, 4, 5], [1, 2, 6]], [1, 2, 6]),
    ],
)
def test_groups_and_suspects(digests: str, groups: list[list[int]], suspects: list[int]) -> None:
    assert split_into_groups([letter.encode() for letter in digests]) == groups
    assert suspects_of(groups) == suspects


def test_no_suspects_without_groups() -> None:
    assert suspects_of([]) == []


VERDICT = Verdict(
    agreed=False,
    cause="unexplained",
    summary="diverged",
    step=3,
    groups=[[0], [1]],
    evidence=[Evidence.of("differing-stages", stages=["weights", "rng"])],
    remedy=[Remedy.of("strict-mode")],
)
PRINTED = """diverged
  where: step 3
  who: suspects none, groups [[0], [1]]
  evidence: differing stages: weights, rng
  remedy: --determinism.mode strict  # choose deterministic algorithms
  explain: dreplica explain unexplained"""


def test_divergence_survives_pickling() -> None:
    divergence = pickle.loads(pickle.dumps(Divergence(VERDICT)))
    assert divergence.verdict == VERDICT
    assert (divergence.code, divergence.fields) == ("divergence", {"cause": "unexplained"})


def test_divergence_prints_its_verdict() -> None:
    assert str(Divergence(VERDICT)) == PRINTED


def test_verdict_of_agreement_has_no_details() -> None:
    assert list(Verdict(True, "none", "2 replicas, 3 steps: bit-identical", groups=[[0, 1]]).details()) == []


def test_verdict_has_the_report_fields() -> None:
    fields = "agreed cause summary step epoch stage tensor module operator phase suspects groups evidence remedy"
    assert list(json.loads(json.dumps(VERDICT.as_dict()))) == fields.split()


def test_with_copies() -> None:
    assert VERDICT.with_(cause="none").cause == "none"
    assert VERDICT.cause == "unexplained"


@pytest.mark.parametrize(
    ("groups", "suspects", "is_named"),
    [([[0]], [], False), ([[0, 1]], [], True), ([[0], [1]], [], True), ([], [1], True)],
)
def test_who_is_named_among_several(groups: list[list[int]], suspects: list[int], is_named: bool) -> None:
    verdict = Verdict(False, "unexplained", "diverged", groups=groups, suspects=suspects)
    assert ("who" in dict(verdict.details())) == is_named


def test_verdict_prints_as_its_divergence() -> None:
    assert str(VERDICT) == str(Divergence(VERDICT))
