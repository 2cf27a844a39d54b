"""How far EasyEdit's own WISE ends from itself when the sums of a forward pass are added in another order.

The units inside an MLP have no order: a model in which they change places computes the same function, and differs by
rounding alone. Two implementations of one method cannot be asked to stay closer than one does to itself.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from benchmarks.fidelity import Distance, distance, run_theirs
from easyedit_wise.easyedit.upstream import UpstreamWise

_WRITERS, _READERS = ("gate_proj", "up_proj", "c_fc"), ("down_proj", "c_proj")


def reordered(model: nn.Module, inner_param: str, seed: int) -> Any:
    """A copy in which the units of all MLPs but the edited one have changed places.

    The edited layer's keep theirs: TIES cuts among entries of equal size, and takes the first.

    Raises:
        ValueError: no other layer has an MLP whose matrices are known here.
    """
    made, generator, n_changed = copy.deepcopy(model), torch.Generator().manual_seed(seed), 0
    edited = inner_param.removesuffix(".weight").replace("[", ".").replace("]", "").rpartition(".")[0]
    for name, module in made.named_modules():
        readers = [getattr(module, key) for key in _READERS if isinstance(getattr(module, key, None), nn.Module)]
        writers = [getattr(module, key) for key in _WRITERS if isinstance(getattr(module, key, None), nn.Module)]
        if name == edited or not writers or not readers:
            continue
        n_units = readers[0].weight.shape[0 if isinstance(readers[0], Conv1D) else 1]
        order = torch.randperm(n_units, generator=generator)
        for writer in writers:
            writer.weight.data = _moved(writer.weight.data, order, 1 if isinstance(writer, Conv1D) else 0)
            if writer.bias is not None:
                writer.bias.data = _moved(writer.bias.data, order, 0)
        readers[0].weight.data = _moved(readers[0].weight.data, order, 0 if isinstance(readers[0], Conv1D) else 1)
        n_changed += 1
    if not n_changed:
        raise ValueError(f"no MLP beside {edited} has {' or '.join(_WRITERS)} and {' or '.join(_READERS)}.")
    return made


def from_itself(
    upstream: UpstreamWise,
    model: nn.Module,
    tok: Any,
    edits: Sequence[Mapping[str, str]],
    config: Mapping[str, Any],
    masks: Sequence[Tensor],
    asked: Sequence[str] = (),
    seeds: Sequence[int] = (0, 1),
) -> Distance:
    """The largest distances of EasyEdit's code on reordered models from the same code on the model itself."""
    theirs = run_theirs(upstream, model, tok, edits, config, masks, asked)
    found = []
    for seed in seeds:
        other = reordered(model, config["inner_params"][0], seed)
        found.append(asdict(distance(run_theirs(upstream, other, tok, edits, config, masks, asked), theirs)))
    return Distance(**{key: max(one[key] for one in found) for key in found[0]})


def _moved(tensor: Tensor, order: Tensor, dim: int) -> Tensor:
    return tensor.index_select(dim, order.to(tensor.device)).clone()
