"""Two ranks, one of which rotates otherwise: all of them stop."""

import pytest
from torch import distributed
from transformers import LlamaConfig, LlamaForCausalLM

from ropewalk.guard import RotationCallback
from ropewalk.training.distributed import end_processes


class State:
    """Of a training, as far as the callback reads it."""

    global_step = 7


distributed.init_process_group("gloo")
model = LlamaForCausalLM(
    LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
)
callback = RotationCallback()
callback.on_train_begin(None, State, None, model=model)
if distributed.get_rank() == 1:
    model.model.rotary_emb.attention_scaling = 2.0
with pytest.raises(RuntimeError, match=r"at step 7 .*attention scaling 2, by its config 1"):
    callback.on_train_end(None, State, None, model=model)
end_processes()
