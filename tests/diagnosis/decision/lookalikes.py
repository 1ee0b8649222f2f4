"""Models, data and replicas that look like one cause and have another; for the jobs of test_lookalikes."""

import os
import random
from collections.abc import Callable

import numpy
import torch
from torch import Tensor, nn

from dreplica import Replica
from dreplica.config.schema import DataConfig, RunConfig
from dreplica.data.samples import TensorImages
from tests.diagnosis.replay.stateful import Counting, rank
from tests.fixtures import tiny_images, tiny_model

Sets = tuple[TensorImages, TensorImages, int]


# ---- models


class OwnTorchGenerator(Counting):
    """Noise from a generator that no state_dict holds."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.generator = torch.Generator().manual_seed(1)

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        return logits + 0.01 * torch.randn(logits.shape, generator=self.generator)


class GlobalPythonAndNumpy(Counting):
    """Draws from Python's and NumPy's global generators, which are seeded."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images * (1 + random.random())) + float(numpy.random.rand())


class StochasticDepth(Counting):
    """A model that skips an operator at random, by a private generator seeded equally on all replicas."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.random = random.Random(1)

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        return logits.clamp(-0.5, 0.5) if self.training and self.random.random() < 0.5 else logits


class DataDependentBranch(Counting):
    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        return logits * 0.5 if logits.mean() > 0 else logits.clamp(-5.0, 5.0)


class AllNan(Counting):
    """NaN in every output, loss, gradient and, from step 1, weight."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * float("nan")


class PlainAttribute(Counting):
    """A tensor that is no buffer: zeros, as BatchNorm's bias is, but something else on replica 1."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.shift = torch.full((8,), 1e-3 * (rank() == 1))

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.body[0](images) + self.shift.view(1, 8, 1, 1)
        return self.body[1:](hidden)


class FlagInForward(Counting):
    """From its first step on, replica 1 runs without oneDNN."""

    def forward(self, images: Tensor) -> Tensor:
        if rank() == 1:
            torch.backends.mkldnn.enabled = False
        return super().forward(images)


class FlagInFourthForward(Counting):
    """Later than at the build, so that replays of the steps before it run with the flag as well."""

    def forward(self, images: Tensor) -> Tensor:
        if rank() == 1 and self.calls == 3:
            torch.backends.mkldnn.enabled = False
        return super().forward(images)


class ChannelsLastOnReplica1(Counting):
    """The same weights, in another memory format."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        if rank() == 1:
            self.to(memory_format=torch.channels_last)


class ForkedGenerator(Counting):
    """Replica 1 puts the generator back after the noise, which all replicas add alike."""

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        with torch.random.fork_rng(enabled=rank() == 1):
            return logits + 0.01 * torch.rand(1)


class OneMoreDrawOnce(Counting):
    """After its third forward, replica 1 draws an unused number, as a logger of sample images does."""

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        if rank() == 1 and self.calls == 3:
            torch.rand(1)
        return logits


@torch.library.custom_op("tests_diagnosis::sound_scale", mutates_args=())
def sound_scale(images: Tensor) -> Tensor:
    """Half of it."""
    return images * 0.5


@sound_scale.register_fake
def _(images: Tensor) -> Tensor:
    return torch.empty_like(images)


@torch.library.custom_op("tests_diagnosis::racy_backward", mutates_args=())
def racy_backward(gradient: Tensor) -> Tensor:
    """Half of the gradient, and noise from the operating system."""
    return gradient * 0.5 + 1e-3 * random.SystemRandom().random()


@racy_backward.register_fake
def _(gradient: Tensor) -> Tensor:
    return torch.empty_like(gradient)


sound_scale.register_autograd(lambda ctx, gradient: racy_backward(gradient))


class RacyBackward(Counting):
    """An operator whose forward is sound and whose backward is not."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(sound_scale(self.body[0](images))[:, :3])


class OtherShapeOnReplica1(Counting):
    """A plain tensor that is broadcast: nought for each class, but one number for all on replica 1."""

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        nn.init.zeros_(self.body[5].bias)
        self.shift = torch.zeros(num_classes) if rank() != 1 else torch.full((1,), 1e-3)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) + self.shift


class OtherDtypeOnReplica1(OtherShapeOnReplica1):
    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.shift = torch.zeros(num_classes) if rank() != 1 else torch.full((num_classes,), 1e-3).half()


class Temperature(Counting):
    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        self.temperature = nn.Parameter(torch.tensor([1.3]))

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) * self.temperature


class OnePixelOnReplica1(Counting):
    """Replica 1 sets a pixel of its input through NumPy."""

    def forward(self, images: Tensor) -> Tensor:
        if rank() == 1 and self.training:
            images.numpy()[0, 0, 0, 0] = 0.37
        return super().forward(images)


_libraries: list[torch.library.Library] = []
"""Kept, as torch takes their kernels away with them."""


def _computes_wrongly(name: str, ranks: set[int], kernel: Callable[..., Tensor]) -> None:
    """Register another kernel of an operator for the CPU on these replicas."""
    if rank() in ranks:
        library = torch.library.Library("aten", "IMPL")
        library.impl(name, kernel, "CPU")
        _libraries.append(library)


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """Wrong in float32 only."""
    product = torch.mm(a, b) * alpha + bias * beta
    return product * 1.1 if product.dtype is torch.float32 else product


def _relu(images: Tensor) -> Tensor:
    clamped = torch.clamp_min(images, 0)
    return clamped * 1.1 if clamped.dtype is torch.float32 else clamped


def wrong_addmm_on_replica_0_and_1(num_classes: int) -> nn.Module:
    _computes_wrongly("addmm", {0, 1}, _addmm)
    return tiny_model(num_classes)


def relu_wrong_in_any_precision_on_replica_0(num_classes: int) -> nn.Module:
    _computes_wrongly("relu", {0}, lambda images: torch.clamp_min(images, 0) * 1.1)
    return tiny_model(num_classes)


def relu_wrong_in_any_precision_on_replica_0_and_1(num_classes: int) -> nn.Module:
    _computes_wrongly("relu", {0, 1}, lambda images: torch.clamp_min(images, 0) * 1.1)
    return tiny_model(num_classes)


def hardtanh_wrong_in_any_precision_on_replica_0(num_classes: int) -> nn.Module:
    _computes_wrongly("hardtanh", {0}, lambda images, low=-1.0, high=1.0: torch.clamp(images, low, high) * 1.1)
    model = tiny_model(num_classes)
    model[2] = nn.Hardtanh()
    return model


def wrong_relu_on_replica_1(num_classes: int) -> nn.Module:
    _computes_wrongly("relu", {1}, _relu)
    return tiny_model(num_classes)


def wrong_relu_on_replica_0(num_classes: int) -> nn.Module:
    _computes_wrongly("relu", {0}, _relu)
    return tiny_model(num_classes)


def other_shape_on_replica_1(num_classes: int) -> nn.Module:
    return OtherShapeOnReplica1(num_classes)


def other_dtype_on_replica_1(num_classes: int) -> nn.Module:
    return OtherDtypeOnReplica1(num_classes)


def one_pixel_on_replica_1(num_classes: int) -> nn.Module:
    return OnePixelOnReplica1(num_classes)


def bf16_convolutions_on_replica_1(num_classes: int) -> nn.Module:
    """By the newer flags, which the older ones do not show."""
    if rank() == 1:
        torch.backends.mkldnn.conv.fp32_precision = "bf16"
    return tiny_model(num_classes)


def newer_flags_everywhere(num_classes: int) -> nn.Module:
    """After which the older flags cannot be read."""
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    return tiny_model(num_classes)


def own_torch_generator(num_classes: int) -> nn.Module:
    return OwnTorchGenerator(num_classes)


def global_python_and_numpy(num_classes: int) -> nn.Module:
    return GlobalPythonAndNumpy(num_classes)


def stochastic_depth(num_classes: int) -> nn.Module:
    return StochasticDepth(num_classes)


def data_dependent_branch(num_classes: int) -> nn.Module:
    return DataDependentBranch(num_classes)


def all_nan(num_classes: int) -> nn.Module:
    return AllNan(num_classes)


def plain_attribute(num_classes: int) -> nn.Module:
    return PlainAttribute(num_classes)


def flag_in_forward(num_classes: int) -> nn.Module:
    return FlagInForward(num_classes)


def flag_in_fourth_forward(num_classes: int) -> nn.Module:
    return FlagInFourthForward(num_classes)


def channels_last_on_replica_1(num_classes: int) -> nn.Module:
    return ChannelsLastOnReplica1(num_classes)


def forked_generator(num_classes: int) -> nn.Module:
    return ForkedGenerator(num_classes)


def one_more_draw_once(num_classes: int) -> nn.Module:
    return OneMoreDrawOnce(num_classes)


def racy_backward_model(num_classes: int) -> nn.Module:
    return RacyBackward(num_classes)


def reseeded_alike(num_classes: int) -> nn.Module:
    torch.manual_seed(7)
    random.seed(7)
    return tiny_model(num_classes)


def reseeded_alike_then_one_more_draw(num_classes: int) -> nn.Module:
    torch.manual_seed(7)
    if rank() == 1:
        torch.rand(1)
    return tiny_model(num_classes)


def negative_zero_on_replica_1(num_classes: int) -> nn.Module:
    model = tiny_model(num_classes)
    if rank() == 1:
        with torch.no_grad():
            model[1].bias.neg_()
    return model


# ---- whole replicas


def _sgd_replica(num_classes: int) -> Replica:
    model = tiny_model(num_classes)
    return Replica(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1))


def numpy_hook_on_replica_1(config: RunConfig, num_classes: int, device: torch.device) -> Replica:
    """After each step, replica 1 shrinks its head's weights through NumPy, past all operators."""
    return _shrinking(num_classes, 0.9 if rank() == 1 else 1.0)


def numpy_hook_on_all(config: RunConfig, num_classes: int, device: torch.device) -> Replica:
    return _shrinking(num_classes, 0.9)


def numpy_hook_by_rank(config: RunConfig, num_classes: int, device: torch.device) -> Replica:
    return _shrinking(num_classes, 0.9 - 0.1 * rank())


def _shrinking(num_classes: int, factor: float, tensor: str = "weight") -> Replica:
    replica = _sgd_replica(num_classes)
    memory = getattr(replica.model[5], tensor).detach().numpy()
    replica.optimizer.register_step_post_hook(lambda *_: numpy.multiply(memory, numpy.float32(factor), out=memory))
    return replica


def numpy_bias_on_replica_1(config: RunConfig, num_classes: int, device: torch.device) -> Replica:
    """A small tensor: five numbers."""
    return _shrinking(num_classes, 0.99 if rank() == 1 else 1.0, "bias")


def numpy_bias_on_all_but_1(config: RunConfig, num_classes: int, device: torch.device) -> Replica:
    return _shrinking(num_classes, 1.0 if rank() == 1 else 0.99, "bias")


def numpy_temperature_on_replica_1(config: RunConfig, num_classes: int, device: torch.device) -> Replica:
    """A single number."""
    model = Temperature(num_classes)
    replica = Replica(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1))
    memory = model.temperature.detach().numpy()
    factor = numpy.float32(0.99 if rank() == 1 else 1.0)
    replica.optimizer.register_step_post_hook(lambda *_: numpy.multiply(memory, factor, out=memory))
    return replica


def warm_up_from_zero(config: RunConfig, num_classes: int, device: torch.device) -> Replica:
    """The learning rate is 0 in the first epoch and 0.1 in the second."""
    replica = _sgd_replica(num_classes)
    replica.scheduler = torch.optim.lr_scheduler.LambdaLR(replica.optimizer, lambda epoch: float(epoch > 0))
    return replica


# ---- data


class Images(TensorImages):
    """A tensor data set whose samples pass through `change`."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        super().__init__(images, labels)
        self.random = numpy.random.default_rng(1)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = super().__getitem__(index)
        return self.change(image), label

    def change(self, image: Tensor) -> Tensor:
        return image


class FlippedAtRandom(Images):
    """The usual random flip, from torch's global generator."""

    def change(self, image: Tensor) -> Tensor:
        return image.flip(-1) if torch.rand(1) < 0.5 else image


class NoiseOfItsOwn(Images):
    """Noise from the data set's own generator, seeded alike on all replicas."""

    def change(self, image: Tensor) -> Tensor:
        return image + float(self.random.random())


class ByProcess(Images):
    def change(self, image: Tensor) -> Tensor:
        return image + 1e-6 * os.getpid()


class ByChance(Images):
    def change(self, image: Tensor) -> Tensor:
        return image + 1e-3 * random.SystemRandom().random()


class DrawsInVain(Images):
    """On replica 1 a number is drawn that changes nothing: a transform with probability 0."""

    def change(self, image: Tensor) -> Tensor:
        return image.flip(-1) if rank() == 1 and torch.rand(1) < 0.0 else image


def _with(kind: type[Images], config: DataConfig) -> Sets:
    train, val, num_classes = tiny_images(config)
    return kind(train.images, train.labels), val, num_classes


def flipped_at_random(config: DataConfig) -> Sets:
    return _with(FlippedAtRandom, config)


def noise_of_its_own(config: DataConfig) -> Sets:
    return _with(NoiseOfItsOwn, config)


def by_process(config: DataConfig) -> Sets:
    return _with(ByProcess, config)


def by_chance(config: DataConfig) -> Sets:
    return _with(ByChance, config)


def draws_in_vain(config: DataConfig) -> Sets:
    return _with(DrawsInVain, config)
