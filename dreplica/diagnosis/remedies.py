"""Remedies as lines of Python, for a loop that is not the trainer's and has no command line to paste them to."""

import re
from collections.abc import Sequence

_FLAGS = {
    "mode": "torch.use_deterministic_algorithms(True)",
    "threads": "torch.set_num_threads({})",
    "cudnn_deterministic": "torch.backends.cudnn.deterministic = True",
    "cudnn_benchmark": "torch.backends.cudnn.benchmark = False",
    "tf32": "torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False",
    "cublas_workspace_config": 'os.environ["CUBLAS_WORKSPACE_CONFIG"] = "{}"  # before anything uses CUDA',
}
_FLAG = re.compile(r"--determinism\.(\w+) (\S+)")


def as_code(remedy: Sequence[str]) -> list[str]:
    """The lines of a verdict's remedy, the trainer's flags as calls of torch's; without those for the trainer alone."""
    lines = []
    for line in remedy:
        if line.startswith("--"):
            calls = [_FLAGS[name].format(value) for name, value in _FLAG.findall(line) if name in _FLAGS]
            remark = line.partition("  #")[2]
            lines += [f"{call}  #{remark}" if remark and "  #" not in call else call for call in calls]
        elif not line.startswith("dreplica "):
            lines.append(line)
    return list(dict.fromkeys(lines))
