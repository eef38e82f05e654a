"""Helpers of the references: gather and scatter-add of rows, transposition, and buffers that are only partly in use.

Gather and scatter-add are each other's gradient, and so are the two transpositions, to any order. torch's index_select
and embedding have deterministic CPU backwards too, but visit one row at a time; rows here are 1 to 8 numbers, and one
column at a time is several times quicker. Sums run in the order of the index, so they do not depend on the number of
threads.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _to_columns(rows: Tensor) -> Tensor:
    # A column at a time: several times quicker on a CPU than the strided copy of the transpose.
    return torch.stack(rows.unbind(1)) if rows.shape[1] else rows.new_empty(0, rows.shape[0])


def _to_rows(columns: Tensor) -> Tensor:
    out = columns.new_empty(columns.shape[1], columns.shape[0])
    for column, source in zip(out.unbind(1), columns, strict=True):
        column.copy_(source)
    return out


class _Columns(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        return _to_columns(rows)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _Rows.apply(grad)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, columns: Tensor) -> Tensor:
        return _to_rows(columns)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _Columns.apply(grad)


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
            return values.new_zeros(rows).scatter_add_(0, index, values)
        out = values.new_empty(values.shape[1], rows)
        for column, value in zip(out, values.unbind(1), strict=True):
            column.zero_().scatter_add_(0, index, value)
        return _to_rows(out)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (index,) = ctx.saved_tensors
        return gather_rows(grad, index), None, None


def to_columns(rows: Tensor) -> Tensor:
    """rows [n, C] -> [C, n], contiguous."""
    return _Columns.apply(rows)


def gather_rows(table: Tensor, index: Tensor) -> Tensor:
    """table [rows] or [rows, C], index [n] -> [n] or [n, C]: out[i] = table[index[i]]."""
    return _Gather.apply(table, index)


def scatter_rows(values: Tensor, index: Tensor, rows: int) -> Tensor:
    """values [n] or [n, C], index [n] -> [rows] or [rows, C]: out[r] = sum of the values[i] with index[i] = r."""
    return _Scatter.apply(values, index, rows)


def pad_rows(value: Tensor, rows: int) -> Tensor:
    """value [n, ...] -> [rows, ...], filled up with zeros."""
    padding = rows - value.shape[0]
    return value if padding == 0 else torch.cat([value, value.new_zeros(padding, *value.shape[1:])])


def live_rows(rows: int, count: Tensor | None) -> int:
    """Number of leading rows that hold samples. It synchronises with the device, so only references call it."""
    return rows if count is None else max(0, min(int(count), rows))
