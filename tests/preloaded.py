"""What a job does once, and the process that all jobs under test are forked from has done for them."""

import torch._inductor.compile_fx  # compiling, with whatever backend, imports a second's worth of modules

from dreplica.report.html import template

torch.compiler.list_backends()
template()
