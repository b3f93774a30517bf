"""An answer of a run or export to a prompt: ``python scripts/generate.py checkpoint=DIR prompt=TEXT``."""

from __future__ import annotations

import torch

from ropewalk.config.evaluation import EvaluateConfig, GenerateConfig
from ropewalk.errors import UserError
from ropewalk.evaluation.documents import beginning, encode
from ropewalk.evaluation.evaluated_checkpoint import open_checkpoint, scaling_name
from ropewalk.evaluation.model_reader import ModelReader


def generate(config: GenerateConfig) -> str:
    """Print the model, its test-time setting at the length of prompt and answer, and the answer; return the answer.

    Decoding is greedy, so the same command gives the same answer. With ``chat`` the prompt is a user's turn in the
    tokenizer's chat template.

    Raises:
        UserError: for a checkpoint that cannot be read, an empty prompt, or a tokenizer without a chat template.
    """
    if not config.prompt:
        raise UserError("prompt is empty; give a text to go on from: prompt='Once upon a time'")
    if config.max_new_tokens < 1:
        raise UserError(f"max_new_tokens={config.max_new_tokens} must be 1 or more")
    checkpoint = open_checkpoint(
        EvaluateConfig(checkpoint=config.checkpoint, device=config.device, dtype=config.dtype, lengths=[])
    )
    tokenizer = checkpoint.tokenizer
    if config.chat and tokenizer.chat_template is None:
        raise UserError(f"chat=true, and the tokenizer of {config.checkpoint} has no chat template; set chat=false")
    turn = [{"role": "user", "content": config.prompt}]
    ids = (
        tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
        if config.chat
        else beginning(tokenizer) + encode(tokenizer, config.prompt)
    )
    length = len(ids) + config.max_new_tokens
    (setting,) = checkpoint.settings([length], config.test_time).values()
    print(
        f"{checkpoint.run}, trained at {checkpoint.trained_length:,} tokens; {length:,} tokens under "
        f"test_time={config.test_time.name}, which is {scaling_name(setting, checkpoint.config.rope)} there: "
        f"{setting.chain}",
        flush=True,
    )
    reader = ModelReader(checkpoint.load(setting, length, config.device))
    answer = reader.generate(
        torch.tensor(ids), config.max_new_tokens, lambda written: written[-1] == tokenizer.eos_token_id
    )
    text = str(tokenizer.decode(answer, skip_special_tokens=True))
    print(text, flush=True)
    return text
