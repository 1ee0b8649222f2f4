"""What a job or a body does once, and the process that all of them are forked from has done for them."""

import torch

from dreplica.report.html.render import template

torch.compiler.list_backends()  # imports them
template()
