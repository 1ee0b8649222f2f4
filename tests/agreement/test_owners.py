"""Parameters that only the optimizer has, by the module that holds them."""

import torch
from torch import nn

from dreplica.agreement.owners import name_owners


class CenterLoss(nn.Module):
    """A loss with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.centers = nn.Parameter(torch.zeros(3))


def test_name_owners_finds_the_loss() -> None:
    model, loss, loose = nn.Linear(2, 2), CenterLoss(), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([{"params": [*model.parameters()]}, {"params": [*loss.parameters(), loose]}], lr=0.1)
    names = ["group1.params.0", "group1.params.1", "weight.momentum_buffer"]
    assert name_owners(model, {"": optimizer}, names) == {"group1.params.0": "CenterLoss.centers"}
    assert name_owners(model, {"": optimizer}, []) == {}
    assert name_owners(model, {"a": optimizer}, ["a.group1.params.0"]) == {"a.group1.params.0": "CenterLoss.centers"}
