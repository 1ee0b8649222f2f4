"""One-time work of test processes, done once in the process that they are forked from."""

import torch

from dreplica.report.html.render import template

torch.compiler.list_backends()  # imports the backends
template()
