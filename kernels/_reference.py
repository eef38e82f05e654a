"""Row gather and row scatter-add for the references: each is the other's gradient, to any order.

torch's own index_select and embedding have a CPU backward that repeats bit for bit, but visits one row at a time
through the general machinery: rows here are 1 to 8 numbers, and adding a column at a time is several times quicker.
Both add in the order of the index, so the result does not depend on the number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, table: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = table.shape[0]
        return table.index_select(0, index)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (index,) = ctx.saved_tensors
        return scatter_rows(grad, index, ctx.rows), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, index: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(index)
        if values.dim() == 1:
            return values.new_zeros(rows).index_add_(0, index, values)
        out = values.new_empty(values.shape[1], rows)
        for column, value in zip(out, values.unbind(1), strict=True):
            column.zero_().index_add_(0, index, value)
        return out.t().contiguous()

    @staticmethod
    def backward(ctx, grad: Tensor):
        (index,) = ctx.saved_tensors
        return gather_rows(grad, index), None, None


def gather_rows(table: Tensor, index: Tensor) -> Tensor:
    """table [rows] or [rows, C], index [n] -> [n] or [n, C]: out[i] = table[index[i]]."""
    return _Gather.apply(table, index)


def scatter_rows(values: Tensor, index: Tensor, rows: int) -> Tensor:
    """values [n] or [n, C], index [n] -> [rows] or [rows, C]: out[r] = sum of values[i] with index[i] = r, in order of
    i.
    """
    return _Scatter.apply(values, index, rows)


def pad_rows(value: Tensor, rows: int) -> Tensor:
    """value [n, ...] -> [rows, ...], zeros below."""
    missing = rows - value.shape[0]
    return value if missing == 0 else torch.cat([value, value.new_zeros(missing, *value.shape[1:])])


def live_rows(rows: int, count: Tensor | None) -> int:
    """How many leading rows of a buffer hold samples. Asks the device: right for a reference, not for a kernel."""
    return rows if count is None else max(0, min(int(count), rows))
