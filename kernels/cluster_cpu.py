"""Clusters of tokens on the CPU, by the C++ of `csrc/`, where it was built: k-means, means, and what those miss.

Shapes: B batch, T tokens, L queries, H heads, D of a head, N clusters, R query clusters, C key blocks, G = B · H. fp32.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from longvid.kernels.arguments import BlocksArgument, TensorArgument, as_int32, dense_heads, stride, threads
from longvid.kernels.dense import Partial
from longvid.kernels.layout import BlockLayout, Blocks
from longvid.kernels.native import Isa, isa_index, library


class _Kmeans(ctypes.Structure):
    _fields_ = [
        ("x", TensorArgument),
        *((name, ctypes.c_void_p) for name in ("centroids", "labels")),
        *((name, ctypes.c_int32) for name in ("batch", "heads", "tokens", "clusters", "dim", "iterations")),
        *((name, ctypes.c_int32) for name in ("threads", "isa")),
    ]


class _Sort(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("labels", "offsets", "order")),
        *((name, ctypes.c_int32) for name in ("groups", "tokens", "clusters", "threads")),
    ]


class _Means(ctypes.Structure):
    _fields_ = [
        ("x", TensorArgument),
        ("blocks", BlocksArgument),
        ("means", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("batch", "heads", "dim", "threads", "isa")),
    ]


class _Errors(ctypes.Structure):
    _fields_ = [
        *((name, TensorArgument) for name in ("k", "v")),
        *((name, ctypes.c_void_p) for name in ("offsets", "order", "queries", "k_mean", "v_mean", "sums")),
        *((name, ctypes.c_int32) for name in ("batch", "heads", "tokens", "clusters", "rows", "dim")),
        *((name, ctypes.c_int32) for name in ("sample_every", "threads", "isa")),
        ("limit", ctypes.c_float),
    ]


class _Skipped(ctypes.Structure):
    _fields_ = [
        *((name, TensorArgument) for name in ("q", "out", "lse")),
        *((name, ctypes.c_void_p) for name in ("k_mean", "v_mean")),
        *((name, BlocksArgument) for name in ("q_blocks", "k_blocks")),
        *((name, ctypes.c_void_p) for name in ("row_ptr", "col", "group")),
        *((name, ctypes.c_int64) for name in ("group_batch", "num_col")),
        *((name, ctypes.c_int32) for name in ("num_groups", "batch", "heads", "dim", "threads", "isa")),
        ("scale", ctypes.c_float),
    ]


def kmeans(x_BTHD: Tensor, centroids_BHND: Tensor, iterations: int, isa: Isa | None = None) -> tuple[Tensor, Tensor]:
    """See `permute.kmeans`. `isa`: a variant that this processor has; None: the fastest."""
    x, centroids = dense_heads(x_BTHD), centroids_BHND.to(torch.float32, copy=True).contiguous()
    batch, num_tokens, num_heads, dim = x.shape
    labels = torch.empty(batch, num_heads, num_tokens, dtype=torch.int64)
    args = _Kmeans(
        TensorArgument.of(x),
        *(y.data_ptr() for y in (centroids, labels)),
        batch=batch,
        heads=num_heads,
        tokens=num_tokens,
        clusters=centroids.shape[2],
        dim=dim,
        iterations=iterations,
        threads=threads(),
        isa=isa_index(isa),
    )
    _check(library().longvid_kmeans(ctypes.byref(args)))
    return labels, centroids


def blocks_of(labels_GT: Tensor, num_clusters: int) -> Blocks:
    """See `permute.cluster_blocks`."""
    labels = labels_GT.contiguous()
    groups, num_tokens = labels.shape
    offsets = torch.empty(groups, num_clusters + 1, dtype=torch.int32)
    order = torch.empty(groups, num_tokens, dtype=torch.int32)
    pointers = (x.data_ptr() for x in (labels, offsets, order))
    args = _Sort(*pointers, groups=groups, tokens=num_tokens, clusters=num_clusters, threads=threads())
    _check(library().longvid_sort(ctypes.byref(args)))
    return Blocks(offsets, order)


def block_means(x_BTHD: Tensor, blocks: Blocks, isa: Isa | None = None) -> Tensor:
    """The mean of each block's tokens, [B, H, N, D]; 0 where a block is empty. Blocks of all heads, or of each."""
    x, blocks = dense_heads(x_BTHD), as_int32(blocks)
    batch, num_tokens, num_heads, dim = x.shape
    means = torch.empty(batch, num_heads, blocks.num_blocks, dim)
    args = _Means(
        TensorArgument.of(x),
        BlocksArgument.of(blocks, num_tokens),
        means.data_ptr(),
        batch=batch,
        heads=num_heads,
        dim=dim,
        threads=threads(),
        isa=isa_index(isa),
    )
    _check(library().longvid_block_means(ctypes.byref(args)))
    return means


def errors(
    k_BTHD: Tensor,
    v_BTHD: Tensor,
    blocks: Blocks,
    means: tuple[Tensor, Tensor],
    queries_BHRD: Tensor,
    *,
    limit: float,
    sample_every: int = 1,
    isa: Isa | None = None,
) -> Tensor:
    """What the error of means is made of (SVG-EAR), [B, H, N, R]. `means` of keys and values are [B, H, N, D].

    For each block j and query c the sum over its tokens of e^d (e^d |v|² - 2 v · v̄_j), with
    d = min(c · (k - k̄_j), limit). Of every block the first token and each `sample_every`-th after it stand for all of
    them. Every head has its own blocks.
    """
    k, v, blocks = dense_heads(k_BTHD), dense_heads(v_BTHD), as_int32(blocks)
    k_mean, v_mean, queries = (x.float().contiguous() for x in (*means, queries_BHRD))
    assert blocks.order is not None
    batch, num_tokens, num_heads, dim = k.shape
    sums = torch.empty(batch, num_heads, blocks.num_blocks, queries.shape[2])
    args = _Errors(
        *(TensorArgument.of(x) for x in (k, v)),
        *(x.data_ptr() for x in (blocks.offsets, blocks.order, queries, k_mean, v_mean, sums)),
        batch=batch,
        heads=num_heads,
        tokens=num_tokens,
        clusters=blocks.num_blocks,
        rows=queries.shape[2],
        dim=dim,
        sample_every=sample_every,
        threads=threads(),
        isa=isa_index(isa),
        limit=limit,
    )
    _check(library().longvid_errors(ctypes.byref(args)))
    return sums


def attend_skipped(
    q_BLHD: Tensor,
    k_mean_BHCD: Tensor,
    v_mean_BHCD: Tensor,
    partial: Partial,
    layout: BlockLayout,
    scale: float,
    isa: Isa | None = None,
) -> Tensor:
    """`partial` merged with attention to the means of the key blocks that each query's row skips: fp32 [B, L, H, D].

    In place, where the output of `partial` is fp32. With `amx` products are of 16 bits. See `sparsity.skipped`. Raises
    ValueError where the layout's indices point outside of what they index.
    """
    q, out, lse = dense_heads(q_BLHD), dense_heads(partial[0]), partial[1].float()
    means = [x.float().contiguous() for x in (k_mean_BHCD, v_mean_BHCD)]
    batch, num_queries, num_heads, dim = q.shape
    q_blocks, k_blocks = as_int32(layout.q), as_int32(layout.k)
    row_ptr, col, group = (x.int().contiguous() for x in (layout.row_ptr, layout.col, layout.group))
    args = _Skipped(
        *(TensorArgument.of(x) for x in (q, out, lse)),
        *(x.data_ptr() for x in means),
        q_blocks=BlocksArgument.of(q_blocks, num_queries),
        k_blocks=BlocksArgument.of(k_blocks, int(k_blocks.offsets[0, -1])),
        row_ptr=row_ptr.data_ptr(),
        col=col.data_ptr(),
        group=group.data_ptr(),
        group_batch=stride(group, 0),
        num_col=len(col),
        num_groups=layout.num_groups,
        batch=batch,
        heads=num_heads,
        dim=dim,
        threads=threads(),
        isa=isa_index(isa),
        scale=scale,
    )
    _check(library().longvid_attend_skipped(ctypes.byref(args)))
    return out


def _check(status: int) -> None:
    """Raise what a status of the C++ says."""
    if status == 3:
        raise MemoryError("no memory for the packed means of clusters")
    assert status != 1, "the instruction set did not pass the checks"
    if status:
        raise ValueError("labels, offsets, orders, columns or groups point outside of what they index")
