"""Models of every kind that a user may bring, all sound: what is found wrong with them was injected.

Each takes images (N, 3, 8, 8) and is deterministic once seeded. `MODELS` and `REPLICAS` say where to strike it.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from dreplica import Replica
from dreplica.config.schema import RunConfig
from tests.fixtures import tiny_model


def _body(*after: nn.Module) -> nn.Sequential:
    """A convolution, group norm (no buffers) and the modules `after`, on 4 channels."""
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), *after)


# ---- compiled by the user


def compiled_in_place(num_classes: int) -> nn.Module:
    model = tiny_model(num_classes)
    model.compile(backend="eager")
    return model


def compiled_wrapper(num_classes: int) -> nn.Module:
    """Its parameters are `_orig_mod.0.weight` and so on, which verdicts name as if it were not wrapped."""
    return torch.compile(tiny_model(num_classes), backend="eager")


def compiled_part(num_classes: int) -> nn.Module:
    model = _body(nn.Flatten(), nn.Dropout(0.1), nn.Linear(256, num_classes))
    model[0].compile(backend="eager")
    return model


class BatchSums(nn.Module):
    """Sums over the batch, which inductor rounds otherwise in code for one batch size than in code for any."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(192, num_classes)
        self.norm = nn.BatchNorm1d(num_classes)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.norm(self.head(images.flatten(1)))
        return hidden.softmax(0) * hidden.exp().mean(0)


# ---- autograd


class _Halved(torch.autograd.Function):
    """The identity, whose gradient is half of what it should be."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        ctx.save_for_backward(inputs)
        return inputs.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (inputs,) = ctx.saved_tensors
        return gradient * 0.5 + 0.0 * inputs


class CustomFunction(nn.Module):
    """A custom autograd function between two layers."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = _body(nn.Flatten())
        self.head = nn.Linear(256, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(_Halved.apply(self.body(images)))


class InPlace(nn.Module):
    """In-place operators on activations, on a view, and on a buffer."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.1, inplace=True)
        self.head = nn.Linear(256, num_classes)
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.conv(images).add_(0.1)
        if self.training:
            self.seen.mul_(0.9).add_(hidden.detach().mean((0, 2, 3)))
        hidden[:, :2].mul_(2.0)
        return self.head(self.relu(self.drop(hidden)).flatten(1))


class TiedWeights(nn.Module):
    """An encoder and a decoder that share one weight, as a language model's embedding and head do."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.encoder = nn.Linear(192, 16)
        self.between = nn.Linear(16, 16)
        self.decoder = nn.Linear(16, 16)
        self.decoder.weight = self.between.weight
        self.head = nn.Linear(16, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.decoder(self.between(self.encoder(images.flatten(1))).tanh()).tanh())


def no_batch_norm(num_classes: int) -> nn.Module:
    """No buffers at all."""
    return _body(nn.Flatten(), nn.Linear(256, num_classes))


def frozen_trunk(num_classes: int) -> nn.Module:
    """Only the head is trained; the trunk's BatchNorm statistics move."""
    model = tiny_model(num_classes)
    model[:3].requires_grad_(False)
    return model


class Checkpointed(nn.Module):
    """Dropout and BatchNorm inside activation checkpointing: the forward pass runs again in the backward."""

    def __init__(self, num_classes: int, use_reentrant: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.1))
        self.head = nn.Linear(256, num_classes)
        self.use_reentrant = use_reentrant

    def forward(self, images: Tensor) -> Tensor:
        hidden = checkpoint(self.block, self.stem(images), use_reentrant=self.use_reentrant)
        return self.head(hidden.flatten(1))


def checkpointed(num_classes: int) -> nn.Module:
    return Checkpointed(num_classes, use_reentrant=False)


def checkpointed_reentrant(num_classes: int) -> nn.Module:
    return Checkpointed(num_classes, use_reentrant=True)


# ---- layers


class Noisy(nn.Module):
    """Draws from torch's generator in the forward pass: noise in training, a random permutation, a random branch."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = _body(nn.Flatten())
        self.head = nn.Linear(256, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.body(images)
        if self.training:
            hidden = hidden + 0.1 * torch.rand(hidden.shape)
            hidden = hidden * 0.5 if torch.rand(()) < 0.5 else hidden
            hidden = hidden + 0.01 * hidden[torch.randperm(len(hidden))]
        return self.head(hidden)


class Attention(nn.Module):
    """nn.MultiheadAttention, and scaled_dot_product_attention by hand, both with dropout."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.embed = nn.Linear(24, 16)
        self.attention = nn.MultiheadAttention(16, 2, dropout=0.1, batch_first=True)
        self.project = nn.Linear(16, 48)
        self.head = nn.Linear(16, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embed(images.flatten(2).reshape(len(images), 8, 24))
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        query, key, value = self.project(tokens).view(len(images), 8, 3, 2, 8).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.head(mixed.transpose(1, 2).flatten(2).mean(1))


class Recurrent(nn.Module):
    """Two layers of LSTM, both ways, with dropout between them."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(24, 8, num_layers=2, bidirectional=True, dropout=0.1, batch_first=True)
        self.head = nn.Linear(16, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.lstm(images.flatten(2).reshape(len(images), 8, 24))[0][:, -1])


def parametrized(num_classes: int) -> nn.Module:
    """weight_norm, and spectral_norm, whose buffers take a power iteration in every forward pass."""
    model = _body(nn.Flatten(), nn.Linear(256, 16), nn.ReLU(), nn.Linear(16, num_classes))
    parametrizations.weight_norm(model[4])
    parametrizations.spectral_norm(model[6])
    return model


class SparseEmbedding(nn.Module):
    """An embedding of the brightness of each pixel, with sparse gradients."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 4, sparse=True)
        self.head = nn.Linear(4, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        bins = images.flatten(1).mul(2).long().clamp(-8, 7) + 8
        return self.head(self.embedding(bins).mean(1))


class Complex(nn.Module):
    """Complex parameters: a learned filter in the frequency domain."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(3, 8, 5, dtype=torch.complex64))
        self.head = nn.Linear(192, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(torch.fft.irfft2(torch.fft.rfft2(images) * self.filter, s=(8, 8)).flatten(1))


# ---- structure


class UsedTwice(nn.Module):
    """One module called twice in the forward pass."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.again = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(256, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.norm(self.again(self.stem(images)).relu())
        return self.head(self.norm(self.again(hidden)).flatten(1))


class SharedModules(nn.Module):
    """A module list that contains one module twice, and a module that has two names."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        shared = nn.Linear(32, 32)
        self.stem = nn.Linear(192, 32)
        self.blocks = nn.ModuleList([shared, nn.Linear(32, 32), shared])
        self.alias = self.blocks[1]
        self.head = nn.Linear(32, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.stem(images.flatten(1))
        for block in self.blocks:
            hidden = block(hidden).tanh()
        return self.head(self.alias(hidden))


class _ScaleInPlace(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(size))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.mul_(self.factor)


class ViewOfInput(nn.Module):
    """Scales a part of its input in place and returns it: the logits are a view of the batch, which has changed."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.scale = _ScaleInPlace(num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.scale(images[:, 0, 0, : self.scale.factor.numel()])


class FunctionalCall(nn.Module):
    """Runs a layer with other weights than its own, computed from them, by functional_call."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(256, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.stem(images).relu().flatten(1)
        weights = {"weight": functional.normalize(self.head.weight, dim=1), "bias": self.head.bias * 2}
        return torch.func.functional_call(self.head, weights, (hidden,))


def hooked(num_classes: int) -> nn.Module:
    """Hooks that change what passes: before, after, and on a gradient."""
    model = tiny_model(num_classes)
    model[0].register_forward_pre_hook(lambda _, args: (args[0] * 1.5,))
    model[2].register_forward_hook(lambda _m, _a, output: output + 0.1)
    model[5].register_full_backward_hook(lambda _m, grads, _g: tuple(None if g is None else g * 0.9 for g in grads))
    model[5].weight.register_hook(lambda gradient: gradient.clamp(-1, 1))
    return model


# ---- whole replicas


def sparse_replica(config: RunConfig, num_classes: int, device: torch.device) -> Replica:
    """SparseAdam takes only sparse gradients, so the head's is frozen."""
    model = SparseEmbedding(num_classes).to(device)
    model.head.requires_grad_(False)
    return Replica(model, nn.CrossEntropyLoss(), torch.optim.SparseAdam(model.embedding.parameters(), lr=0.05))


class GradientPenalty(nn.Module):
    """Cross entropy plus the squared gradient of the logits' sum with respect to the model's weights."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._parameters_of = lambda: [parameter for parameter in model.parameters() if parameter.requires_grad]

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        loss = functional.cross_entropy(logits, labels)
        if not torch.is_grad_enabled():
            return loss
        gradients = torch.autograd.grad(loss, self._parameters_of(), create_graph=True)
        return loss + 0.1 * sum(gradient.square().sum() for gradient in gradients)


def penalty_replica(config: RunConfig, num_classes: int, device: torch.device) -> Replica:
    """Double backward."""
    model = _body(nn.Flatten(), nn.Dropout(0.1), nn.Linear(256, num_classes)).to(device)
    return Replica(model, GradientPenalty(model), torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9))
