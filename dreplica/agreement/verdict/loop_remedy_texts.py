"""The catalogue of remedies for training loops: data, schedulers, scalers, and data-parallel ranks."""

from collections.abc import Mapping

from dreplica.agreement.verdict.remedy_template import RemedyTemplate

LOOP_REMEDIES: Mapping[str, RemedyTemplate] = {
    # Data.
    "broadcast-indices": RemedyTemplate(
        "draw the sample order once, on rank 0, and broadcast it; or seed each sampler's generator alike on every "
        "replica, anew for each epoch"
    ),
    "compare-data-files": RemedyTemplate(
        "compare the data files of the replicas' nodes byte by byte", "sha256sum FILE"
    ),
    "sort-files": RemedyTemplate(
        "files and classes numbered in the order of os.listdir, glob or a set get different numbers", "sorted(names)"
    ),
    "seed-augmentation": RemedyTemplate(
        "draw augmentation from a generator seeded with (seed, epoch, sample index), not from a worker's or the "
        "global one"
    ),
    "seed-split": RemedyTemplate(
        "the data are split before anything is seeded: split them with a generator that has a fixed seed",
        "random_split(dataset, lengths, generator=torch.Generator().manual_seed(42))",
    ),
    "seed-data": RemedyTemplate(
        "draw {some} from a generator with a fixed seed: the data are made before anything is seeded"
    ),
    "seed-sample-generator": RemedyTemplate(
        "seed a generator anew for each sample, from (seed, epoch, index): {some} continues from sample to sample, and "
        "from one replay to the next"
    ),
    "number-in-order": RemedyTemplate(
        "number classes, files and words in sorted order, not in that of a set, os.listdir or glob: {some}",
        "sorted(names)",
    ),
    "stable-hash": RemedyTemplate(
        "hash() of a text differs between processes: use hashlib, or set PYTHONHASHSEED before Python starts",
        "PYTHONHASHSEED=0 dreplica train ...",
    ),
    "sample-from-index": RemedyTemplate(
        "make dataset[index] depend on the index alone, not on the rank, the host, the clock, the environment or an "
        "unseeded generator"
    ),
    "seed-workers": RemedyTemplate(
        "draw nothing in worker processes that the global generators decide: each worker has its own",
        "generator = numpy.random.default_rng((seed, epoch, index))",
    ),
    "evaluate-alike": RemedyTemplate(
        "call model.eval() on every replica before evaluating, and evaluate the same samples in the same batches"
    ),
    # Schedulers, scalers and steps of optimizers.
    "reduce-metric": RemedyTemplate(
        "step the scheduler with one value on all ranks: average the metric over the ranks first",
        "dist.all_reduce(metric); scheduler.step(metric / dist.get_world_size())",
    ),
    "evaluate-metric-alike": RemedyTemplate(
        "step the scheduler with the same metric on every replica: evaluate the same samples in the same batches"
    ),
    "step-scheduler-alike": RemedyTemplate(
        "step the scheduler equally often on every replica ({some}): in no condition that only some replicas meet"
    ),
    "unscale-after-all-reduce": RemedyTemplate(
        "look for inf in the averaged gradients: only a rank that finds inf in its own skips the step and reduces its "
        "scale",
        "dist.all_reduce(p.grad) for all p, then scaler.unscale_(optimizer); scaler.step(optimizer); scaler.update()",
    ),
    "update-scaler-alike": RemedyTemplate(
        "call scaler.step and scaler.update on every replica in every step: in no condition that only some replicas "
        "meet"
    ),
    "step-optimizer-alike": RemedyTemplate(
        "call optimizer.step on every rank in every step: in no condition that only some ranks meet"
    ),
    "load-optimizer-alike": RemedyTemplate("load or change the optimizer's state on every rank or on none: {some}"),
    "seed-outside-parameters": RemedyTemplate(
        "seed the build of {some}, too: the optimizer has these parameters, and the model does not"
    ),
    # DistributedDataParallel.
    "ddp-broadcast-build": RemedyTemplate(
        "send rank 0's build to all ranks, as DistributedDataParallel does",
        "for t in (*model.parameters(), *model.buffers()): dist.broadcast(t.detach(), 0)",
    ),
    "ddp-freeze-alike": RemedyTemplate("set requires_grad alike on every rank: {some}"),
    "ddp-freeze-before-wrapping": RemedyTemplate(
        "set requires_grad before the model is wrapped: DistributedDataParallel averages the gradients of the "
        "parameters that require one at that time, except those that it is asked to ignore"
    ),
    "ddp-find-unused": RemedyTemplate(
        "if the forward pass uses {some} on some ranks only",
        "DistributedDataParallel(model, find_unused_parameters=True)",
    ),
    "ddp-sync-last-backward": RemedyTemplate(
        "run the backward pass of the last micro-batch outside of no_sync(), on every rank"
    ),
    "ddp-call-wrapped-model": RemedyTemplate(
        "call the wrapped model, not model.module: gradients are averaged only after a forward pass of the wrapper"
    ),
    "ddp-average-all-gradients": RemedyTemplate(
        "average the gradients of all parameters over all ranks before the optimizer's step"
    ),
    "ddp-change-gradients-alike": RemedyTemplate(
        "change averaged gradients alike on every rank, or on none: clipping, hooks, and code that writes to .grad"
    ),
    "ddp-write-alike": RemedyTemplate(
        "write to parameters alike on every rank, or on none: clamping, averaging, loading of a checkpoint"
    ),
    "ddp-wrap-loss": RemedyTemplate(
        "average the gradients of {some}, too: the optimizer has these parameters, and the wrapped model does not; "
        "register their module in the model, or wrap it",
        "criterion = DistributedDataParallel(criterion)",
    ),
    "ddp-update-from-all-ranks": RemedyTemplate(
        "update {some} from the samples of all ranks: all-reduce the statistics, or gather the samples, first"
    ),
    "ddp-broadcast-buffers": RemedyTemplate(
        "by default, sends rank 0's buffers to all ranks before each forward pass", "DistributedDataParallel(model)"
    ),
    "ddp-sync-batch-norm": RemedyTemplate(
        "before wrapping: statistics of the whole batch",
        "model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)",
    ),
    "forward-alike": RemedyTemplate(
        "run equally many forward passes in training mode on every rank: these count them: {some}"
    ),
    "ddp-exclude-buffers": RemedyTemplate(
        "if each rank is meant to have its own buffers",
        'Agreement(model, optimizer, stages=("gradients", "optimizer", "weights"))',
    ),
    "ddp-exclude-stage": RemedyTemplate(
        "each data-parallel rank has its own samples, outputs and random numbers: compare what all ranks share",
        'Agreement(model, optimizer, stages=("gradients", "optimizer", "weights"))',
    ),
    # Device meshes.
    "mesh-seed-alike": RemedyTemplate(
        "seed torch alike on every rank and build before sharding; parameters that are initialized after sharding get "
        "the same numbers only from DTensor's own initialization under one seed, and after to_empty() each parameter "
        "and buffer needs one",
        "torch.manual_seed(42)",
    ),
    "mesh-reduce-gradient": RemedyTemplate(
        "reduce this gradient over {axes}: shard the module's parameters with the mesh that has this axis, or "
        "all_reduce the gradient before the optimizer steps"
    ),
    "mesh-clip-whole-norm": RemedyTemplate(
        "clip by the norm of all shards, not by that of the local ones",
        "torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)",
    ),
    "mesh-buffers-alike": RemedyTemplate("compute or broadcast buffers alike along {axes}"),
    "mesh-update-alike": RemedyTemplate("step the optimizer and write to parameters alike on all ranks along {axes}"),
}
"""Code to templates."""
