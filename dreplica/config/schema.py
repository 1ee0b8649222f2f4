"""schema"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from dreplica.config.base import Lockstep, Section
from dreplica.config.components import CriterionConfig, OptimConfig, ScheduleConfig
from dreplica.config.messages import describe_errors, nearest
from dreplica.errors import UsageError


class AgreementConfig(Section):
    """What is compared, how often, and what happens when it differs."""

    every: Annotated[int, Lockstep()] = Field(1, ge=0)
    """Compare every so many steps; 0: never."""
    expect: Annotated[Literal["auto", "identical", "independent"], Lockstep()] = "auto"
    """`identical`: all state must be equal; `independent`: indices and batches must be, states need not; `auto`:
    identical unless `seed.model` gives replicas distinct seeds."""
    snapshot_every: Annotated[int, Lockstep()] = Field(50, ge=0)
    """Steps between snapshots kept in memory, from which a divergence is replayed; 0: no snapshots, no replay."""
    on_divergence: Annotated[Literal["stop", "continue"], Lockstep()] = "stop"
    """`stop` at the first difference, or `continue` and only record it."""
    record: Annotated[Literal["stages", "tensors"], Lockstep()] = "stages"
    """What the run folder keeps of every checked step: the digest of each stage (trace.jsonl) or, beside it, of each
    single tensor, too (tensors.bin: 16 bytes for each), so that `dreplica compare` can name the tensor."""


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


class WorldConfig(Section):
    """Where replicas run, and how long a silent one is waited for."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """`auto`: a GPU of its own for each replica where there are enough, otherwise GPUs shared (with a warning),
    otherwise CPU; `cuda`: a GPU of its own or an error; `cpu`."""
    timeout: Annotated[float, Lockstep()] = Field(300.0, gt=0, le=86400)
    """Seconds until a silent replica counts as lost; a day at most."""


class RunFolderConfig(Section):
    """Where a run leaves its files."""

    name: Annotated[str | None, Lockstep()] = None
    """The run's name; null: the config file's. A second run of the same name gets a suffix, unless it resumes."""
    root: Annotated[str, Lockstep()] = "runs"
    """The folder that holds the run folders."""
    resume: Annotated[Literal["auto", "never"], Lockstep()] = "auto"
    """`auto`: go on with the newest run of this name where it was interrupted, if it had the same config; `never`:
    begin a new one."""

    stop_after: Annotated[int | None, Lockstep()] = Field(None, ge=1)
    """Stop after this step with a checkpoint and exit code 4, as a signal to stop would; null: go on to the end."""

    reference: Annotated[str | None, Lockstep()] = None
    """A recorded run's folder, or its trace, to compare every checked step with while training; stops at the first
    difference. Where there are several machines, the first of them needs to have it."""

    @field_validator("root")
    @classmethod
    def _check_root(cls, root: str) -> str:
        if not root.strip():
            raise UsageError(f"run.root: {root!r} names no folder. Name one, or '.' for the current folder.")
        return root


_MAX_SEED = 2**32 - 1
"""torch's CPU generator and NumPy's use 32 bits of a seed: 0 and 2**32 would build the same weights."""

Seed = Annotated[int, Field(ge=0, le=_MAX_SEED)]


class SeedConfig(Section):
    """Where randomness comes from."""

    model: Annotated[Seed | list[Seed] | Literal["distinct"] | None, Lockstep()] = 42
    """An int: shared by all replicas; a list: one per replica; `distinct`: 42 plus the replica id; null: unseeded, each
    replica draws a fresh one."""
    data: Annotated[Seed | None, Lockstep()] = 0
    """Seed of the order of samples, drawn by rank 0 for all; null: a fresh one each run, recorded."""
    augment: Annotated[Seed, Lockstep()] = 0
    """Seed of `data.augment`: what becomes of a sample depends on it, the epoch and the sample's index alone."""


def check_model_seeds(config: SeedConfig, num_replicas: int) -> None:
    """Raises UsageError if `seed.model` is a list that does not have one seed per replica."""
    if isinstance(config.model, list) and len(config.model) != num_replicas:
        raise UsageError(
            f"seed.model: {config.model} has {len(config.model)} seeds for {num_replicas} replicas. "
            "Give one seed per replica, one int for all, or 'distinct'."
        )


class ModelConfig(Section):
    """The model."""

    name: str = "resnet18"
    """Any torchvision classification model."""
    factory: str | None = None
    """`package.module:function` to use instead of `name`: called with `num_classes=`, returns an nn.Module."""
    weights: str | None = None
    """Where everything but the head comes from: a name of torchvision's (`DEFAULT`, `IMAGENET1K_V1`), fetched once per
    node, or a `.pth`, `.pt` or `.safetensors` file. The head is always drawn from the replica's seed. null: all is."""
    num_classes: int | None = Field(None, ge=2)
    """Outputs of the model; null: the data set's number of classes."""
    init: Annotated[Literal["scratch", "broadcast"], Lockstep()] = "scratch"
    """`scratch`: every replica's own build; `broadcast`: rank 0's state is sent to all after the build."""
    channels_last: bool = False
    """Keep weights and inputs in channels_last memory format."""
    compile: bool | str = False
    """Compile the model with torch.compile, in place: true, or a backend's name (`eager`, `aot_eager`, `inductor`)."""

    @field_validator("compile")
    @classmethod
    def _check_backend(cls, value: bool | str) -> bool | str:
        if isinstance(value, str):
            from torch._dynamo import list_backends  # takes a second to import, so only where it is asked for

            backends = list_backends(None)
            if value not in backends:
                raise UsageError(f"model.compile: torch has no backend {value!r}. {nearest(value, backends)}")
        return value


class ReplicaConfig(Section):
    """The whole replica from one function of yours."""

    factory: str | None = None
    """`package.module:function`, called as `function(config, num_classes, device)` under the replica's seed, returns
    `dreplica.Replica(model=, criterion=, optimizer=, scheduler=)`; null: built from the sections."""


class ReportConfig(Section):
    """Where else results go, beside the run folder."""

    tensorboard: Annotated[bool, Lockstep()] = False
    """Also write accuracy, loss and images per second of every replica to the run folder's `tensorboard/`; needs the
    package tensorboard."""
    wandb: Annotated[bool, Lockstep()] = False
    """Also log them to Weights & Biases, in the project WANDB_PROJECT (by default dreplica); needs the package
    wandb."""


class TrainConfig(Section):
    """How long, and how a step is taken."""

    epochs: Annotated[int, Lockstep()] = Field(1, ge=1)
    """Passes over the training set."""
    max_steps: Annotated[int | None, Lockstep()] = Field(None, ge=1)
    """Stop after so many steps, even in mid-epoch; null: all of them."""
    amp: Literal["bf16", "fp16"] | None = None
    """Automatic mixed precision in the forward pass; fp16 scales the loss."""
    grad_clip: float | None = Field(None, gt=0)
    """Largest norm of all gradients together; null: not clipped."""
    accumulate: int = Field(1, ge=1)
    """Split each batch into so many parts and accumulate their gradients: the same step with less memory, up to
    rounding; only BatchNorm sees each part by itself."""


class CheckpointConfig(Section):
    """When a run's state is saved, so that it can go on after an interruption."""

    every_steps: Annotated[int | None, Lockstep()] = Field(None, ge=1)
    """Save every so many steps; null: not by steps."""
    every_epochs: Annotated[int | None, Lockstep()] = Field(1, ge=1)
    """Save at the end of every so many epochs; null: not by epochs. A run that is told to stop saves in any case."""
    keep: Annotated[int, Lockstep()] = Field(2, ge=1)
    """How many checkpoints to keep, the newest."""


class DeterminismConfig(Section):
    """How numbers are rounded: every flag on its own."""

    mode: Literal["strict", "warn", "off"] = "strict"
    """`strict`: an operator without a deterministic implementation raises; `warn`: it warns; `off`: anything goes."""
    threads: int = Field(1, ge=1, le=1024)
    """Threads of one CPU operator; another number rounds differently, so it is fixed here and not left to the
    machine."""
    cudnn_benchmark: bool = False
    """Let cuDNN time its algorithms and pick one; two replicas may pick differently."""
    cudnn_deterministic: bool | None = None
    """Restrict cuDNN to deterministic algorithms; null: unless mode is `off`."""
    tf32: bool = False
    """Allow TensorFloat-32 in matrix products and convolutions on the GPU."""
    reduced_precision_reduction: bool = False
    """Allow fp16 and bf16 matrix products on the GPU to accumulate in reduced precision."""
    onednn: bool = True
    """Use oneDNN kernels on the CPU."""
    fill_uninitialized_memory: bool = True
    """In strict and warn mode, fill `torch.empty` and its kind with NaN so that reading it is reproducible."""
    cublas_workspace_config: str | None = ":4096:8"
    """CUBLAS_WORKSPACE_CONFIG, set before CUDA starts unless the environment already has it; null: not set."""


class FaultConfig(Section):
    """One fault."""

    replica: int = Field(ge=0)
    """Replica id."""
    step: int = Field(ge=1)
    """The step at which it strikes."""
    target: Literal["weights", "gradients", "buffers", "optimizer", "batch", "indices", "activation", "rng"]
    """What is struck: `gradients` before the optimizer's step, `batch` before the forward pass, `activation` the output
    of a module, the others at the end of the step."""
    tensor: str | None = None
    """Name of a parameter, buffer or (for `activation`) module; null: drawn."""
    bits: int = Field(1, ge=1, le=4096)
    """How many bits flip, in one tensor."""
    repeat: bool = False
    """Strike at every step from this one on, and in replays."""
    seed: Annotated[int, Field(ge=0)] = 0
    """What is not chosen (the tensor, the bits) is drawn from it."""

    def __str__(self) -> str:
        bits = f"{self.bits} bit{'s' * (self.bits > 1)} of {self.tensor or 'a tensor'}"
        when = f"from step {self.step} on" if self.repeat else f"at step {self.step}"
        return f"{bits} in {self.target} on replica {self.replica} {when}"


class RunConfig(Section):
    """Everything that decides a run."""

    world: WorldConfig = WorldConfig()
    run: RunFolderConfig = RunFolderConfig()
    seed: SeedConfig = SeedConfig()
    model: ModelConfig = ModelConfig()
    replica: ReplicaConfig = ReplicaConfig()
    criterion: CriterionConfig = CriterionConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    determinism: DeterminismConfig = DeterminismConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    agreement: AgreementConfig = AgreementConfig()
    report: ReportConfig = ReportConfig()
    inject: list[FaultConfig] = Field(default_factory=list)
    """Faults to inject: a list of {replica, step, target, tensor, bits, repeat, seed}."""
    overrides: dict[int, dict[str, Any]] = Field(default_factory=dict)
    """Replica id to a partial config: a declared difference between replicas, to compare two settings in lock-step."""

    @field_validator("overrides", mode="before")
    @classmethod
    def _drop_empty(cls, overrides: Any) -> Any:
        """A replica or section of which there is only the name overrides nothing, and declares no difference."""
        if not isinstance(overrides, Mapping):
            return overrides
        sections = RunConfig.model_fields.keys() - {"overrides"}
        kept = {
            replica_id: {key: value for key, value in partial.items() if key not in sections or value not in (None, {})}
            if isinstance(partial, Mapping)
            else partial
            for replica_id, partial in overrides.items()
        }
        return {replica_id: partial for replica_id, partial in kept.items() if partial not in (None, {})}

    @model_validator(mode="after")
    def _check_overrides(self) -> "RunConfig":
        for replica_id, partial in self.overrides.items():
            if "overrides" in partial:
                raise UsageError(f"overrides.{replica_id}.overrides: overrides do not nest.")
            if "inject" in partial:
                raise UsageError(
                    f"overrides.{replica_id}.inject: a fault says by itself which replica it strikes. Give it under "
                    f"inject, with replica: {replica_id}."
                )
            _check_difference(f"overrides.{replica_id}", self, self.for_replica(replica_id))
        return self

    def for_replica(self, replica_id: int) -> "RunConfig":
        """The config as replica `replica_id` runs it: its overrides merged in. Raises UsageError if they do not fit."""
        partial = self.overrides.get(replica_id)
        if not partial:
            return self
        try:
            return RunConfig.model_validate(merge(self.model_dump(exclude={"overrides"}), partial))
        except ValidationError as error:
            raise describe_errors(error.errors(), RunConfig, lambda _: f"overrides.{replica_id}.") from None

    def declared_differences(self) -> dict[int, dict[str, Any]]:
        """Replica id, section and key of what an override changes: one that says what all do declares no difference."""
        base = self.model_dump(exclude={"overrides"})
        changes = {}
        for replica_id in self.overrides:
            own = self.for_replica(replica_id).model_dump(exclude={"overrides"})
            sections = {name: values for name, values in own.items() if values != base[name]}
            changes[replica_id] = {
                name: {key: value for key, value in values.items() if key not in base[name] or value != base[name][key]}
                for name, values in sections.items()
            }
        return {replica_id: partial for replica_id, partial in changes.items() if partial}

    def check_replicas(self, num_replicas: int) -> None:
        """Raises UsageError if an override or a seed names a replica that does not exist, or one lacks a seed."""
        for replica_id in self.overrides:
            if not 0 <= replica_id < num_replicas:
                remedy = "Override another."
                if replica_id > 0:
                    remedy = f"Start more with --nproc_per_node={replica_id + 1}, or override another."
                raise UsageError(
                    f"overrides.{replica_id}: there is no such replica; the {num_replicas} count from 0. {remedy}"
                )
        for fault in self.inject:
            if fault.replica >= num_replicas:
                raise UsageError(
                    f"inject: there is no replica {fault.replica}; the {num_replicas} count from 0. Choose another."
                )
        check_model_seeds(self.seed, num_replicas)

    def to_yaml(self) -> str:
        """The resolved config, every key written out: what the run folder keeps."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False)


def merge(base: Mapping[str, Any], partial: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `partial` laid over it, mapping by mapping. A component given another name keeps no old arguments."""
    merged = dict(base)
    for key, value in partial.items():
        old = merged.get(key)
        if not (isinstance(old, Mapping) and isinstance(value, Mapping)):
            merged[key] = value
        elif key in {"criterion", "optim", "schedule"} and value.get("name", old.get("name")) != old.get("name"):
            merged[key] = {**({"lr": old["lr"]} if "lr" in old else {}), **value}
        else:
            merged[key] = merge(old, value)
    return merged


def _check_difference(key: str, base: RunConfig, own: RunConfig) -> None:
    """Raises UsageError for a difference that replicas in lock-step cannot have, or that changes nothing."""
    for section, field in RunConfig.model_fields.items():
        for name, item in getattr(field.annotation, "model_fields", {}).items():
            value = getattr(getattr(own, section), name)
            if any(isinstance(mark, Lockstep) for mark in item.metadata) and value != getattr(
                getattr(base, section), name
            ):
                raise UsageError(
                    f"{key}.{section}.{name}: {value!r} will not do: replicas in lock-step must share this value. "
                    f"Set {section}.{name} for all of them."
                )
    if own.model.name != base.model.name and own.model.factory is not None:
        raise UsageError(
            f"{key}.model.name: {own.model.name!r} changes nothing, since model.factory ({own.model.factory!r}) comes "
            f"before it. Set {key}.model.factory to null, too, or to another."
        )
