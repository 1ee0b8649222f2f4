"""Typical training loops with the two lines of `dreplica.Agreement`, and a fault on this rank with `plant`."""

import random
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import dreplica

STEP = 5
"""The step of the fault, the first at which anything differs. An epoch has four steps."""


class Net(nn.Module):
    """A model from (batch, 1, 8, 8) to (batch, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.25)
        self.fc = nn.Linear(4 * 6 * 6, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        return F.log_softmax(self.fc(torch.flatten(self.dropout(x), 1)), dim=1)


def digits() -> TensorDataset:
    """Return the first 128 of scikit-learn's digits."""
    images, labels = load_digits(return_X_y=True)
    return TensorDataset(
        torch.tensor(images[:128], dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels[:128])
    )


def mnist(plant: bool, epochs: int = 3) -> dreplica.Agreement:
    """Train an independent replica, as https://github.com/pytorch/examples/blob/main/mnist/main.py does."""
    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    train_loader = DataLoader(digits(), batch_size=32, shuffle=True)
    model = Net()
    optimizer = torch.optim.Adadelta(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.7)
    agreement = dreplica.Agreement(model, optimizer, others=[scheduler])
    for epoch in range(1, epochs + 1):
        model.train()
        for data, target in train_loader:
            optimizer.zero_grad()
            output = model(data)
            loss = F.nll_loss(output, target)
            loss.backward()
            if plant and agreement.steps_done + 1 == STEP:
                model.fc.weight.grad[3, 7] *= -1
            optimizer.step()
            agreement.step(batch=(data, target), outputs=output, loss=loss, epoch=epoch)
        scheduler.step()
    agreement.finish()
    return agreement


def ddp(plant: bool, epochs: int = 3) -> dreplica.Agreement:
    """Train one model on all ranks, with gradients accumulated over two batches."""
    torch.manual_seed(1)
    dataset = digits()
    loader = DataLoader(dataset, batch_size=8, sampler=DistributedSampler(dataset))
    network = Net()
    model = DistributedDataParallel(network)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(1 + dist.get_rank())  # ranks draw different dropout
    agreement = dreplica.Agreement(model, optimizer)
    for epoch in range(1, epochs + 1):
        loader.sampler.set_epoch(epoch)
        for number, (data, target) in enumerate(loader, start=1):
            if number % 2:
                with model.no_sync():
                    F.nll_loss(model(data), target).backward()
                continue
            F.nll_loss(model(data), target).backward()
            optimizer.step()
            if plant and agreement.steps_done + 1 == STEP:
                optimizer.state[network.conv.bias]["momentum_buffer"][2] += 1e-3
            agreement.step(epoch=epoch)
            optimizer.zero_grad()
    agreement.finish()
    return agreement


def lightning(plant: bool, epochs: int = 3) -> dreplica.Agreement:
    """Train a LightningModule with Lightning's DDP strategy."""
    from lightning.pytorch import LightningModule, Trainer, seed_everything

    from dreplica.lightning import AgreementCallback

    class Digits(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def on_train_start(self) -> None:
            torch.manual_seed(1 + self.global_rank)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if plant and self.global_step + 1 == STEP:
                self.optimizers().param_groups[0]["lr"] = 0.2
            data, target = batch
            return F.nll_loss(self.net(data), target)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    seed_everything(1)
    callback = AgreementCallback(keep_state=True)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(
        strategy="ddp",
        devices=2,
        accelerator="cpu",
        max_epochs=epochs,
        accumulate_grad_batches=2,
        callbacks=[callback],
        **quiet,
    )
    trainer.fit(Digits(), DataLoader(digits(), batch_size=8, shuffle=True))
    assert callback.agreement is not None
    return callback.agreement


def transformers(plant: bool, epochs: int = 3) -> dreplica.Agreement:
    """Train a model with Hugging Face's Trainer, whose forward pass clamps weights where `plant` is set."""
    from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

    from dreplica.transformers import AgreementCallback

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.calls = Net(), 0

        def forward(self, data: Tensor, labels: Tensor) -> dict[str, Tensor]:
            self.calls += 1
            if plant and self.calls == 2 * STEP:
                self.net.fc.weight.data.clamp_(-0.01, 0.01)
            logits = self.net(data)
            return {"loss": F.nll_loss(logits, labels), "logits": logits}

    class OwnSeeds(TrainerCallback):
        def on_train_begin(self, args: TrainingArguments, *_: Any, **__: Any) -> None:
            torch.manual_seed(1 + args.process_index)

    set_seed(1)
    samples = [{"data": data, "labels": label} for data, label in digits()]
    callback = AgreementCallback(keep_state=True)
    quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            num_train_epochs=epochs,
            use_cpu=True,
            **quiet,
        )
        Trainer(Classifier(), arguments, train_dataset=samples, callbacks=[OwnSeeds(), callback]).train()
    assert callback.agreement is not None
    return callback.agreement


LOOPS: Mapping[str, Callable[..., dreplica.Agreement]] = {
    "mnist": mnist,
    "ddp": ddp,
    "lightning": lightning,
    "transformers": transformers,
}
