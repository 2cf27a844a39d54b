"""The random subspaces and the merge of WISE, for updates of your own.

    .venv/bin/python examples/merge_for_other_methods.py

Each update of a weight is made in a random subspace of its own and the updates are merged (WISE, Section 2.3.2). The
table says how much of each is left: the cosine between the update and the merged one, in the update's own subspace. The
larger rho, the more entries are wanted by several updates.
"""

import torch

from easyedit_wise import MERGE_METHODS, merge, random_mask
from easyedit_wise.sharding import overlap

SHAPE, UPDATES = (256, 512), 4
generator = torch.Generator().manual_seed(0)


def update(mask: torch.Tensor) -> torch.Tensor:
    """A stand-in for W' - W after training the entries that the mask lets be."""
    return mask * torch.randn(SHAPE, generator=generator)


def left_of(delta: torch.Tensor, merged: torch.Tensor, mask: torch.Tensor) -> float:
    """Cosine in the update's subspace."""
    return float(torch.cosine_similarity(delta[mask], merged[mask], dim=0))


methods = [name for name in MERGE_METHODS if name != "slerp"]  # that one is of two updates only
print(f"{'rho':>5} {'in all masks':>13}", *(f"{name:>15}" for name in methods))
for rho in (0.1, 0.2, 0.5, 1.0):
    masks = [random_mask(SHAPE, rho, generator) for _ in range(UPDATES)]
    deltas = [update(mask) for mask in masks]
    row = []
    for method in methods:
        merged = merge(deltas, method, density=1.0, generator=generator)
        row.append(sum(map(left_of, deltas, [merged] * UPDATES, masks)) / UPDATES)
    print(f"{rho:5} {overlap(masks):13.4f}", *(f"{value:15.2f}" for value in row))
