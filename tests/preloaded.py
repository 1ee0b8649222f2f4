"""What a job does once, and the process that all jobs under test are forked from has done for them."""

from dreplica.report.html import template

template()
