"""The catalogue of remedies: every code with the templates of its text and command."""

from collections.abc import Mapping

from dreplica.agreement.verdict.loop_remedy_texts import LOOP_REMEDIES
from dreplica.agreement.verdict.remedy_template import RemedyTemplate

_SEED_ALL = "random.seed(42); numpy.random.seed(42); torch.manual_seed(42)"
_CREATE_OPTIMIZER = "optimizer = torch.optim.{optimizer}(model.parameters(), ...)"
_STRICT = {"determinism.mode": "strict"}
_PYTORCH_ISSUES = "https://github.com/pytorch/pytorch/issues"

REMEDIES: Mapping[str, RemedyTemplate] = {
    **LOOP_REMEDIES,
    # A line of a report of schema 1.
    "text": RemedyTemplate("{text}"),
    # Configs and environments.
    "start-with-one-config": RemedyTemplate("start every replica with the same --config file and the same arguments"),
    "declare-override": RemedyTemplate(
        "declare what is meant to differ: replica id, section, key, value",
        settings={"overrides": "{1: {optim: {lr: 0.01}}}"},
    ),
    "declare-numerics-override": RemedyTemplate(
        "declare a numerics flag that is meant to differ", settings={"overrides": "{1: {determinism: {threads: 2}}}"}
    ),
    "remove-override": RemedyTemplate("remove the override, or set it for all replicas"),
    "install-same-versions": RemedyTemplate("install the same versions on every node"),
    "use-same-hardware": RemedyTemplate("run all replicas on the same model of GPU or CPU"),
    "set-fields-alike": RemedyTemplate(
        "set the same {fields} on all replicas: the job's code, an imported library or an environment variable may set "
        "it on some of them"
    ),
    "set-field-alike": RemedyTemplate("set the same {field} on all replicas"),
    "compare-manifest": RemedyTemplate("compare manifest.json with the current environment"),
    "start-anew": RemedyTemplate("start the run anew", settings={"run.resume": "never"}),
    "set-as-in-reference": RemedyTemplate("as in the reference"),
    # Optimizer, scheduler and parameters.
    "bind-optimizer": RemedyTemplate(
        "create the optimizer from model.parameters() of this model, after it is built and moved to its device"
    ),
    "bind-scheduler": RemedyTemplate("create the scheduler from the optimizer that steps"),
    "optimize-parameters": RemedyTemplate(
        "pass every parameter that requires a gradient to the optimizer, in exactly one parameter group"
    ),
    "unshare-storage": RemedyTemplate(
        "clone() one of the two tensors; to tie weights, assign one nn.Parameter to both places"
    ),
    "create-optimizer-last": RemedyTemplate("create the optimizer after the model is final", _CREATE_OPTIMIZER),
    "copy-together": RemedyTemplate(
        "to copy model and optimizer, copy both in one call", "model, optimizer = copy.deepcopy((model, optimizer))"
    ),
    "freeze-parameter": RemedyTemplate(
        "to leave it untrained on purpose, freeze it", "model.get_parameter('{tensor}').requires_grad_(False)"
    ),
    "pass-each-once": RemedyTemplate("pass each parameter once", _CREATE_OPTIMIZER),
    "create-scheduler": RemedyTemplate(
        "create the scheduler with the optimizer that steps",
        "scheduler = torch.optim.lr_scheduler.{scheduler}(optimizer, ...)",
    ),
    "tie-tensors": RemedyTemplate("to tie the tensors, register one parameter under both names ({tensor} = {other})"),
    "separate-tensors": RemedyTemplate("to separate the tensors, initialize {tensor} with .detach().clone()"),
    "set-value-alike": RemedyTemplate(
        "set the same value of {some} on every replica: look for code, a file or an environment variable that sets it "
        "on some of them"
    ),
    "check-learning": RemedyTemplate(
        "check that the learning rate is not 0, that loss.backward() is called, and that the optimizer was created "
        "from model.parameters() of this model"
    ),
    # Seeds and builds.
    "seed-build": RemedyTemplate("seed the build of every replica alike", settings={"seed.model": 42}),
    "broadcast-build": RemedyTemplate(
        "or keep unseeded builds and send rank 0's state to all replicas", settings={"model.init": "broadcast"}
    ),
    "broadcast-state": RemedyTemplate("or send rank 0's state to all replicas", settings={"model.init": "broadcast"}),
    "expect-auto": RemedyTemplate("or expect the replicas to differ", settings={"agreement.expect": "auto"}),
    "seed-before-build": RemedyTemplate("on every replica, just before the build", _SEED_ALL),
    "seed-generators": RemedyTemplate("on every replica, before the build", "{command}"),
    "draw-alike": RemedyTemplate(
        "draw the same random numbers on every replica: no draw may depend on the rank, the time, or a condition that "
        "only some replicas meet"
    ),
    "build-without-rank": RemedyTemplate("build the model without draws that depend on the rank"),
    "build-same-modules": RemedyTemplate(
        "build the same modules in the same order on every replica, without draws that depend on the rank"
    ),
    "build-without-hidden-inputs": RemedyTemplate(
        "make the build independent of the rank, the host, the time, hash(), the order of a set and unseeded generators"
    ),
    "do-not-seed-in-build": RemedyTemplate(
        "remove the seeding from the build: every generator is seeded from seed.model before it"
    ),
    "draw-from-global-generators": RemedyTemplate(
        "draw from the global generators, which are seeded from seed.model before the build"
    ),
    "seed-own-generator": RemedyTemplate(
        "or seed a separate generator from torch's seed", "numpy.random.default_rng(torch.initial_seed())"
    ),
    # Structure and inputs of a step.
    "step-without-hidden-inputs": RemedyTemplate(
        "make the model and the step independent of the rank, the host, the time and unseeded draws"
    ),
    "set-modes-alike": RemedyTemplate(
        "set {what} alike on every replica: call model.train(), model.eval() and requires_grad_() in no condition that "
        "only some replicas meet"
    ),
    "find-write": RemedyTemplate(
        "search for code that writes in place to {names} in some steps only: an initialization, a clamp, a forward "
        "pass in training mode, a hook"
    ),
    "find-forward": RemedyTemplate(
        "search for a forward pass in training mode outside of the step, which moves {names}: run it with model.eval()"
    ),
    "find-skipped-step": RemedyTemplate(
        "search for a path around optimizer.step(): a condition, or an exception that is caught"
    ),
    "find-overwritten-weights": RemedyTemplate(
        "search for code that writes to {some} without the optimizer: through .data, a NumPy array or load_state_dict"
    ),
    "find-attribute": RemedyTemplate("search for code that sets {names} in some steps only"),
    "find-branch": RemedyTemplate(
        "search the forward pass and the loss for a branch that only some steps take: on a counter, the rank, a file "
        "or the time"
    ),
    "keep-counters-in-state": RemedyTemplate(
        "keep what a step depends on in attributes of modules or in buffers, which a replay and a checkpoint restore"
    ),
    "order-parameters-alike": RemedyTemplate(
        "keep parameters in the order of the model, or sort them: a set has another order in each process",
        "sorted(names)",
    ),
    "make-input-equal": RemedyTemplate(
        "find out where {operator}{source} gets its inputs, and make them the same on all replicas, each time"
    ),
    "set-hyperparameters-alike": RemedyTemplate(
        "set the same learning rate, weight decay and other settings on every replica, from the config and not from "
        "the rank, a local metric or the environment"
    ),
    "make-host-value-equal": RemedyTemplate(
        "make the value the same on every replica: it may come from the rank, the environment, the clock, hash() or "
        "the order of a set"
    ),
    "register-kernel-alike": RemedyTemplate(
        "import the same extensions and replace the same functions of torch on every replica, in the same order, or on "
        "none"
    ),
    "write-before-read": RemedyTemplate(
        "fill the memory before it is read: torch.zeros instead of torch.empty, or an initialization of the parameter"
    ),
    # Nondeterministic operators.
    "strict-mode": RemedyTemplate("choose deterministic algorithms", settings=_STRICT),
    "strict-mode-or-named": RemedyTemplate("or the setting named above, if there is one", settings=_STRICT),
    "strict-mode-unless-set": RemedyTemplate(
        "unless it is already set: it excludes one kind of cause", settings=_STRICT
    ),
    "strict-mode-stops": RemedyTemplate("stops the run at this operator, with a traceback", settings=_STRICT),
    "replace-operator": RemedyTemplate(
        "replace the operator with a deterministic one if strict mode raises an error for it"
    ),
    "use-instead": RemedyTemplate("instead of this operator, use {instead}"),
    "cudnn-deterministic": RemedyTemplate(
        "choose cuDNN's deterministic algorithms", settings={"determinism.cudnn_deterministic": True}
    ),
    "cudnn-benchmark": RemedyTemplate(
        "choose cuDNN's algorithms without timing them", settings={"determinism.cudnn_benchmark": False}
    ),
    "cublas-workspace": RemedyTemplate("give cuBLAS a fixed workspace, set before anything uses CUDA"),
    "unset-cublas-workspace": RemedyTemplate(
        "in the environment: dreplica does not overwrite it", "unset CUBLAS_WORKSPACE_CONFIG"
    ),
    "disable-tf32": RemedyTemplate(
        "if the replicas' GPUs are not of the same model", settings={"determinism.tf32": False}
    ),
    "disable-onednn": RemedyTemplate(
        "if the difference remains, suspect the device; if not, oneDNN's kernel",
        settings={"determinism.onednn": False},
    ),
    "one-thread": RemedyTemplate("compute on one thread", settings={"determinism.threads": 1}),
    "report-to-pytorch": RemedyTemplate(
        "run the replica on another device: if the operator is deterministic there, suspect this device; if not, "
        f"report it to {_PYTORCH_ISSUES}"
    ),
    "fallback-random": RemedyTemplate(
        "before the model is compiled: it then draws as an eager one does",
        "torch._inductor.config.fallback_random = True",
    ),
    "use-global-generator": RemedyTemplate(
        "draw from torch's global generator, not from a torch.Generator that the model keeps"
    ),
    "test-other-gpu": RemedyTemplate(
        "suspect the device: run this replica on another one, and check this one's memory",
        "nvidia-smi -q -d ECC,ROW_REMAPPER",
    ),
    "test-other-host": RemedyTemplate(
        "suspect the device: run this replica on another one, and check this one's memory", "sudo memtester 1G 1"
    ),
    "inspect-custom-operator": RemedyTemplate(
        "in its code, look for atomic additions, for memory that is read before it is written, and for data races"
    ),
    "sanitize-custom-operator": RemedyTemplate(
        "then with --tool initcheck", "compute-sanitizer --tool racecheck python train.py"
    ),
    "replace-custom-operator": RemedyTemplate(
        "replace it with PyTorch's own operators, to confirm that {namespace} is the cause"
    ),
    # Faults.
    "excluded-once": RemedyTemplate(
        "excluded: {excluded}. Not excluded: code that ran once and wrote just these bits past PyTorch's operators "
        "(NumPy, a C extension, another process). Look for such code before you suspect the hardware"
    ),
    "excluded-always": RemedyTemplate(
        "excluded: {excluded}. Not excluded: code that writes past PyTorch's operators (NumPy, a C extension), and "
        "libraries or firmware that differ in the same version. Look for these before you suspect the hardware"
    ),
    "look-for-code-once": RemedyTemplate(
        "look for code that ran once on that replica: a callback, monitoring, the first call of something, another "
        "thread. If there is none, suspect the hardware"
    ),
    "rerun-from-agreement": RemedyTemplate(
        "run again from the last agreed state: results after the fault cannot be trusted"
    ),
    "watch-hardware": RemedyTemplate(
        "watch that replica's host and GPU: if either is named again, take it out of service"
    ),
    "retire-hardware": RemedyTemplate("take that replica's host or GPU out of service"),
    "rerun-alone": RemedyTemplate(
        "with the same arguments, on that host alone: it may even disagree with itself", "dreplica train --replicas 2"
    ),
    "check-host-memory": RemedyTemplate(
        "shows that host's corrected and uncorrected memory errors; dmesg shows machine checks", "edac-util -v"
    ),
    "check-gpu-memory": RemedyTemplate("shows that GPU's memory errors", "nvidia-smi -q -d ECC,ROW_REMAPPER"),
    "check-this-gpu-memory": RemedyTemplate("on host {host}", "nvidia-smi -q -i {card} -d ECC,ROW_REMAPPER"),
    "test-host-memory": RemedyTemplate("tests that host's memory", "sudo memtester 4G 3"),
    "read-log-of-lost": RemedyTemplate(
        "read that replica's log above, and its host's (dmesg shows a process that was killed for lack of memory)"
    ),
    "fix-exception": RemedyTemplate(
        "fix this error of replica {replica}, whose traceback is in the log above: {error}"
    ),
    "resume": RemedyTemplate("run the same command again{where}: it resumes from the checkpoint of step {step}"),
    "resume-with-auto": RemedyTemplate(
        "run the command again{where} with --run.resume auto: it resumes from the checkpoint of step {step}"
    ),
    "start-over": RemedyTemplate("run the same command again{where}: it starts over, since it has no checkpoint"),
    # Unexplained.
    "diagnose-step": RemedyTemplate(
        "replays the step on all replicas and names the operator at which they diverge",
        "dreplica.diagnose(train_step, batch, model, optimizer, found=divergence.verdict)",
    ),
    "keep-state": RemedyTemplate(
        "at the start of each step, and pass agreement=agreement to dreplica.diagnose: it then replays the step from "
        "the state that it had",
        "agreement.keep_state()",
    ),
    "compare-every-step": RemedyTemplate(
        "so that the step can be replayed from a recent snapshot",
        settings={"agreement.every": 1, "agreement.snapshot_every": 10},
    ),
}
"""Code to templates."""
