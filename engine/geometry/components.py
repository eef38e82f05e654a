"""Connected components, and the size from which a part counts as one of the object."""

from collections.abc import Iterable

import torch
from torch import Tensor

MIN_PART_SIZE = 0.02  # of the size of the largest part; smaller ones are floaters


def connected_components(count: int, batches: Iterable[Tensor]) -> Tensor:
    """The component of each of `count` nodes [count], named by its lowest node.

    The nodes of each of the pairs [2, P] in `batches` are connected. Each round renames the names of a pair's ends to
    the lower one and follows names to their end, so that the number of rounds grows with the logarithm of the longest
    path in a batch.
    """
    label: Tensor | None = None
    for pairs in batches:
        if label is None:
            label = torch.arange(count, device=pairs.device)
        while (pairs := pairs[:, label[pairs[0]] != label[pairs[1]]]).shape[1]:
            names = label[pairs]
            for name in names:
                label.scatter_reduce_(0, name, names.amin(0), "amin")
            while not torch.equal(label, followed := label[label]):
                label = followed
    return torch.arange(count) if label is None else label
