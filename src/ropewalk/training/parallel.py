"""Sequence parallelism (DeepSpeed Ulysses, arXiv 2309.14509): several ranks share one row of tokens.

Each rank of a group holds an equal stretch of the row. Everything but attention works token by token; for attention the
ranks trade tokens for heads (ropewalk.model.attention), so each sees whole documents in its share of the heads.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch.distributed as dist
from transformers import PreTrainedConfig

from ropewalk.data.order.batches import Batch
from ropewalk.errors import UserError


def sequence_groups(size: int) -> tuple[Any, dist.ProcessGroup | None]:
    """Form groups of ``size`` neighbouring ranks. Collective.

    Returns:
        What deepspeed.initialize takes as ``mpu`` and this rank's group; None and None where ``size`` is 1.
    """
    if size == 1:
        return None, None
    from deepspeed.runtime.sequence_parallel import parallel_state_sp
    from deepspeed.sequence.layer import register_all_to_all_group

    if parallel_state_sp._SEQUENCE_PARALLEL_GROUP is None:
        parallel_state_sp.initialize_sequence_parallel(size)
    elif parallel_state_sp.get_sequence_parallel_world_size() != size:
        raise UserError(
            f"parallel.sequence={size}, but this process is in a group of "
            f"{parallel_state_sp.get_sequence_parallel_world_size()}; start a new process"
        )
    group = parallel_state_sp.get_sequence_parallel_group()
    register_all_to_all_group(group)
    return parallel_state_sp, group


def check_heads(config: PreTrainedConfig, size: int) -> None:
    """Refuse a group whose ranks would not get equal shares of the heads.

    Raises:
        UserError: where ``size`` does not divide the key/value heads (and so the query heads); they would have to be
            copied.
    """
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    allowed = [n for n in range(1, shared + 1) if shared % n == 0 and heads % n == 0]
    if size not in allowed:
        raise UserError(
            f"parallel.sequence={size} does not divide the model's {heads} query and {shared} key/value heads; set it "
            f"to one of {', '.join(map(str, allowed))}"
        )


def shard(batch: Batch, rank: int, size: int) -> Batch:
    """The stretch of a batch that rank ``rank`` of ``size`` holds.

    Labels are shifted before the cut, so the last token of a stretch is still trained on; the document bounds stay
    those of the whole row.

    Raises:
        UserError: where the row does not divide.
    """
    tokens = batch.input_ids.shape[1]
    if tokens % size:
        raise UserError(f"a row of {tokens} tokens cannot be cut in {size} equal parts; change parallel.sequence")
    mine = slice(rank * tokens // size, (rank + 1) * tokens // size)
    return replace(
        batch,
        input_ids=batch.input_ids[:, mine],
        position_ids=batch.position_ids[:, mine],
        labels=batch.labels[:, mine],
    )
