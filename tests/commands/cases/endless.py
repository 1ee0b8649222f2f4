"""A worker that never ends of itself; it prints its process id."""

import os
import time

print(f"process {os.getpid()} waits for ever", flush=True)
time.sleep(600)
