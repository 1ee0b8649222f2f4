# Image with dreplica installed, for launch/jobset.yaml or any other run in a container. Build it in this folder:
#   docker build -t registry.example.com/dreplica:latest .
#
# torch comes from PyPI. It runs on the CPU, and on NVIDIA GPUs where the host has the driver and the container toolkit.
FROM python:3.11-slim

# Triton compiles the kernel that takes fingerprints on a GPU at its first use, for which it needs a C compiler.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# Runs write to ./runs unless --run.root is given.
RUN useradd --create-home --uid 1000 dreplica \
    && install --directory --owner=dreplica --group=dreplica /opt/dreplica
WORKDIR /opt/dreplica
COPY --chown=dreplica:dreplica . .
RUN pip install --no-cache-dir .

# By number, so that Kubernetes can verify runAsNonRoot.
USER 1000:1000
CMD ["dreplica", "--help"]
