"""Which elements of the trained parameters each rank of DeepSpeed holds in float32, and copying them to the model.

DeepSpeed 0.19 has functions for whole parameters (`safe_get_full_fp32_param`, ...), which gather each on every rank.
The attributes read here are those that these functions read.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn

from rlhf import distributed
from rlhf.training.saved_state import Share


def deepspeed_shares(named: Sequence[tuple[str, nn.Parameter]], optimizer: Any, stage: int) -> list[Share]:
    """This rank's shares of the trained parameters.

    Args:
        named: The trained parameters with their names.
        optimizer: DeepSpeed's wrapper of the optimizer.
        stage: The ZeRO stage; in stage 0 the wrapper is the one that trains in bfloat16.
    """
    if stage == 0:
        names = {id(parameter): name for name, parameter in named}
        pairs = zip(chain(*optimizer.fp16_groups), chain(*optimizer.fp32_groups))
        return [Share(names[id(parameter)], 0, master.numel(), master) for parameter, master in pairs]
    shares = []
    for name, parameter in named:
        found: Any = parameter
        if stage == 3:
            group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = size * distributed.rank()
            count = min(size, found.ds_numel - start)  # the last rank's share is padded
            flat = optimizer.fp32_partitioned_groups_flat[group]
        elif found._hp_mapping is None:
            continue  # other ranks hold all of it
        else:
            place, within = found._hp_mapping.lp_fragment_address, found._hp_mapping.hp_fragment_address
            start, count, offset = place.start, place.numel, within.start
            flat = optimizer.optimizer.param_groups[found._hp_mapping.param_group_index]["params"][0]
        if count > 0:
            shares.append(Share(name, start, count, flat, offset))
    return shares


@torch.no_grad()
def refresh_weights(optimizer: Any, stage: int) -> None:
    """Copy the float32 weights of the optimizer into the model. Every rank calls it."""
    if stage == 0:
        for parameter, master in zip(chain(*optimizer.fp16_groups), chain(*optimizer.fp32_groups)):
            parameter.data.copy_(master)
    elif stage < 3:
        optimizer.update_lp_params()
    else:
        for weights, masters in zip(optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat):
            weights.data.copy_(masters)
        if gathered := optimizer.persistent_parameters:  # small parameters, which are not divided between passes
            gathered[0].partition(gathered)
            gathered[0].all_gather(gathered)
