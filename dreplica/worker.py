"""One worker: what torchrun starts, once per replica."""

import os
import sys

from torch.distributed.elastic.multiprocessing.errors import record


@record
def main() -> None:
    """Runs one replica with this process's command line and exits with its exit code."""
    from dreplica.config import format_help
    from dreplica.run import run_worker

    argv = sys.argv[1:]
    if "--help" in argv or "-h" in argv:
        if os.environ.get("RANK", "0") == "0":
            print(format_help("train.py"))
        return
    sys.exit(int(run_worker(argv)))


if __name__ == "__main__":
    main()
