"""Two ranks whose spectra are equal, then not: what inspection says of both."""

import torch
from torch import distributed
from transformers import LlamaConfig, LlamaForCausalLM

from ropewalk.analysis.inspection import describe, rotations
from ropewalk.training.distributed import end_processes

distributed.init_process_group("gloo")
model = LlamaForCausalLM(
    LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
)
assert rotations(model, 8)[0].equal_on_all_ranks is True
if distributed.get_rank() == 1:
    with torch.no_grad():
        model.model.rotary_emb.inv_freq[-1] *= 1.0001
found = rotations(model, 8)[0]
assert found.equal_on_all_ranks is False
assert "NOT EQUAL ON ALL RANKS" in describe(found)
end_processes()
