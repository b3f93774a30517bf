"""Trainers of others with the guard: ``transformers`` or ``trl``, and a directory to write into."""

import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from ropewalk.guard import RotationCallback

LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
NAME, DIRECTORY = sys.argv[1:]


def llama():
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    )


class Cast(TrainerCallback):
    """What a careless callback, or a wrapper, does in the middle of a training."""

    def on_step_end(self, args, state, control, model=None, **_):
        if state.global_step == 2:
            model.to(torch.bfloat16)


class Rows(torch.utils.data.Dataset):
    """Eight rows of eight tokens."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        tokens = torch.arange(8) + index
        return {"input_ids": tokens, "labels": tokens}


SETTINGS = {
    "output_dir": DIRECTORY, "max_steps": 4, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True,
    "disable_tqdm": True, "save_strategy": "no",
}  # fmt: skip


def trainer(*callbacks):
    if NAME == "transformers":
        return Trainer(llama(), TrainingArguments(**SETTINGS), train_dataset=Rows(), callbacks=[*callbacks])
    import datasets
    import trl
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({str(n): n for n in range(64)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="1", pad_token="2")
    rows = datasets.Dataset.from_list([{"input_ids": list(range(3, 11))} for _ in range(8)])
    settings = trl.SFTConfig(**SETTINGS, bf16=False)
    return trl.SFTTrainer(
        llama(), args=settings, train_dataset=rows, processing_class=tokenizer, callbacks=[*callbacks]
    )


trainer(RotationCallback(every=1)).train()
with pytest.raises(RuntimeError, match=r"at step 0 the model rotates other than meant: model.rotary_emb: stock"):
    trainer(RotationCallback(LINEAR)).train()
with pytest.raises(RuntimeError, match=r"at step 2 .*bfloat16, not float32"):
    trainer(Cast(), RotationCallback(every=1)).train()
