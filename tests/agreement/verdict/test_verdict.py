"""Classes, suspects and the exception."""

import json
import pickle

import pytest

from dreplica.agreement.verdict.verdict import Divergence, Verdict, split_into_classes, suspects_of


@pytest.mark.parametrize(
    ("digests", "classes", "suspects"),
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
def test_classes_and_suspects(digests: str, classes: list[list[int]], suspects: list[int]) -> None:
    assert split_into_classes([letter.encode() for letter in digests]) == classes
    assert suspects_of(classes) == suspects


def test_nobody_is_suspected_where_there_are_no_classes() -> None:
    assert suspects_of([]) == []


VERDICT = Verdict(agreed=False, cause="unexplained", summary="parted", step=3, classes=[[0], [1]])


def test_divergence_shows_its_summary_and_survives_the_way_between_processes() -> None:
    divergence = pickle.loads(pickle.dumps(Divergence(VERDICT)))
    assert str(divergence) == "parted"
    assert divergence.verdict == VERDICT


def test_verdict_has_the_fields_of_the_report() -> None:
    fields = "agreed cause summary step epoch stage tensor module operator phase suspects classes evidence remedy"
    assert list(json.loads(json.dumps(VERDICT.as_dict()))) == fields.split()


def test_with_changes_a_copy() -> None:
    assert VERDICT.with_(cause="none").cause == "none"
    assert VERDICT.cause == "unexplained"
