"""A model that refuses images of the data set's size is reported before the first step."""

from typing import Any

import pytest
import torch
import torchvision

from dreplica.config.schema import RunConfig
from dreplica.data.cache.device_cache import DeviceCachedImages, DeviceImageStore
from dreplica.data.images.images import Images
from dreplica.data.samples import SampleSubset, TensorImages
from dreplica.errors import UsageError
from dreplica.training.preflight import check_image_size
from tests.end_to_end.test_bad_input import messages
from tests.fixtures import SMALL
from tests.harness import run_job

CPU = torch.device("cpu")


def images(size: int) -> list[Any]:
    """The same shape in every wrapping that a run puts around it."""
    plain = Images([(None, 0)] * 4, None, size)
    kept = SampleSubset(plain, [0, 2])
    tensors = TensorImages(torch.zeros(4, 3, size, size), torch.zeros(4, dtype=torch.int64))
    return [plain, kept, tensors, DeviceCachedImages(kept, DeviceImageStore(2, size, CPU))]


@pytest.mark.parametrize(
    ("name", "takes", "refuses"), [("vit_b_32", 224, 256), ("maxvit_t", 224, 64), ("squeezenet1_1", 32, 8)]
)
def test_check_image_size_rejects_other_sizes(name: str, takes: int, refuses: int) -> None:
    config = RunConfig.model_validate({"model": {"name": name}})
    with torch.device("meta"):
        model = torchvision.models.get_model(name)
    for dataset in images(takes):
        check_image_size(model, dataset, config)
    for dataset in images(refuses):
        with pytest.raises(
            UsageError, match=rf"^model.name: {name} does not accept images of {refuses} x {refuses} \("
        ):
            check_image_size(model, dataset, config)


def test_check_image_size_changes_nothing() -> None:
    config = RunConfig.model_validate({"model": {"name": "mobilenet_v3_small"}})  # batch norm, and dropout
    model = torchvision.models.get_model(config.model.name).train()
    state = {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}
    before = torch.get_rng_state()
    check_image_size(model, images(32)[0], config)
    assert torch.get_rng_state().equal(before)
    assert {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()} == state


def test_check_image_size_skips_unknown_shape() -> None:
    config = RunConfig.model_validate({"model": {"name": "vit_b_32"}})
    check_image_size(torch.nn.Linear(2, 2), [(torch.zeros(3), 0)], config)  # type: ignore[arg-type]


def test_wrong_image_size_ends_with_one_message() -> None:
    job = run_job(*SMALL, "--model.factory=null", "--model.name=squeezenet1_1")
    assert job.exitcodes == {0: 2, 1: 2}, job.output
    (message,) = messages(job.output)
    assert message.startswith("error: model.name: squeezenet1_1 does not accept images of 8 x 8 (")
    assert message.endswith(
        "Set data.image_size to the size that it accepts, 224 in most cases, or choose another model."
    )
    assert "Traceback" not in job.output
