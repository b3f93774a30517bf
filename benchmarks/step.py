"""A step of the loop against a bare PyTorch loop on one rank, and against the Hugging Face Trainer on two.

python benchmarks/step.py [--steps 30] [--tokens 4096]

The demo's model from scratch, fp32 on CPU, one thread a rank, a packed row of eight documents. The bare loop has the
same model with the same attention and loss, torch's AdamW and clip_grad_norm_, and nothing else: no ZeRO, no metrics,
no guard. The Trainer gets the same model and the loop's own DeepSpeed configuration (ZeRO-3). Steps of the two loops
alternate in one process; the ratio is the median of the pairs, with its 95% bootstrap interval. Limits: 1.10 for the
bare loop; the Trainer no faster within the interval. On a busy machine the processor time is what can be read.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from itertools import repeat
from typing import Any

import torch
import torch.distributed as dist
from demo import demo_config, packed_batch, told

from ropewalk.config.groups import RopeConfig
from ropewalk.config.train import TrainConfig
from ropewalk.model.attention import Documents
from ropewalk.model.load import build_for_training, training_config
from ropewalk.model.loss import LossModel
from ropewalk.training.distributed import Ranks, start_processes
from ropewalk.training.engine import parameter_groups, start_engine, zero_config
from ropewalk.training.guards import Guard
from ropewalk.training.inputs import StepBatch
from ropewalk.training.meter import Meter
from ropewalk.training.trainer import Trainer

WARM_UP = 3


def ours(config: TrainConfig, model_config: Any, ranks: Ranks, tokens: int):
    """A function that takes the loop's step, with its guard and its metrics."""
    batch = packed_batch(tokens, model_config.vocab_size, seed=ranks.rank)
    engine = start_engine(config, model_config, ranks)
    meter = Meter(ranks.device, ["demo"], 512)
    batches = repeat(StepBatch(0, [batch], batch.trained_tokens * ranks.world_size))
    trainer = Trainer(engine, ranks, batches, lambda step: 1e-3, Guard(config.guards), meter)

    def step() -> None:
        trainer.take_step()
        meter.row(1)

    return step


def bare(config: TrainConfig, model_config: Any, tokens: int):
    """A function that takes a step of plain PyTorch."""
    trainer = config.trainer
    torch.manual_seed(trainer.seed)
    model = LossModel(build_for_training(model_config, None, torch.float32), trainer.loss_chunk_size).train()
    betas = (trainer.adam_beta1, trainer.adam_beta2)
    groups = parameter_groups(model.parameters(), trainer.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=betas, eps=trainer.adam_eps)
    batch = packed_batch(tokens, model_config.vocab_size, seed=0)
    trained = batch.trained_tokens

    def step() -> None:
        documents = Documents.from_cu_seqlens(batch.cu_seqlens, torch.device("cpu"))
        loss = model(batch.input_ids, batch.position_ids, batch.labels, documents) / trained
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), trainer.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # a loop that shows its loss

    return step


def settings(tokens: int, world_size: int) -> tuple[TrainConfig, Any]:
    """The demo's recipe at one micro batch a rank."""
    batch = [f"trainer.micro_batch_size={tokens // 512}", f"trainer.global_batch_size={tokens // 512 * world_size}"]
    config = demo_config(*batch)
    return config, training_config(config.model, RopeConfig("rope"), 512)


def against_bare(steps: int, tokens: int) -> None:
    """Print the ratio on one rank."""
    ranks = start_processes("cpu")
    config, model_config = settings(tokens, 1)
    loops = {"ours": ours(config, model_config, ranks, tokens), "bare": bare(config, model_config, tokens)}
    clocks = {"time": time.perf_counter, "processor time": time.process_time}
    times: dict[tuple[str, str], list[float]] = {(clock, name): [] for clock in clocks for name in loops}
    for number in range(WARM_UP + steps):
        for name in sorted(loops, reverse=bool(number % 2)):
            start = {clock: read() for clock, read in clocks.items()}
            loops[name]()
            for clock, read in clocks.items():
                times[clock, name].append(read() - start[clock])
    for clock in clocks:
        ours_, bare_ = times[clock, "ours"][WARM_UP:], times[clock, "bare"][WARM_UP:]
        print(f"1 rank, {clock}:", told(ours_, bare_, ("the loop", "bare PyTorch")), flush=True)


class MeanLoss(LossModel):
    """The loss as the Trainer expects it."""

    def forward(self, input_ids, position_ids, labels, documents) -> dict[str, torch.Tensor]:
        """The mean over this rank's trained tokens."""
        return {"loss": super().forward(input_ids, position_ids, labels, documents) / (labels != -100).sum()}


def against_trainer(steps: int, tokens: int) -> None:
    """On every rank: run Trainer.train(), and after each of its steps one of ours; rank 0 prints the times."""
    ranks = start_processes("cpu")
    config, model_config = settings(tokens, ranks.world_size)
    from transformers import Trainer, TrainerCallback, TrainingArguments

    trainer = config.trainer
    adam = {
        "lr": 1e-3,
        "betas": [trainer.adam_beta1, trainer.adam_beta2],
        "eps": trainer.adam_eps,
        "weight_decay": trainer.weight_decay,
        "torch_adam": True,
    }
    zero = zero_config(trainer, config.deepspeed, accumulation_steps=1)
    zero["optimizer"] = {"type": "AdamW", "params": adam}
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        max_steps=WARM_UP + steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        max_grad_norm=trainer.gradient_clipping,
        lr_scheduler_type="constant",
        learning_rate=1e-3,
        adam_beta1=trainer.adam_beta1,
        adam_beta2=trainer.adam_beta2,
        adam_epsilon=trainer.adam_eps,
        weight_decay=trainer.weight_decay,
        deepspeed=zero | {"train_micro_batch_size_per_gpu": 1},
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    torch.manual_seed(trainer.seed)
    model = MeanLoss(build_for_training(model_config, None, torch.float32), trainer.loss_chunk_size).train()
    mine = ours(config, model_config, ranks, tokens)
    times: dict[str, list[float]] = {"trainer": [], "ours": []}

    class Alternate(TrainerCallback):
        """A step of ours after each of the Trainer's."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            dist.barrier()
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times["trainer"].append(time.perf_counter() - self.start)
            dist.barrier()
            start = time.perf_counter()
            mine()
            times["ours"].append(time.perf_counter() - start)

    rows = [packed_batch(tokens, model_config.vocab_size, seed) for seed in range(ranks.world_size)]

    def collate(numbers: list[int]) -> dict[str, Any]:
        batch = rows[numbers[0] % len(rows)]
        documents = Documents.from_cu_seqlens(batch.cu_seqlens, torch.device("cpu"))
        return {
            "input_ids": batch.input_ids,
            "position_ids": batch.position_ids,
            "labels": batch.labels,
            "documents": documents,
        }

    Trainer(
        model=model,
        args=arguments,
        train_dataset=list(range(ranks.world_size * (WARM_UP + steps))),
        data_collator=collate,
        callbacks=[Alternate()],
    ).train()
    if ranks.is_main:
        print("TIMES", json.dumps({name: found[WARM_UP:] for name, found in times.items()}))


def main() -> None:
    """Print both comparisons."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=4096, help="of a rank's row; a multiple of 512")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.rank:
        against_trainer(given.steps, given.tokens)
        return
    against_bare(given.steps, given.tokens)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__, "--rank"]
    sizes = [f"--steps={given.steps}", f"--tokens={given.tokens}"]
    done = subprocess.run([*launch, *sizes], stdout=subprocess.PIPE, text=True, check=True)
    line = next(line for line in done.stdout.splitlines() if line.startswith("TIMES"))
    times = json.loads(line.removeprefix("TIMES"))
    print("2 ranks:", told(times["ours"], times["trainer"], ("the loop", "Hugging Face Trainer")))


if __name__ == "__main__":
    main()
