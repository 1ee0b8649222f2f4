"""Remedies for a custom training loop: settings of the trainer become calls of torch."""

from collections.abc import Sequence

from dreplica.agreement.verdict.remedy import Remedy

_FLAGS = {
    "mode": "torch.use_deterministic_algorithms(True)",
    "threads": "torch.set_num_threads({})",
    "cudnn_deterministic": "torch.backends.cudnn.deterministic = True",
    "cudnn_benchmark": "torch.backends.cudnn.benchmark = False",
    "tf32": "torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False",
    "cublas_workspace_config": 'os.environ["CUBLAS_WORKSPACE_CONFIG"] = "{}"',
}
"""Settings of the trainer, in the section `determinism`, to the code that a custom loop runs instead."""
_TRAINER_ONLY = {"rerun-alone"}
"""Remedies that only the trainer has."""


def as_code(remedies: Sequence[Remedy]) -> list[Remedy]:
    """Convert remedies for the trainer to remedies for a custom loop: settings become calls of torch."""
    converted: dict[str, Remedy] = {}
    for remedy in remedies:
        if remedy.settings:
            for key, value in remedy.settings.items():
                section, _, name = key.partition(".")
                if section == "determinism" and name in _FLAGS:
                    command = _FLAGS[name].format(value)
                    converted.setdefault(command, Remedy(remedy.code, remedy.text, command, remedy.data))
        elif remedy.code not in _TRAINER_ONLY:
            converted.setdefault(str(remedy), remedy)
    return list(converted.values())
