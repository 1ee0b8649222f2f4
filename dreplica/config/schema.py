"""The schema of the config: every section, its fields, their defaults and what they accept.

The sections follow in the order in which `RunConfig` lists them. The docstring below a field is its help text in
`--help` and in docs/configuration.md. Keys marked `Lockstep` must be the same on all replicas.

To add a key, add a field with a docstring to its section and run `python docs/update.py`. Importing this module does
not import torch: checks that need it import it when they run.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import yaml
from pydantic import ConfigDict, Field, ValidationError, field_validator, model_validator

from dreplica.config.base import Lockstep, Section
from dreplica.config.given import dotted_keys, given_keys, keep_given
from dreplica.config.messages import config_error, invalid_value, join_errors, nearest
from dreplica.config.overrides import check_override, merge
from dreplica.config.validation import describe_errors
from dreplica.errors import UsageError

WHOLE_CONFIG = "# Every setting of a run, defaults included.\n"
"""First line of a config that lists all settings, of which none counts as chosen by a user."""


class WorldConfig(Section):
    """Devices of the replicas, and the timeout after which a replica counts as lost."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """`auto`: one GPU per replica if there are enough, else shared GPUs (with a warning), else the CPU. `cuda`: one GPU
    per replica, or an error. `cpu`: the CPU."""
    timeout: Annotated[float, Lockstep()] = Field(300.0, gt=0, le=86400)
    """Seconds after which a replica counts as lost that has not arrived at the start, or does not respond. At most one
    day."""


class RunFolderConfig(Section):
    """The run folder, resuming, and the run to compare with."""

    name: Annotated[str | None, Lockstep()] = None
    """Name of the run. null: the config file's name. A suffix is added if the name is taken and the run does not
    resume."""
    root: Annotated[str, Lockstep()] = "runs"
    """Folder in which run folders are created."""
    resume: Annotated[Literal["auto", "never"], Lockstep()] = "auto"
    """`auto`: resume the newest run of this name if it was interrupted and had the same config. `never`: start a new
    run."""
    stop_after: Annotated[int | None, Lockstep()] = Field(None, ge=1)
    """Step after which to stop with a checkpoint and exit code 4, as after a stop signal. null: run to the end."""
    reference: Annotated[str | None, Lockstep()] = None
    """Folder or trace of a recorded run. Each compared step is also compared with it, and training stops at the first
    difference. With several nodes, only the first needs the folder."""

    @field_validator("root")
    @classmethod
    def _check_root(cls, root: str) -> str:
        if not root.strip():
            raise config_error(
                "invalid-value",
                "run.root",
                f"expected a folder, got {root!r}",
                "Use '.' for the current folder.",
                value=root,
                expected="a folder",
            )
        return root


_MAX_SEED = 2**32 - 1
"""torch's CPU generator and NumPy's use 32 bits of a seed: 0 and 2**32 would build the same weights."""

Seed = Annotated[int, Field(ge=0, le=_MAX_SEED)]


class SeedConfig(Section):
    """Seeds of everything that is drawn at random."""

    model: Annotated[Seed | list[Seed] | Literal["distinct"] | None, Lockstep()] = 42
    """Seed of the model's weights and of dropout. An int: the same for all replicas. A list: one seed per replica.
    `distinct`: 42 plus the replica id. null: each replica draws a seed."""
    data: Annotated[Seed | None, Lockstep()] = 0
    """Seed of the order of the samples, which rank 0 draws for all replicas. null: drawn in each run, and recorded."""
    augment: Annotated[Seed, Lockstep()] = 0
    """Seed of `data.augment`. The augmentation of a sample depends only on this seed, the epoch and the sample's
    index."""


def check_model_seeds(config: SeedConfig, num_replicas: int) -> None:
    """Check that a list of model seeds has one for each replica.

    Raises:
        UsageError: The list has another length.
    """
    if isinstance(config.model, list) and len(config.model) != num_replicas:
        raise config_error(
            "invalid-value",
            "seed.model",
            f"expected {num_replicas} seeds for {num_replicas} replicas, got {len(config.model)}: {config.model}",
            "Use one seed per replica, one int for all, or 'distinct'.",
            value=config.model,
            expected=f"{num_replicas} seeds",
        )


class ModelConfig(Section):
    """The model, its initial weights and its memory format."""

    name: str = "resnet18"
    """Name of a torchvision classification model."""
    factory: str | None = None
    """Function that builds the model instead of `name`, as `package.module:function`. It is called with `num_classes=`
    and returns an nn.Module."""
    weights: str | None = None
    """Pretrained weights for all layers except the head: the name of torchvision weights (`DEFAULT`, `IMAGENET1K_V1`),
    downloaded once per node, or a `.pth`, `.pt` or `.safetensors` file. The head is always drawn from the replica's
    seed. null: all layers are."""
    num_classes: int | None = Field(None, ge=2)
    """Number of outputs of the model. null: the data set's number of classes."""
    init: Annotated[Literal["scratch", "broadcast"], Lockstep()] = "scratch"
    """`scratch`: each replica builds its own model. `broadcast`: rank 0 sends its state to all replicas after the
    build."""
    channels_last: bool = False
    """Use the channels_last memory format for weights and inputs."""
    compile: bool | str = False
    """Compile the model with torch.compile: true, or the name of a backend (`eager`, `aot_eager`, `inductor`)."""

    @field_validator("compile")
    @classmethod
    def _check_backend(cls, value: bool | str) -> bool | str:
        if isinstance(value, str):
            from torch._dynamo import list_backends  # importing it takes a second

            backends = list_backends(None)
            if value not in backends:
                raise config_error(
                    "unknown-name",
                    "model.compile",
                    f"torch has no backend {value!r}",
                    nearest(value, backends),
                    value=value,
                )
        return value


class ReplicaConfig(Section):
    """A function of yours that builds the whole replica."""

    factory: str | None = None
    """Function that builds the replica, as `package.module:function`. It is called as `function(config, num_classes,
    device)` after seeding and returns `dreplica.Replica(model=, criterion=, optimizer=, scheduler=)`. null: build the
    replica from the sections `model`, `criterion`, `optim` and `schedule`."""


class _Component(Section):
    """A torch class by `name`. Each further key is a keyword argument of the class."""

    model_config = ConfigDict(extra="allow")

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for the class, without declared ones that are null."""
        declared = {name: getattr(self, name) for name in type(self).model_fields if name not in ("name", "per")}
        return {key: value for key, value in declared.items() if value is not None} | (self.model_extra or {})


class CriterionConfig(_Component):
    """The loss, a class in `torch.nn`. Further keys are its keyword arguments."""

    name: str = "CrossEntropyLoss"
    """Class in `torch.nn`, called with (outputs, labels)."""

    @model_validator(mode="after")
    def _check(self) -> "CriterionConfig":
        from dreplica.config.components import try_criterion

        try_criterion(self)
        return self


class OptimConfig(_Component):
    """The optimizer, a class in `torch.optim`. Further keys are its keyword arguments."""

    name: str = "SGD"
    """Class in `torch.optim`."""
    lr: float = Field(0.01, ge=0)
    """Learning rate."""

    @model_validator(mode="after")
    def _check(self) -> "OptimConfig":
        from dreplica.config.components import try_optimizer

        try_optimizer(self)
        return self


class ScheduleConfig(_Component):
    """The learning-rate schedule, a class in `torch.optim.lr_scheduler`. Further keys are its keyword arguments."""

    name: str | None = None
    """Class in `torch.optim.lr_scheduler`. null: a constant learning rate."""
    per: Literal["epoch", "step"] = "epoch"
    """`epoch`: step the schedule after each epoch. `step`: step it after each optimizer step, as warm-up and OneCycleLR
    need."""

    @model_validator(mode="after")
    def _check(self) -> "ScheduleConfig":
        if self.name is not None or self.arguments:
            from dreplica.config.components import try_schedule

            try_schedule(self)
        return self


class DataConfig(Section):
    """The data set, its split, and how images are loaded and augmented."""

    name: Annotated[str, Lockstep()] = "digits"
    """`digits` (1,797 images that scikit-learn ships, no download), `imagefolder`, the name of a torchvision data set
    (`CIFAR10`), or a function `package.module:function`, which is called with this section and returns (training set,
    validation set, number of classes)."""
    root: str | None = None
    """Folder with the data. For `imagefolder`: `train/` and `val/` with one folder per class in each, or one folder per
    class. For torchvision data sets: where they are, or where to download them to. null: `data`."""
    batch_size: Annotated[int, Lockstep()] = Field(64, ge=1)
    """Samples per step on each replica. The last batch of an epoch may be smaller."""
    num_workers: int = Field(0, ge=0, le=100)
    """Loader processes per replica. 0: load in the training process. With `decode: node` the workers of a node share
    the work, so each replica needs fewer."""
    val_fraction: Annotated[float, Lockstep()] = Field(0.2, gt=0, lt=1)
    """Fraction of the samples to hold out for validation if the data set has no validation set."""
    split_seed: Annotated[int, Lockstep()] = Field(0, ge=0, le=2**32 - 1)
    """Seed of the split into training and validation samples."""
    sample_weights: Annotated[str | None, Lockstep()] = None
    """Weight of each training sample in the loss. `balanced`: every class has the same total weight. Or a CSV file with
    the columns file and weight (paths relative to `root`). null: equal weights."""
    augment: Annotated[str | None, Lockstep()] = None
    """Augmentation of the training images: `flip`, `crop_flip` (pad by 4, random crop, flip, as for CIFAR),
    `resized_crop` (crop of random size and shape, flip, as for ImageNet), `trivial` (TrivialAugmentWide), or a function
    `package.module:function` from image to image (uint8, 3 x H x W). Its random numbers depend only on (seed.augment,
    epoch, sample). null: none."""
    image_size: Annotated[int | None, Lockstep()] = Field(None, ge=1, le=8192)
    """Height and width of the images that the model gets. null: the usual size for the data (224 for photographs)."""
    decode: Literal["replica", "node"] = "replica"
    """`replica`: each replica decodes its own images. `node`: the replicas of a node share each decoded image, and
    therefore also a decoding error."""
    cache: Literal["none", "memory", "device"] = "none"
    """Where to keep decoded images after the first epoch, at 3 bytes per pixel. `memory`: host memory, once per
    replica, or once per node with `decode: node`. `device`: the replica's device, which then also augments and
    assembles batches (`augment` must be null, `flip` or `crop_flip`). The pixels are the same in all modes."""
    on_error: Annotated[Literal["stop", "skip"], Lockstep()] = "stop"
    """What to do about a sample that cannot be loaded. `stop`: stop the run when it is reached. `skip`: load every
    sample once before the first step, and leave out on all replicas the samples that any node cannot load."""


class TrainConfig(Section):
    """The length of training, and how a step is computed."""

    epochs: Annotated[int, Lockstep()] = Field(1, ge=1)
    """Passes over the training set."""
    max_steps: Annotated[int | None, Lockstep()] = Field(None, ge=1)
    """Stop after this many steps, also within an epoch. null: no limit."""
    amp: Literal["bf16", "fp16"] | None = None
    """Data type of automatic mixed precision in the forward pass. fp16 also scales the loss. null: none."""
    grad_clip: float | None = Field(None, gt=0)
    """Maximum norm of all gradients together. null: no clipping."""
    accumulate: int = Field(1, ge=1)
    """Number of micro-batches that each batch is split into, whose gradients are accumulated. The step is the same up
    to rounding and needs less memory. BatchNorm sees each micro-batch separately."""


class DeterminismConfig(Section):
    """Flags that decide how numbers are rounded."""

    mode: Literal["strict", "warn", "off"] = "strict"
    """What happens at an operator without a deterministic implementation. `strict`: an error. `warn`: a warning. `off`:
    nothing."""
    threads: int = Field(1, ge=1, le=1024)
    """Threads per CPU operator. Results can differ in rounding with the number of threads, so the default is 1 on every
    machine."""
    cudnn_benchmark: bool = False
    """Let cuDNN time its algorithms and choose the fastest. Two replicas may choose differently."""
    cudnn_deterministic: bool | None = None
    """Use only deterministic cuDNN algorithms. null: true unless `mode` is `off`."""
    tf32: bool = False
    """Allow TensorFloat-32 in matrix products and convolutions on the GPU."""
    reduced_precision_reduction: bool = False
    """Allow fp16 and bf16 matrix products on the GPU to accumulate in reduced precision."""
    onednn: bool = True
    """Use oneDNN kernels on the CPU."""
    fill_uninitialized_memory: bool = True
    """Fill uninitialized memory (`torch.empty`) with NaN, so that reading it is reproducible. Has no effect with `mode:
    off`."""
    cublas_workspace_config: str | None = ":4096:8"
    """Value for the environment variable CUBLAS_WORKSPACE_CONFIG, which is set before CUDA starts unless the
    environment has one. null: do not set it."""


class CheckpointConfig(Section):
    """When to save the state of a run, so that it can resume after an interruption."""

    every_steps: Annotated[int | None, Lockstep()] = Field(None, ge=1)
    """Number of steps between checkpoints. null: none by steps."""
    every_epochs: Annotated[int | None, Lockstep()] = Field(1, ge=1)
    """Number of epochs between checkpoints. null: none by epochs. A run that is asked to stop always saves one."""
    keep: Annotated[int, Lockstep()] = Field(2, ge=1)
    """Number of checkpoints to keep. Older ones are deleted."""


class AgreementConfig(Section):
    """What is compared, how often, and what happens on a divergence."""

    every: Annotated[int, Lockstep()] = Field(1, ge=0)
    """Number of steps between comparisons. 0: no comparisons."""
    expect: Annotated[Literal["auto", "identical", "independent"], Lockstep()] = "auto"
    """`identical`: all training state must be equal. `independent`: only sample indices and batches must be equal.
    `auto`: `identical` unless `seed.model` gives replicas distinct seeds."""
    snapshot_every: Annotated[int, Lockstep()] = Field(50, ge=0)
    """Number of steps between snapshots in memory, from which a divergence is replayed. 0: no snapshots and no
    replay."""
    on_divergence: Annotated[Literal["stop", "continue"], Lockstep()] = "stop"
    """`stop`: stop at the first divergence. `continue`: record it and continue training."""
    record: Annotated[Literal["stages", "tensors"], Lockstep()] = "stages"
    """What the run folder records for each compared step. `stages`: the digest of each stage (trace.jsonl). `tensors`:
    also the digest of each tensor (tensors.bin, 16 bytes each), so that `dreplica compare` can name the tensor."""


class ReportConfig(Section):
    """Trackers that get the metrics in addition to the run folder."""

    tensorboard: Annotated[bool, Lockstep()] = False
    """Write accuracy, loss and images per second of each replica to `tensorboard/` in the run folder. Needs the package
    tensorboard."""
    wandb: Annotated[bool, Lockstep()] = False
    """Log accuracy, loss and images per second of each replica to Weights & Biases, in the project WANDB_PROJECT
    (default: dreplica). Needs the package wandb."""


class FaultConfig(Section):
    """A fault to inject: bits to flip, or an element to scale, in one tensor of one replica."""

    replica: int = Field(ge=0)
    """Replica id."""
    step: int = Field(ge=1)
    """Step at which the fault is injected."""
    target: Literal["weights", "gradients", "buffers", "optimizer", "batch", "indices", "activation", "operator", "rng"]
    """What is corrupted: `gradients` before the optimizer step, `batch` before the forward pass, `activation` the
    output of a module, `operator` the result that an operator returns, and all others at the end of the step."""
    tensor: str | None = None
    """Name of the parameter or buffer to corrupt, with `activation` of the module, or with `operator` of the operator,
    such as `aten.relu.default`: its first call in the step returns a wrong result. null: drawn at random."""
    element: int | None = Field(None, ge=0)
    """Position of the element to corrupt, in row-major order. null: drawn at random."""
    bits: int = Field(1, ge=1, le=4096)
    """Number of bits to flip in the tensor, or in `element`."""
    bit: int | None = Field(None, ge=0, le=63)
    """Bit to flip, from 0 for the lowest. null: drawn at random."""
    scale: float | None = Field(None, allow_inf_nan=False)
    """Factor to multiply an element with, instead of flipping bits."""
    repeat: bool = False
    """Inject the fault at every step from `step` on, and in replays."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the choice of tensor, element and bits."""

    def check(self, key: str) -> list[UsageError]:
        """Return an error for each key that does not fit another one.

        Args:
            key: The key of the fault, such as `inject.0`.
        """
        errors = []
        if self.target == "operator" and self.tensor is None:
            fix = "Name an operator, such as aten.relu.default."
            errors.append(config_error("missing-value", f"{key}.tensor", "target 'operator' requires a value", fix))
        if self.scale == 1:
            errors.append(invalid_value(f"{key}.scale", self.scale, "a factor other than 1"))
        if self.scale is not None and self.target in ("indices", "rng"):
            problem = f"the elements of target {self.target!r} are integers, which cannot be scaled"
            errors.append(config_error("unscalable-target", f"{key}.scale", problem, "Use bit.", value=self.scale))
        return errors

    def __str__(self) -> str:
        name = self.tensor or "a tensor"
        place = name if self.element is None else f"element {self.element} of {name}"
        if self.scale is not None:
            what = f"{place if self.element is not None else f'an element of {name}'} times {self.scale:g}"
        elif self.bit is not None:
            what = f"bit {self.bit} of {place if self.element is not None else f'an element of {name}'}"
        else:
            what = f"{self.bits} bit{'s' * (self.bits > 1)} of {place}"
        when = f"from step {self.step} on" if self.repeat else f"at step {self.step}"
        return f"{what} in {self.target} on replica {self.replica} {when}"


class RunConfig(Section):
    """The config of a run."""

    world: WorldConfig = WorldConfig()
    run: RunFolderConfig = RunFolderConfig()
    seed: SeedConfig = SeedConfig()
    model: ModelConfig = ModelConfig()
    replica: ReplicaConfig = ReplicaConfig()
    # Factories: validating these defaults imports torch.
    criterion: CriterionConfig = Field(default_factory=CriterionConfig)
    optim: OptimConfig = Field(default_factory=OptimConfig)
    schedule: ScheduleConfig = ScheduleConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    determinism: DeterminismConfig = DeterminismConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    agreement: AgreementConfig = AgreementConfig()
    report: ReportConfig = ReportConfig()
    inject: list[FaultConfig] = Field(default_factory=list)
    """Faults to inject, a list of {replica, step, target, tensor, element, bits, bit, scale, repeat, seed}."""
    overrides: dict[int, dict[str, Any]] = Field(default_factory=dict)
    """Partial config for single replicas, by replica id: {1: {optim: {lr: 0.1}}}. It declares a difference, to compare
    two settings step by step."""

    @field_validator("overrides", mode="before")
    @classmethod
    def _drop_empty(cls, overrides: Any) -> Any:
        """Drop replicas and sections without keys: they override nothing and declare no difference."""
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
    def _check_faults(self) -> "RunConfig":
        errors = [error for index, fault in enumerate(self.inject) for error in fault.check(f"inject.{index}")]
        if errors:
            raise join_errors(errors)
        return self

    @model_validator(mode="after")
    def _check_overrides(self) -> "RunConfig":
        for replica_id, partial in self.overrides.items():
            prefix = f"overrides.{replica_id}"
            if "overrides" in partial:
                fix = f"Move its keys to {prefix}."
                raise config_error("nested-overrides", f"{prefix}.overrides", "overrides cannot be nested", fix)
            if "inject" in partial:
                fix = f"Move them to the section inject, with replica: {replica_id}."
                raise config_error("faults-in-override", f"{prefix}.inject", "faults cannot be overridden", fix)
            check_override(prefix, self, self.for_replica(replica_id))
        return self

    def for_replica(self, replica_id: int) -> "RunConfig":
        """Return the config with the overrides of one replica merged in.

        Raises:
            UsageError: An override is invalid.
        """
        partial = self.overrides.get(replica_id)
        if not partial:
            return self
        try:
            own = RunConfig.model_validate(merge(self.model_dump(exclude={"overrides"}), partial))
        except ValidationError as error:
            prefix = f"overrides.{replica_id}."
            raise describe_errors(error.errors(), RunConfig, lambda _: "", prefix) from None
        keep_given(own, self.given | dotted_keys(partial))
        return own

    @property
    def given(self) -> set[str]:
        """The dotted keys of sections that a user has chosen, such as `model.name`."""
        return given_keys(self)

    def declared_differences(self) -> dict[int, dict[str, Any]]:
        """Return what the overrides change.

        Returns:
            For each replica id, the changed values by section and key. A replica whose overrides change nothing is left
            out.
        """
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
        """Check what depends on the number of replicas: overrides, faults and model seeds.

        Raises:
            UsageError: An override or a fault names a replica that does not exist, or a replica has no seed.
        """
        valid = f"expected a replica from 0 to {num_replicas - 1}"
        for replica_id in self.overrides:
            if not 0 <= replica_id < num_replicas:
                fix = f"Start {replica_id + 1} replicas, or override another one." if replica_id > 0 else ""
                raise config_error(
                    "unknown-replica", f"overrides.{replica_id}", f"{valid}, got {replica_id}", fix, value=replica_id
                )
        for index, fault in enumerate(self.inject):
            if fault.replica >= num_replicas:
                raise config_error(
                    "unknown-replica",
                    f"inject.{index}.replica",
                    f"{valid}, got {fault.replica}",
                    f"Start {fault.replica + 1} replicas, or choose another one.",
                    value=fault.replica,
                )
        check_model_seeds(self.seed, num_replicas)

    def to_yaml(self) -> str:
        """Return the whole config as YAML, defaults included, as the run folder keeps it."""
        return WHOLE_CONFIG + yaml.safe_dump(self.model_dump(), sort_keys=False)
