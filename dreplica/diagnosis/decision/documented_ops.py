"""Operators that PyTorch documents as nondeterministic, and some that it does not document and that may vary.

Sources: the documentation of `torch.use_deterministic_algorithms` (2.11 to 2.15; where releases differ, the entry says
so), PyTorch's notes on reproducibility (https://docs.pytorch.org/docs/stable/notes/randomness.html), the warnings in
the documentation of `torch.nn.LSTM`, `torch.kthvalue`, `index_reduce_` and scaled dot product attention, and NVIDIA's
on cuBLAS (https://docs.nvidia.com/cuda/cublas/#results-reproducibility). The documentation names Python functions; the
tables here name the operators that those dispatch to, as a trace names them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Governs = Literal["switches", "switches-if-strict", "raises", "switches-or-raises", "cudnn", "cublas", "bmm", "rnn"]
"""The setting that makes an operator deterministic.

- `switches`: the modes strict and warn choose another algorithm.
- `switches-if-strict`: only the mode strict chooses another algorithm.
- `raises`: no setting does, and the mode strict raises an error.
- `switches-or-raises`: one of these, depending on the release or on the arguments.
- `cudnn`: the flags `cudnn_deterministic` and `cudnn_benchmark`.
- `cublas`: the cuBLAS workspace.
- `bmm`: the cuBLAS workspace for dense matrices, the mode for sparse ones.
- `rnn`: the cuBLAS workspace, with the values that the documentation of cuDNN's recurrent layers names.
"""

_ATOMICS = "adds with atomics, in the order in which its threads arrive"
_LAST_WRITER = "leaves it to chance which of several writes to one place is the last"


@dataclass(frozen=True)
class Documented:
    """The documentation of one nondeterministic operator."""

    governs: Governs
    why: str
    """A predicate that describes the nondeterministic behavior, such as "adds with atomics"."""
    devices: tuple[str, ...] = ("cuda",)
    instead: str = ""
    """A replacement for an operator that no setting makes deterministic."""


def _table() -> dict[str, Documented]:
    entries: dict[str, Documented] = {}

    def add(names: str, documented: Documented) -> None:
        entries.update({f"aten.{name}": documented for name in names.split()})

    def raises(names: str, instead: str, why: str = _ATOMICS, devices: tuple[str, ...] = ("cuda",)) -> None:
        add(names, Documented("raises", why, devices, instead))

    both = ("cuda", "cpu")
    add(
        "index_add index_add_ scatter_add scatter_add_ embedding_dense_backward",
        Documented("switches", _ATOMICS),
    )
    add(
        "replication_pad1d_backward replication_pad2d_backward replication_pad3d_backward",
        Documented("switches", _ATOMICS),
    )
    add("cumsum cumsum_", Documented("switches", "adds up partial sums that depend on how its blocks are scheduled"))
    add("scatter.src scatter_.src", Documented("switches", _LAST_WRITER))
    add("index_copy index_copy_", Documented("switches", _LAST_WRITER, both))
    why = f"{_LAST_WRITER}, and on the CPU, where it accumulates, {_ATOMICS}"
    add("index_put index_put_ _index_put_impl_ _unsafe_index_put", Documented("switches", why, both))
    why = f"{_ATOMICS} (strict mode makes the reductions sum and mean deterministic and raises on others)"
    add("scatter_reduce scatter_reduce_", Documented("switches-or-raises", why))
    pool3d = f"{_ATOMICS} (older releases raise in strict mode, newer ones choose another algorithm)"
    add("max_pool3d_with_indices_backward", Documented("switches-or-raises", pool3d))
    interpolate = f"{_ATOMICS} (F.interpolate avoids it in strict and warn mode, for bicubic in newer releases only)"
    add(
        "upsample_bilinear2d_backward upsample_trilinear3d_backward upsample_bicubic2d_backward",
        Documented("switches-or-raises", interpolate, instead="F.interpolate with mode='nearest'"),
    )

    raises(
        "upsample_linear1d_backward",
        "F.interpolate(x[:, :, None], (1, size), mode='bilinear')[:, :, 0], in strict mode",
    )
    raises("_upsample_bilinear2d_aa_backward _upsample_bicubic2d_aa_backward", "F.interpolate without antialias=True")
    raises("avg_pool3d_backward", "a convolution with equal, fixed weights")
    raises("_adaptive_avg_pool2d_backward _adaptive_avg_pool3d_backward", "x.mean((-2, -1)) for one output, or AvgPool")
    raises("adaptive_max_pool2d_backward adaptive_max_pool3d_backward", "x.amax((-2, -1)) for one output, or MaxPool2d")
    raises("fractional_max_pool2d_backward fractional_max_pool3d_backward", "MaxPool2d")
    raises("max_unpool2d max_unpool3d", "F.interpolate with mode='nearest'", _LAST_WRITER, both)
    raises("reflection_pad1d_backward reflection_pad2d_backward reflection_pad3d_backward", "padding_mode='replicate'")
    raises("nll_loss2d_forward nll_loss2d_backward", "the loss over logits reshaped from (N, C, H, W) to (N*H*W, C)")
    raises("_ctc_loss_backward", "F.ctc_loss on the CPU")
    raises(
        "_embedding_bag_backward _embedding_bag_dense_backward", "mode='sum' or mode='mean' (only 'max' is at fault)"
    )
    why = f"{_LAST_WRITER}, or where it accumulates {_ATOMICS} (which strict mode prevents on the CPU only)"
    add("put put_", Documented("switches-or-raises", why, both, "index_put_"))
    raises("histc", "torch.histc on the CPU, or on integers")
    raises("bincount", "torch.bincount without weights, or on the CPU")
    why = "may return the index of any of several equal elements (the value alone is deterministic)"
    raises("median.dim nanmedian.dim", "torch.sort, and the middle element", why)
    kth = f"{why} (older releases raise in strict mode)"
    add("kthvalue", Documented("switches-or-raises", kth, instead="torch.sort, and the k-th element"))
    raises("index_reduce index_reduce_", "scatter_reduce with sum or mean, in strict mode")
    raises("grid_sampler_2d_backward grid_sampler_3d_backward", "F.grid_sample on the CPU")

    attention = "splits the sum over keys between blocks, which add with atomics"
    add(
        "_scaled_dot_product_flash_attention_backward _flash_attention_backward "
        "_scaled_dot_product_efficient_attention_backward _efficient_attention_backward "
        "_scaled_dot_product_cudnn_attention_backward",
        Documented("switches-if-strict", attention),
    )
    add(
        "convolution convolution_backward cudnn_convolution cudnn_convolution_transpose _convolution",
        Documented("cudnn", "is given to whichever of cuDNN's algorithms is chosen, not all of them deterministic"),
    )
    why = "lets cuBLAS choose its algorithm by the workspace at hand, which several streams may share"
    products = "mm addmm addmm_ _addmm_activation _scaled_mm baddbmm baddbmm_ addbmm mv addmv addmv_ dot"
    add(products, Documented("cublas", why))
    add("bmm", Documented("bmm", f"{why}, and for a sparse matrix {_ATOMICS}"))
    why = "runs in cuDNN's recurrent layers, not deterministic in some versions of cuDNN and CUDA"
    add("_cudnn_rnn _cudnn_rnn_backward", Documented("rnn", why))
    return entries


DOCUMENTED: Mapping[str, Documented] = _table()
"""Operator (`aten.index_add_`, or with its overload if only that one) to what is documented of it."""

UNVERIFIED: Mapping[str, Documented] = {
    **dict.fromkeys(
        ("aten.scatter.reduce", "aten.scatter_.reduce", "aten.scatter.value_reduce", "aten.scatter_.value_reduce"),
        Documented("raises", f"probably {_ATOMICS}", instead="scatter_add_ or index_add_, in strict mode"),
    ),
    "aten._sparse_addmm": Documented(
        "raises",
        "is given to cuSPARSE, not all of whose algorithms for matrices in the COO layout are deterministic",
        instead="dense matrices, or the CSR layout",
    ),
    **dict.fromkeys(
        ("aten.cumprod", "aten.cumprod_", "aten.logcumsumexp"),
        Documented(
            "raises",
            "may combine partial results that depend on how its blocks are scheduled, as cumsum does",
            instead="the same on the CPU",
        ),
    ),
    "aten.col2im": Documented("raises", "adds overlapping blocks, in an order that is not documented"),
}
"""Operators that PyTorch does not document and that may vary on CUDA, to what is assumed of them.

No setting is known to make them deterministic. (`histc` is documented, and in the other table.)
"""
