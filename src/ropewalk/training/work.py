"""Floating-point work of a step, by three named conventions, and how evenly the ranks share it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from ropewalk.data import Mixture, SequenceRef
from ropewalk.data.order.batches import micro_batch_slots
from ropewalk.flops import causal_pairs, sequence_flops

# Dense bf16 peak of one device, FLOP/s, from NVIDIA's data sheets, by the name that CUDA gives it.
PEAK_FLOPS = {
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H200": 989.4e12,
}
CONVENTIONS = ("documents", "dense_causal", "full_attention")


def known_peak(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of a GPU in the table; None for any other device."""
    return PEAK_FLOPS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


@dataclass(frozen=True)
class StepWork:
    """Work of one global batch, forward and backward.

    Attributes:
        flops: by convention. Matrix products count 2 FLOPs a multiply-add, backward twice the forward; recomputation
            does not count. Attention counts the pairs of query and key: "documents": causal inside the documents that
            were packed; "dense_causal": causal over the whole row, as if it were one document; "full_attention": all
            pairs of the row (PaLM, arXiv 2204.02311, appendix B).
        imbalance: work of the slowest rank over the mean, micro batch by micro batch, since ZeRO-3 synchronises at
            each; 1: even.
    """

    flops: dict[str, float]
    imbalance: float


class WorkCounter:
    """Counts the work of any step from the store's index, without reading a token."""

    def __init__(self, config: PreTrainedConfig, mixture: Mixture, data_size: int, micro_batch_size: int) -> None:
        """Look at the model's shape.

        Args:
            config: of the model.
            mixture: the order.
            data_size: ranks that read different data.
            micro_batch_size: sequences.
        """
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        self.linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))  # with the head
        self.attention_width = config.num_hidden_layers * config.num_attention_heads * config.head_dim
        self.mixture, self.data_size, self.micro_batch_size = mixture, data_size, micro_batch_size
        self.length = mixture.store.sequence_length

    def step(self, step: int) -> StepWork:
        """The work of the global batch of ``step``."""
        slots = micro_batch_slots(self.mixture, step, self.data_size, self.micro_batch_size)
        work = [[sum(self._of_documents(ref) for ref in micro) for micro in slot] for slot in slots]
        total, sequences, length = sum(map(sum, work)), self.mixture.global_batch_size, self.length
        flops = {
            "documents": total,
            "dense_causal": sequences * self._flops(causal_pairs(length)),
            "full_attention": sequences * self._flops(float(length**2)),
        }
        return StepWork(flops, sum(map(max, work)) / (total / self.data_size))

    def _of_documents(self, ref: SequenceRef) -> float:
        """FLOPs of one sequence: a document of n tokens has n(n + 1)/2 pairs."""
        squares = sum(self.mixture.store.attention_cost(ref.domain, row) for row in ref.rows)
        return self._flops((squares + self.length) / 2)

    def _flops(self, pairs: float) -> float:
        """Of a sequence with so many pairs of query and key."""
        return sequence_flops(self.linear, self.attention_width, self.length, pairs)
