"""Fingerprints: 128-bit digests of tensors on the CPU and on CUDA devices."""
