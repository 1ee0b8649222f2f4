"""Plant mistakes of code, check every verdict and print a confusion matrix.

    torchrun --standalone --nproc_per_node=3 -m tests.benchmarks.mistakes_campaign
    torchrun --standalone --nproc_per_node=2 -m tests.benchmarks.mistakes_campaign

`tests/benchmarks/mistakes/kinds.py` lists the mistakes and the cause that is expected of each. Each plant trains a
small model for a few steps with one mistake, in a custom loop, in DistributedDataParallel or in the trainer. Where,
when and how large the mistake is, is drawn from the seed.

The exit code is 1 if a cause is wrong, if hardware is blamed, if a place is wrong, or if fewer than 90 % of the plants
outside of DistributedDataParallel get their expected cause.
"""

import argparse
import random
import sys
import tempfile
import time
from collections import Counter

from dreplica.config.schema import DeterminismConfig
from dreplica.distributed.process_group import World, open_world
from dreplica.environment.determinism import apply_determinism, set_environment
from tests.benchmarks.mistakes.judge import HARDWARE, Judged, judge
from tests.benchmarks.mistakes.kinds import KINDS, Kind
from tests.benchmarks.mistakes.run_plant import run_plant
from tests.benchmarks.mistakes.site import draw_site

SETTINGS = {"L": "loop", "T": "trainer", "D": "ddp"}
SHARE = 0.9
"""Smallest share of plants outside of communicating steps with their expected cause."""


def list_plants(seed: int, names: str = "", settings: str = "LTD") -> list[tuple[Kind, str]]:
    """Return all kinds in all their settings, in an order drawn from the seed.

    Args:
        seed: Seed of the campaign.
        names: Parts of names of kinds, separated by commas, to plant only these.
        settings: Letters of the settings to plant in.
    """
    wanted = [name for name in names.split(",") if name]
    kinds = [kind for kind in KINDS if not wanted or any(name in kind.name for name in wanted)]
    plants = [(kind, letter) for kind in kinds for letter in kind.settings if letter in settings]
    random.Random(seed).shuffle(plants)
    return plants


def campaign(world: World, plants: list[tuple[Kind, str]], seed: int, verbose: bool = False) -> list[Judged]:
    """Make all plants and return what was found. Rank 0 prints each that is not as expected.

    Note:
        Collective: call on every rank.
    """
    results = []
    for number, (kind, letter) in enumerate(plants):
        site = draw_site(number, seed, world.replica_id, world.num_replicas, kind, SETTINGS[letter])
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            site.folder = folder
            try:
                judged = judge(kind, site, run_plant(site, world))
            except Exception as error:
                error.add_note(f"planted: {kind.name} [{kind.point}] in {site.setting}, number {number}")
                raise
        results.append(judged)
        if world.is_coordinator and (judged.problems or verbose):
            print(describe(judged, time.perf_counter() - started), flush=True)
    return results


def describe(judged: Judged, seconds: float) -> str:
    """Return the lines on a plant that is not as expected."""
    kind, site, verdict = judged.kind, judged.site, judged.verdict
    plan = f"{site.network}, replica {site.bad_rank} of {site.size}, at step {site.at}, number {site.number}"
    lines = [f"{kind.name} [{kind.point}] in {site.setting}: {'; '.join(judged.problems) or 'as expected'}"]
    lines.append(f"  planted {kind.cause}, found {judged.found} ({plan}, {seconds:.1f} s)")
    if verdict is not None:
        place = verdict.step, verdict.stage, verdict.tensor, verdict.operator, verdict.suspects
        lines += [f"  where {place}", *(f"  {line.code}: {line}" for line in verdict.evidence)]
        lines += [f"  remedy: {remedy.code}" for remedy in verdict.remedy[:3]]
    return "\n".join(lines)


def print_results(results: list[Judged]) -> bool:
    """Print the confusion matrix and the shares. Return True if all is as it must be."""
    table: dict[str, Counter[str]] = {}
    for judged in results:
        agrees = judged.found == "none" and judged.kind.may_agree
        row = "at most 8 bits, once" if judged.kind.is_small else judged.kind.cause
        row += " (DDP)" if judged.site.setting == "ddp" else ""
        also = judged.is_right and judged.found != judged.kind.cause
        column = "(no bit differs)" if agrees else f"{judged.found} (also true)" if also else judged.found
        table.setdefault(row, Counter())[column] += 1
    print(f"\n{len(results)} plants of {len({judged.kind.name for judged in results})} kinds; planted: found")
    for row, found in sorted(table.items()):
        print(f"  {row}: " + ", ".join(f"{column} {count}" for column, count in found.most_common()))
    counted = [judged for judged in results if judged.counts]
    right = sum(judged.is_right for judged in counted)
    problems = Counter(problem.split(" ")[0] for judged in results for problem in judged.problems)
    print(f"outside of DDP: {right} of {len(counted)} with their expected cause", dict(problems))
    wrong = [
        judged for judged in results if any(problem.isupper() or problem[:5] == "WRONG" for problem in judged.problems)
    ]
    blamed = [judged for judged in results if judged.found in HARDWARE and not judged.kind.is_small]
    print(f"wrong cause or place: {len(wrong)}; hardware blamed: {len(blamed)}")
    return not wrong and not blamed and right >= SHARE * len(counted)


def main() -> None:
    """Parse arguments and run the campaign."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default="", help="parts of names of kinds, separated by commas; default: all")
    parser.add_argument("--settings", default="LTD", help="letters: L custom loop, T trainer, D DDP")
    parser.add_argument("--limit", type=int, default=None, help="plant only this many")
    parser.add_argument("--verbose", action="store_true", help="print each plant, and not only those with a problem")
    arguments = parser.parse_args()
    determinism = DeterminismConfig()
    set_environment(determinism)
    apply_determinism(determinism)
    with open_world(timeout=60) as world:
        plants = list_plants(arguments.seed, arguments.kinds, arguments.settings)[: arguments.limit]
        results = campaign(world, plants, arguments.seed, arguments.verbose)
        good = print_results(results) if world.is_coordinator else True
        world.channel.gather(None)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
