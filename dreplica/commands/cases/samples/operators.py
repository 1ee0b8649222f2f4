"""An operator that is nondeterministic on a CPU, as atomic additions are on a GPU."""

import threading
import time

import torch
from torch import Tensor

_NUM_THREADS = 8


@torch.library.custom_op("cases::racy_sum", mutates_args=())
def racy_sum(images: Tensor) -> Tensor:
    """Sum images over height and width, in a varying order.

    Each thread adds its share of the positions into one buffer. Float addition is not associative, so the result
    depends on the order of arrival and differs in its last bits from one call to the next.

    Args:
        images: float32, shape (N, C, H, W).

    Returns:
        The sums, shape (N, C).
    """
    positions = images.detach().flatten(2).unbind(2)
    total = images.new_zeros(images.shape[:2])
    start, turn = threading.Barrier(_NUM_THREADS), threading.Lock()

    def add_share(number: int) -> None:
        start.wait()
        for position in positions[number::_NUM_THREADS]:
            time.sleep(0)  # gives the others a chance to overtake; a share this small would be added in one go
            with turn:  # only the order is left to chance, no addition is lost
                total.add_(position)

    threads = [threading.Thread(target=add_share, args=(number,)) for number in range(_NUM_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return total


@racy_sum.register_fake
def _(images: Tensor) -> Tensor:
    return images.new_empty(images.shape[:2])


def _keep_shape(ctx: object, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.shape = inputs[0].shape  # type: ignore[attr-defined]


def _spread(ctx: object, gradient: Tensor) -> Tensor:
    return gradient[:, :, None, None].expand(ctx.shape)  # type: ignore[attr-defined]


racy_sum.register_autograd(_spread, setup_context=_keep_shape)
