"""The `data` section."""

from typing import Annotated, Literal

from pydantic import Field

from dreplica.section import Lockstep, Section


class DataConfig(Section):
    """What is trained on."""

    name: Annotated[str, Lockstep()] = "digits"
    """`digits` (scikit-learn's bundled 1,797 images, no download), `imagefolder`, a torchvision data set (`CIFAR10`),
    or `package.module:function`, called with this section, which returns (training set, validation set, number of
    classes)."""
    root: str | None = None
    """Folder that holds the data. For `imagefolder`: `train/` and `val/` with a folder per class in each, or a folder
    per class. For torchvision's sets: where they are, or are downloaded to; null: `data`."""
    batch_size: Annotated[int, Lockstep()] = Field(64, ge=1)
    """Samples per step, on each replica, no more than there are; the last batch of an epoch may be smaller."""
    num_workers: int = Field(0, ge=0, le=100)
    """Loader processes per replica; 0: load in the training process. With `decode: node` those of a node work together,
    so that each replica needs only its share of them."""
    val_fraction: Annotated[float, Lockstep()] = Field(0.2, gt=0, lt=1)
    """Part of the samples held out for validation, where the data have no validation set of their own."""
    split_seed: Annotated[int, Lockstep()] = Field(0, ge=0, le=2**32 - 1)
    """Seed of the split into training and validation samples."""
    sample_weights: Annotated[str | None, Lockstep()] = None
    """What each training sample counts in the loss: `balanced` (the same for every class, whatever its size) or a CSV
    file with the columns file, weight (paths relative to `root`); null: all the same."""
    augment: Annotated[str | None, Lockstep()] = None
    """Of the training images: `flip`, `crop_flip` (pad by 4, crop at random, flip: CIFAR), `resized_crop` (a crop of
    random size and shape, flip: ImageNet), `trivial` (TrivialAugmentWide), or `package.module:function`, called with an
    image (uint8, 3 x H x W), which returns one; null: none. Drawn from (seed.augment, epoch, sample) alone."""
    image_size: Annotated[int | None, Lockstep()] = Field(None, ge=1, le=8192)
    """Height and width of the images that reach the model; null: what is usual for the data (224 for photographs)."""
    decode: Literal["replica", "node"] = "replica"
    """Who decodes an image: each `replica` for itself; or `node`: once for all replicas of a node, which share it as
    bytes, and so would share a mistake that one of them makes in decoding."""
    cache: Literal["none", "memory", "device"] = "none"
    """Where decoded images are kept after the first epoch, 3 bytes per pixel: `memory` of the node, once for each
    replica or, with `decode: node`, once; or the replica's own `device`, where batches are also put together and
    augmented: with `augment` null, `flip` or `crop_flip`. Whatever this is, the pixels are the same."""
    on_error: Annotated[Literal["stop", "skip"], Lockstep()] = "stop"
    """A sample that cannot be loaded: `stop` the run when it is met, or `skip`: load every sample once before the first
    step, and leave out, on all replicas, those that any node cannot load."""
