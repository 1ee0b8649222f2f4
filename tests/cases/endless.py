"""A worker that never ends of itself."""

import time

print("waiting for ever", flush=True)
time.sleep(600)
