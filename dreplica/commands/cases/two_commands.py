"""A worker that is started with another command on one node, as happens when a job script is edited on one of them.

Under one torchrun all workers have one command line, so this puts the other one in place: replica 1 gets
`--train.epochs=2` where the others do not.
"""

import sys
from typing import NoReturn

from dreplica.distributed.process_group import env_rank
from dreplica.worker import main as work


def main() -> NoReturn:
    """Run one replica with its own command line."""
    if env_rank() == 1:
        sys.argv.append("--train.epochs=2")
    work()


if __name__ == "__main__":
    main()
