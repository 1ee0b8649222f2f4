"""Measure the cost of fingerprints on a GPU: `python -m tests.benchmarks.device_fingerprint`.

Measures with the device's clock the bytes per second that one launch reads, compared with those that a device-to-device
copy moves (read plus written), and the time for the whole state of a ResNet-18 with SGD momentum. Also measures the
memory used and, with the host's clock, the time that the checks of a step take on the host. Exits with 1 if a limit is
missed, with 2 without a CUDA device.
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
import torchvision
from torch import Tensor

from dreplica.agreement.agreement import Agreement
from dreplica.state.fingerprint.gpu import DeviceHash, computes_as_defined

SHARE_OF_COPY = 0.6
RESNET_MICROSECONDS = 150.0
MEMORY_MB = 16.0
REPEATS = 30


def main() -> int:
    """Print the figures and the limits."""
    if not torch.cuda.is_available():
        print("error: no CUDA device: nothing to measure. On a machine with one, run this again.", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(device)
    print(f"{properties.name}, compute capability {properties.major}.{properties.minor}, torch {torch.__version__}")
    if not computes_as_defined(device):
        print("error: the kernel does not compute what the NumPy reference defines", file=sys.stderr)
        return 1
    kept = [_of_mixed_tensors(device), _of_resnet(device)]
    return 0 if all(kept) else 1


def _of_mixed_tensors(device: torch.device) -> bool:
    """Return 1 GB of tensors of several dtypes, sizes and alignments, contiguous and strided."""
    sizes = [2**28, 2**28, 2**27, 2**26, *[2**22] * 60, *[2**14] * 400]
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.int8)
    plain = [_noise(size, dtypes[number % 4], device) for number, size in enumerate(sizes)]
    plain += _noise(300 * 2000, torch.float32, device).split(75)  # biases in one flat buffer
    num_bytes = sum(tensor.nbytes for tensor in plain)
    copied = _bytes_copied_per_second(num_bytes, device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    read = _rate(device, plain)
    memory = (torch.cuda.max_memory_allocated() - before) / 1e6
    print(f"{num_bytes / 1e9:.2f} GB in {len(plain)} tensors")
    print(f"  device-to-device copy {copied / 1e9:8.1f} GB/s read plus written")
    limit = f"at least {SHARE_OF_COPY:.0%} of it"
    ok = _limit("fingerprint", read / 1e9, "GB/s", read >= SHARE_OF_COPY * copied, limit)
    ok &= _limit("memory used by it", memory, "MB", memory < MEMORY_MB, f"under {MEMORY_MB:g}")
    del plain
    for name, tensor in (
        ("channels_last float32", _noise(2**28, torch.float32, device).view(256, 1024, 16, 16).permute(0, 3, 1, 2)),
        ("channels_last bfloat16", _noise(2**28, torch.bfloat16, device).view(512, 1024, 16, 16).permute(0, 3, 1, 2)),
        ("transposed float32", _noise(2**28, torch.float32, device).view(8192, 8192).t()),
        ("beginning at an odd address", _noise(2**28, torch.int8, device)[1:]),
    ):
        print(f"  {name:28} {_rate(device, [tensor]) / 1e9:8.1f} GB/s (no limit)")
    return ok


def _bytes_copied_per_second(num_bytes: int, device: torch.device) -> float:
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / _seconds(lambda: target.copy_(source))


def _of_resnet(device: torch.device) -> bool:
    ok = True
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = torchvision.models.resnet18().to(device, memory_format=memory_format)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        inputs = torch.randn(8, 3, 224, 224, device=device).contiguous(memory_format=memory_format)
        loss = model(inputs).sum()
        loss.backward()
        optimizer.step()
        momentum = [state["momentum_buffer"] for state in optimizer.state.values()]
        tensors = [*model.parameters(), *model.buffers(), *momentum]
        seconds = _seconds(_hashing(device, tensors))
        print(f"ResNet-18, {memory_format}, {len(tensors)} tensors, {sum(t.nbytes for t in tensors) / 1e6:.0f} MB")
        microseconds = 1e6 * seconds
        kept = microseconds < RESNET_MICROSECONDS
        ok &= _limit("weights, buffers, momentum", microseconds, "us", kept, f"under {RESNET_MICROSECONDS:g}")
        agreement = Agreement(model, optimizer, lag=1)
        host = _host_seconds(
            lambda agreement=agreement, inputs=inputs, loss=loss: agreement.step(batch=inputs, loss=loss)
        )
        print(f"  host, a step of checking it all, gradients and batch included {1e6 * host:8.0f} us (no limit)")
    return ok


def _noise(num_bytes: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    whole = num_bytes // 8 * 8
    return torch.randint(0, 256, (whole,), dtype=torch.uint8, device=device).view(dtype)


def _rate(device: torch.device, tensors: Sequence[Tensor]) -> float:
    return sum(tensor.nbytes for tensor in tensors) / _seconds(_hashing(device, tensors))


def _hashing(device: torch.device, tensors: Sequence[Tensor]) -> Callable[[], object]:
    hashing = DeviceHash(device)
    named = [(str(number), tensor) for number, tensor in enumerate(tensors)]
    return lambda: hashing.start(named)


def _seconds(action: Callable[[], object]) -> float:
    """Return the median by the device's clock, with the device kept busy first to hide the host's time."""
    for _ in range(3):
        action()
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(20_000_000)
        start.record()
        action()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def _host_seconds(action: Callable[[], object]) -> float:
    """Return the median time on the host, with an otherwise idle device."""
    times = []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        action()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def _limit(what: str, value: float, unit: str, kept: bool, limit: str) -> bool:
    print(f"  {what:28} {value:8.1f} {unit} (limit: {limit}) {'ok' if kept else 'MISSED'}")
    return kept


if __name__ == "__main__":
    sys.exit(main())
