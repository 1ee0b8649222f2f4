"""Start a worker process of this command: `python -m dreplica.commands.flags`.

Importing this module must stay fast: signals are handled only once `run_process` runs.
"""

import sys

from dreplica.errors import ExitCode
from dreplica.run.process import run_process


def main() -> ExitCode:
    """Run one worker of `dreplica flags`."""
    from dreplica.commands.flags.trial import work

    return work(sys.argv[1:])


if __name__ == "__main__":
    run_process(main)
