"""Remedies follow from the entries that differ, and none is given that the evidence excludes."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dreplica.agreement.verdict.advice import ADVICE, advise
from dreplica.agreement.verdict.evidence import Evidence
from dreplica.agreement.verdict.evidence_texts import EVIDENCE
from dreplica.agreement.verdict.location import describe, first_difference
from dreplica.agreement.verdict.remedy_texts import REMEDIES
from dreplica.agreement.verdict.signs import FIRST, SAME, Sign
from dreplica.agreement.verdict.verdict import Verdict
from dreplica.state.stages import (
    STAGES,
    Stage,
    buffers_stage,
    gradients_stage,
    make_stage,
    optimizer_stage,
    weights_stage,
)

WRAPPED_DDP = (Sign.LIBRARY, Sign.DDP, Sign.WRAPPED)
DDP = (Sign.LIBRARY, Sign.DDP)
LIBRARY = (Sign.LIBRARY,)


class Net(nn.Module):
    """A model with statistics and a codebook."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.norm, self.head = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)
        self.register_buffer("codebook", torch.ones(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.body(x)))


@dataclass
class Rank:
    """One rank of a data-parallel training, whose gradients are those of the same batch."""

    momentum: float | None = 0.0
    """Of SGD. None for Adam."""
    model: Net = field(default_factory=Net)
    loss: nn.Module = field(default_factory=lambda: nn.Linear(3, 3))

    def __post_init__(self) -> None:
        with torch.no_grad():
            self.loss.weight.copy_(torch.eye(3))
            self.loss.bias.zero_()
        parameters = [*self.model.parameters(), *self.loss.parameters()]
        self.optimizer = torch.optim.Adam(parameters, lr=0.1)
        if self.momentum is not None:
            self.optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=self.momentum)
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(self.optimizer, patience=0)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 10)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        self.steps = self.updates = True

    def backward(self) -> None:
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
        self.optimizer.zero_grad()
        self.scaler.scale(self.loss(self.model(x)).square().mean()).backward()
        self.loss.zero_grad()

    def step(self) -> None:
        if self.steps:
            self.scaler.step(self.optimizer)
        else:
            self.scaler.unscale_(self.optimizer)
        if self.updates:
            self.scaler.update()

    def stages(self, *left_out: str) -> dict[str, Stage]:
        others = self.plateau, self.schedule, self.scaler
        stages = {
            "buffers": buffers_stage(self.model),
            "gradients": gradients_stage(self.model),
            "optimizer": optimizer_stage(self.model, self.optimizer, *others),
            "weights": weights_stage(self.model),
        }
        return {name: stage for name, stage in stages.items() if name not in left_out}


Plant = Callable[[Rank], Any]


def verdict_of(
    plant: Plant, moment: str, run: tuple[str, ...], momentum: float | None = 0.0, *left_out: str
) -> Verdict:
    """The verdict after a step of two ranks, on the second of which a plant runs at a moment."""
    rows = []
    for rank in (0, 1):
        here = Rank(momentum)

        def at(name: str, here: Rank = here, rank: int = rank) -> None:
            if rank == 1 and name == moment:
                with torch.no_grad():
                    plant(here)

        at("build")
        if moment != "build":
            at("forward")
            here.backward()
            at("gradients")
            here.step()
            at("end")
        rows.append(here.stages(*left_out))
    verdict = describe(first_difference([int(moment != "build")] * 2, rows), None, 2)
    outside = verdict.signs.get(Sign.OUTSIDE_PARAMETERS)
    lines = [Evidence.of("parameters-outside", some=", ".join(outside), owners={})] if outside else []
    return verdict.with_(signs=verdict.signs | {sign: [] for sign in run}, evidence=[*verdict.evidence, *lines])


def _set(key: str, value: float) -> Plant:
    return lambda rank: rank.optimizer.param_groups[0].update({key: value})


def _without_step(rank: Rank) -> None:
    rank.steps = False


def _drop_gradient(rank: Rank) -> None:
    rank.model.head.weight.grad = None


def _each_gradient(rank: Rank) -> None:
    for parameter in rank.model.parameters():
        parameter.grad += 1


def _finds_inf(rank: Rank) -> None:
    """Look for inf in the rank's own gradients, and then average them. The other rank's average is finite here."""
    rank.scaler.unscale_(rank.optimizer)
    (found,) = rank.scaler._per_optimizer_states[id(rank.optimizer)]["found_inf_per_device"].values()
    found.fill_(1.0)


PLANTS: dict[str, tuple[Plant, str, tuple[str, ...], float | None, tuple[str, ...]]] = {
    # Schedulers, settings, scalers.
    "plateau, DDP": (lambda r: r.plateau.step(0.5), "end", WRAPPED_DDP, 0, ("reduce-metric",)),
    "plateau that has reduced the lr": (
        lambda r: [r.plateau.step(value) for value in (0.5, 0.6, 0.7)],
        "end",
        DDP,
        0,
        ("reduce-metric",),
    ),
    "plateau, identical": (lambda r: r.plateau.step(0.5), "end", LIBRARY, 0, ("evaluate-metric-alike",)),
    "schedule": (lambda r: r.schedule.step(), "end", WRAPPED_DDP, 0, ("step-scheduler-alike",)),
    "schedule that has reduced the lr": (
        lambda r: [r.schedule.step() for _ in range(10)],
        "end",
        LIBRARY,
        0,
        ("step-scheduler-alike",),
    ),
    "lr": (_set("lr", 0.2), "end", WRAPPED_DDP, 0, ("set-value-alike",)),
    "lr, identical": (_set("lr", 0.2), "end", LIBRARY, 0, ("set-value-alike",)),
    "lr with momentum": (_set("lr", 0.2), "end", WRAPPED_DDP, 0.9, ("set-value-alike",)),
    "weight decay": (_set("weight_decay", 0.1), "gradients", DDP, 0.9, ("set-value-alike",)),
    "inf before the all-reduce": (
        _finds_inf,
        "gradients",
        DDP,
        0.9,
        ("unscale-after-all-reduce",),
    ),
    "update left out": (lambda r: setattr(r, "updates", False), "forward", DDP, 0.9, ("update-scaler-alike",)),
    "own scale": (lambda r: r.scaler._scale.fill_(2.0), "end", DDP, 0, ("set-value-alike",)),
    "own growth": (lambda r: r.scaler.set_growth_interval(5), "end", LIBRARY, 0, ("set-value-alike",)),
    # Parameters of a loss.
    "loss outside DDP": (lambda r: r.loss.weight.add_(1), "end", WRAPPED_DDP, 0, ("ddp-wrap-loss",)),
    "loss, identical": (lambda r: r.loss.weight.add_(1), "end", LIBRARY, 0, ("seed-outside-parameters",)),
    # Gradients.
    "not averaged": (
        _each_gradient,
        "gradients",
        WRAPPED_DDP,
        0,
        ("ddp-sync-last-backward", "ddp-call-wrapped-model", "ddp-change-gradients-alike"),
    ),
    "not averaged by hand": (
        _each_gradient,
        "gradients",
        DDP,
        0,
        ("ddp-average-all-gradients", "ddp-change-gradients-alike"),
    ),
    "one gradient": (
        lambda r: r.model.head.bias.grad.add_(1),
        "gradients",
        WRAPPED_DDP,
        0,
        ("ddp-freeze-before-wrapping", "ddp-change-gradients-alike"),
    ),
    "missing gradient": (
        _drop_gradient,
        "gradients",
        WRAPPED_DDP,
        0,
        ("ddp-find-unused", "ddp-freeze-before-wrapping"),
    ),
    "frozen": (lambda r: r.model.head.weight.requires_grad_(False), "forward", WRAPPED_DDP, 0, ("ddp-freeze-alike",)),
    "gradients, identical": (_each_gradient, "gradients", LIBRARY, 0, ("diagnose-step",)),
    # State of the optimizer, weights.
    "step left out, momentum": (
        _without_step,
        "gradients",
        WRAPPED_DDP,
        0.9,
        ("step-optimizer-alike", "load-optimizer-alike"),
    ),
    "momentum of one parameter": (
        lambda r: r.optimizer.state[r.model.head.bias]["momentum_buffer"].add_(1),
        "end",
        WRAPPED_DDP,
        0.9,
        ("load-optimizer-alike", "step-optimizer-alike"),
    ),
    "momentum of all parameters": (
        lambda r: [r.optimizer.state[p]["momentum_buffer"].add_(1) for p in r.model.parameters()],
        "end",
        WRAPPED_DDP,
        0.9,
        ("step-optimizer-alike", "load-optimizer-alike"),
    ),
    "state loaded, Adam": (
        lambda r: r.optimizer.state[r.model.head.bias]["exp_avg"].add_(1),
        "end",
        WRAPPED_DDP,
        None,
        ("load-optimizer-alike",),
    ),
    "step left out, Adam": (
        lambda r: [state["step"].sub_(1) for state in r.optimizer.state.values()],
        "end",
        WRAPPED_DDP,
        None,
        ("step-optimizer-alike",),
    ),
    "weight written": (lambda r: r.model.head.weight.clamp_(-0.1, 0.1), "end", WRAPPED_DDP, 0.9, ("ddp-write-alike",)),
    "weight written, no state": (
        lambda r: r.model.head.bias.add_(1),
        "end",
        DDP,
        0,
        ("ddp-write-alike", "step-optimizer-alike"),
    ),
    "weights written": (
        lambda r: [p.add_(1) for p in r.model.parameters()],
        "end",
        WRAPPED_DDP,
        0.9,
        ("ddp-write-alike",),
    ),
    "step left out, no state": (
        _without_step,
        "gradients",
        WRAPPED_DDP,
        0,
        ("step-optimizer-alike", "ddp-write-alike"),
    ),
    "weights, identical": (lambda r: r.model.head.bias.add_(1), "end", LIBRARY, 0, ("diagnose-step",)),
    # Buffers.
    "codebook": (
        lambda r: r.model.codebook.add_(1),
        "end",
        WRAPPED_DDP,
        0,
        ("ddp-update-from-all-ranks", "ddp-broadcast-buffers", "ddp-exclude-buffers"),
    ),
    "statistics": (
        lambda r: r.model.norm.running_mean.add_(1),
        "end",
        WRAPPED_DDP,
        0,
        ("ddp-broadcast-buffers", "ddp-sync-batch-norm", "ddp-exclude-buffers"),
    ),
    "one more forward pass": (
        lambda r: r.model(torch.ones(2, 4)),
        "end",
        WRAPPED_DDP,
        0,
        ("ddp-broadcast-buffers", "ddp-sync-batch-norm", "forward-alike", "ddp-exclude-buffers"),
    ),
    "codebook, identical": (lambda r: r.model.codebook.add_(1), "end", LIBRARY, 0, ("diagnose-step",)),
    # The build.
    "build": (lambda r: r.model.head.weight.add_(1), "build", LIBRARY, 0, ("seed-before-build", "build-without-rank")),
    "build, averaged by hand": (
        lambda r: r.model.head.weight.add_(1),
        "build",
        DDP,
        0,
        ("ddp-broadcast-build", "seed-before-build", "build-without-rank"),
    ),
    "written after wrapping": (lambda r: r.model.head.weight.add_(1), "build", WRAPPED_DDP, 0, ("ddp-write-alike",)),
}


@pytest.mark.parametrize("name", PLANTS)
def test_remedies_follow_from_the_place(name: str) -> None:
    plant, moment, run, momentum, expected = PLANTS[name]
    verdict = verdict_of(plant, moment, run, momentum)
    assert tuple(remedy.code for remedy in advise(verdict)) == expected, verdict


def test_remedy_names_the_entries() -> None:
    (remedy,) = advise(verdict_of(_set("weight_decay", 0.1), "end", DDP))
    assert remedy.data["names"] == ["group0.weight_decay"]
    assert "the same value of group0.weight_decay on every replica" in remedy.text


def test_gradients_not_compared_are_suspected_too() -> None:
    verdict = verdict_of(_each_gradient, "gradients", DDP, 0.9, "gradients")
    assert "ddp-change-gradients-alike" in [remedy.code for remedy in advise(verdict)]
    verdict = verdict_of(_each_gradient, "gradients", DDP, 0, "gradients", "optimizer")
    assert "ddp-average-all-gradients" in [remedy.code for remedy in advise(verdict)]


def test_rng_of_data_parallel_ranks_is_excluded() -> None:
    rows = [{"rng": make_stage([("torch.cpu", bytes([rank]))])} for rank in (0, 1)]
    verdict = describe(first_difference([1, 1], rows), None, 2)
    for run, expected in ((DDP, ["ddp-exclude-stage", "draw-alike"]), (LIBRARY, ["draw-alike"])):
        found = verdict.with_(signs=verdict.signs | {sign: [] for sign in run})
        assert [remedy.code for remedy in advise(found)] == expected


def test_a_diagnosed_cause_gets_no_advice_on_the_place() -> None:
    verdict = verdict_of(_set("lr", 0.2), "end", LIBRARY)
    assert advise(verdict)
    assert advise(verdict.with_(cause="transient-fault")) == []


def test_compiled_dropout_gets_its_setting() -> None:
    """In addition to the override, and only if a generator shows that something was drawn."""
    line = Evidence.of("compiled-draws-differ", generators=["torch.cpu"])
    verdict = Verdict(False, "declared-override", "x", evidence=[line])
    assert [remedy.code for remedy in advise(verdict)] == ["fallback-random", "remove-override"]
    assert advise(verdict.with_(evidence=[])) == []


def test_every_need_can_be_observed() -> None:
    """All preconditions are signs, or codes of evidence."""
    known = {*Sign, *FIRST.values(), *SAME.values(), *EVIDENCE}
    for advice in ADVICE:
        assert advice.remedy in REMEDIES
        assert advice.needs <= known
        assert advice.excludes <= known
        assert not advice.needs & advice.excludes
        assert advice.about is None or advice.about in advice.needs


def test_no_advice_is_hidden_by_one_with_fewer_needs() -> None:
    """No two rows with the same remedy and cause have the same preconditions."""
    rows = [(advice.remedy, advice.needs, advice.excludes, advice.causes) for advice in ADVICE]
    assert len(set(rows)) == len(rows)


def test_advise_never_raises() -> None:
    """For any signs and evidence without names."""
    draw = random.Random(0)
    signs = [*Sign, *FIRST.values(), *SAME.values()]
    for _ in range(2000):
        chosen = {sign: ["a.b"] for sign in draw.sample(signs, 12)}
        lines = [Evidence.of("parameters-outside", some="a")] * draw.randrange(2)
        advise(Verdict(False, draw.choice(("unexplained", "batch-differs")), "x", signs=chosen, evidence=lines))
    assert set(FIRST) == set(STAGES)
