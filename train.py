"""torchrun's entry: `torchrun --standalone --nproc_per_node=2 train.py [--config FILE] [--section.key VALUE ...]`."""

from dreplica.worker import main

if __name__ == "__main__":
    main()
