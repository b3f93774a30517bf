"""The engine's loss and gradients are those of every document alone, whatever the ranks and micro batches."""

import copy
import json
from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.utils import safe_get_full_fp32_param
from helpers import GradientProbe, composed, one_step, save_tiny, tiny_run, torchrun
from ranks import run_ranks
from transformers import AutoModelForCausalLM
from transformers.integrations import is_deepspeed_zero3_enabled

from ropewalk.config.groups import RopeConfig
from ropewalk.config.rules import batching
from ropewalk.data import Mixture, PackedStore
from ropewalk.data.order.batches import rank_micro_batches, read_batch
from ropewalk.model.load import head_dim, training_config
from ropewalk.model.loss import LossModel, tiled_linear_cross_entropy
from ropewalk.training import engine as engine_module
from ropewalk.training.distributed import import_deepspeed, start_processes
from ropewalk.training.engine import parameter_groups, start_engine, zero_config
from ropewalk.training.inputs import micro_batches

HERE = Path(__file__).parent
GLOBAL_BATCH = 8
WEIGHTS = {"long": 0.5, "short": 0.5}
LEARNED = [{"method": "learned"}]  # which leaves the other gradients as they are


def per_document_gradients(directory, store, z_loss=0.0, batch=GLOBAL_BATCH):
    """Every document by itself through stock transformers, token losses summed, divided by all trained tokens."""
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    pairs = head_dim(model.config) // 2
    alpha = torch.zeros(pairs, dtype=torch.float64, requires_grad=True)
    frequencies = 1e4 ** (-torch.arange(pairs, dtype=torch.float64) / pairs)

    def rotate(x, position_ids):
        angles = position_ids[..., None] * (frequencies * alpha.exp()).repeat(2)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    if hasattr(model.model.rotary_emb, "inv_freq"):  # else each layer type has its own, and learns none
        model.model.rotary_emb.forward = rotate
    total, count = torch.zeros(()), 0
    for ref in Mixture(0, WEIGHTS, store, batch).global_batch(0):
        sequence = store.read(ref.domain, *ref.rows)
        start = 0
        for end in sequence.ends.tolist():
            ids = torch.from_numpy(sequence.tokens[start:end].astype(np.int64))[None]
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            total = total + F.cross_entropy(logits, ids[0, 1:], reduction="sum")
            total = total + z_loss * logits.logsumexp(1).square().sum()
            count += end - start - 1
            start = end
    (total / count).backward()
    return (total / count).item(), {name: p.grad for name, p in model.named_parameters()}, alpha.grad


def assert_gradients(directory, ranks, cases, sequence=1, batch=GLOBAL_BATCH):
    """Run the cases through the engine on ``ranks`` processes; each must give what its model does by itself."""
    for case in cases:
        case |= {"weights": WEIGHTS, "global_batch_size": batch}
        case["micro_batch_size"] = batch * sequence // (ranks * case["accumulation"])
    (directory / "cases.json").write_text(json.dumps({"sequence": sequence, "cases": cases}))
    arguments = [str(directory / "cases.json"), str(directory)]
    script = str(HERE / "engine_gradients.py")
    if any("trainer.compile=true" in case["overrides"] for case in cases):  # the compiler hangs in a forked process
        torchrun(ranks, script, *arguments)
    else:
        run_ranks(ranks, directory / "logs", arguments, script=script)
    for case in cases:
        store = PackedStore(case["store"])
        loss, expected, alpha = per_document_gradients(case["model"], store, case.get("z_loss", 0.0), batch)
        is_bf16 = "trainer.dtype=bfloat16" in case["overrides"]
        rounding = 2e-2 if is_bf16 else 1e-5
        with np.load(directory / f"{case['name']}.npz") as found:
            assert float(found["loss"]) == pytest.approx(loss, rel=rounding)
            norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
            assert float(found["norm"]) == pytest.approx(norm.item(), rel=rounding)
            expected |= {"alpha": alpha.float()} if "chain" in case else {}
            assert set(found.files) == {"loss", "norm", *expected}
            for name, gradient in expected.items():
                own = torch.from_numpy(found[name])
                if is_bf16:
                    assert F.cosine_similarity(own.flatten(), gradient.flatten(), dim=0) > 0.99, name
                else:
                    torch.testing.assert_close(own, gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_gradients_equal_each_document_alone(tmp_path, store_64, ranks):
    """Unequal label counts in every micro batch; accumulation 1, 2 and 4; tied and untied heads; all partitioned."""
    models = {
        tied: save_tiny(tmp_path / f"tied_{tied}", tie_word_embeddings=tied, attention_bias=True)
        for tied in (True, False)
    }
    cases = [
        {
            "name": f"accumulation{accumulation}_tied{tied}_checkpointing{checkpointing}",
            "model": str(models[tied]),
            "store": str(store_64.root),
            "accumulation": accumulation,
            "overrides": [f"trainer.activation_checkpointing={checkpointing}"],
        }
        for accumulation, tied, checkpointing in [(1, True, False), (2, False, False), (4, True, True)]
    ]
    with_z_loss = {"name": "z_loss", "z_loss": 0.01, "overrides": ["trainer.z_loss=0.01"]}
    assert_gradients(tmp_path, ranks, [*cases, {**cases[1], **with_z_loss}])


@pytest.mark.slow
def test_what_saves_memory_or_time_changes_no_gradient(tmp_path, store_64):
    """Two ranks, all partitioned, accumulation 2: bit for bit where nothing is computed in another order.

    The tiled MLP adds up in another order and the compiler fuses, so these two agree as rounding allows: with the
    documents alone, as all do.
    """
    checkpointing = "trainer.activation_checkpointing=true"
    equal = {
        "plain": [],  # frequencies are trained, too
        "checkpointing": [checkpointing],
        "offload": [checkpointing, "trainer.offload_activations=true"],
        "attention_kept": [checkpointing, "trainer.keep_attention=true"],
        "optimizer_in_host_memory": ["deepspeed.offload_optimizer=true"],
    }
    close = {
        "tiled": ["trainer.mlp_chunk_size=40"],
        "tiled_checkpointing": [checkpointing, "trainer.mlp_chunk_size=40"],
        "compiled": ["trainer.compile=true"],
    }
    model = save_tiny(tmp_path / "model", mlp_bias=True)
    cases = [
        {
            "name": name,
            "model": str(model),
            "store": str(store_64.root),
            "accumulation": 2,
            "overrides": overrides,
            "chain": LEARNED,
        }
        for name, overrides in {**equal, **close}.items()
    ]
    assert_gradients(tmp_path, 2, cases)
    with np.load(tmp_path / "plain.npz") as plain:
        for name in equal:
            with np.load(tmp_path / f"{name}.npz") as found:
                # the norm of what is kept in host memory adds up in another order
                assert [key for key in plain.files if not np.array_equal(plain[key], found[key])] in ([], ["norm"])


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "sequence", "heads", "kv_heads", "model_type"), [
    (2, 2, 8, 4, "olmo3"), (4, 2, 8, 1, "llama"), (6, 6, 6, 2, "llama"),
])  # fmt: skip
def test_gradients_of_shared_sequences_equal_each_document_alone(
    tmp_path, store_64, ranks, sequence, heads, kv_heads, model_type
):  # fmt: skip
    """Documents that cross the ranks' borders, grouped heads, accumulation; ZeRO stages average differently.

    A rank has two key/value heads of its own, one that two ranks have (for four query heads), or one that three have
    (for one). ZeRO-1 in bf16 is another optimizer of DeepSpeed's. One model has a layer with a window of 9 tokens.
    """
    batch, rows = 12, 3  # of 64 tokens, laid in one: a border in the middle of a row
    borders = range(0, rows * 64, rows * 64 // sequence)
    for refs in rank_micro_batches(Mixture(0, WEIGHTS, store_64, batch), 0, 0, 1, rows):
        assert not set(borders) <= set(read_batch(store_64, refs).cu_seqlens.tolist())
    sizes = {"hidden_size": 4 * heads, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    if model_type == "olmo3":
        sizes |= {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"], "pad_token_id": 0}
    model = save_tiny(tmp_path / "model", model_type, **sizes)
    kept = ["offload_activations", "keep_attention"]
    cases = [
        {
            "name": f"stage{stage}_{dtype}",
            "model": str(model),
            "store": str(store_64.root),
            "accumulation": batch * sequence // (ranks * rows),
            **({"chain": LEARNED} if dtype == "float32" and model_type == "llama" else {}),
            "overrides": [
                f"deepspeed=zero{stage}", f"trainer.dtype={dtype}",
                *(f"trainer.{name}=true" for name in ways),
            ],
        }
        for stage, dtype, ways in [
            (1, "float32", []), (1, "bfloat16", []), (2, "float32", ["activation_checkpointing"]),
            (3, "float32", ["activation_checkpointing", *kept]),
        ]
    ]  # fmt: skip
    assert_gradients(tmp_path, ranks, cases, sequence, batch)


def test_label_counts_are_unequal(store_64):
    """What makes the test above able to fail: a mean of means would differ."""
    counts = {
        store_64.trained_tokens(ref.domain, *ref.rows)
        for ref in Mixture(0, WEIGHTS, store_64, GLOBAL_BATCH).global_batch(0)
    }
    assert len(counts) > 1


def test_gradients_and_decay_of_a_partitioned_bf16_model(store_64, tmp_path):
    """In the engine itself: gradients are kept and sent in fp32; decayed is what has two dimensions when whole."""
    overrides = ["trainer.dtype=bfloat16", "deepspeed.param_persistence_threshold=0"]
    config = tiny_run(store_64, tmp_path, *overrides, attention_bias=True)
    ranks = start_processes("cpu")
    engine = start_engine(config, training_config(config.model, RopeConfig("rope"), 64), ranks)
    mixture = Mixture(0, WEIGHTS, store_64, config.trainer.global_batch_size)
    probe = GradientProbe(lambda: [g.dtype for group in engine.optimizer.averaged_gradients.values() for g in group])
    one_step(engine, micro_batches(mixture, 0, ranks, config), mixture.trained_tokens(0), ranks, probe)
    assert set(probe.seen) == {torch.float32}
    assert engine.communication_data_type == torch.float32
    assert {p.dtype for p in engine.module.parameters()} == {torch.bfloat16}
    names = {id(p): name.removeprefix("lm.") for name, p in engine.module.named_parameters()}
    decayed, undecayed = ({names[id(p)] for p in g["params"]} for g in parameter_groups(engine.module.parameters(), 1))
    whole = AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path / "whole", attention_bias=True))
    assert decayed == {name for name, p in whole.named_parameters() if p.ndim == 2}
    assert undecayed == {name for name, p in whole.named_parameters() if p.ndim == 1}
    assert [group["weight_decay"] for group in engine.optimizer.param_groups] == [config.trainer.weight_decay, 0.0]
    engine.destroy()


class LossInTheRoot(LossModel):
    """Reads the head in its own forward, as a plain model would."""

    def forward(self, input_ids, position_ids, labels, documents, token_losses, vision=None):
        output = self.lm.get_decoder()(
            input_ids=input_ids, position_ids=position_ids, use_cache=False, documents=documents
        )
        head = self.lm.get_output_embeddings().weight
        return tiled_linear_cross_entropy(
            output.last_hidden_state[0], head, labels[0], self.loss.chunk_size, token_losses
        )


def gathers_of_three_steps(store, run_dir, monkeypatch, model, tied):
    """Losses; of the last step the head's status as each layer's MLP has run, and the parameters of each gather.

    A head of 16,384 elements is more than may be live, as that of Llama-3-70B is.
    """
    few = {"stage3_max_live_parameters": 16_000, "stage3_prefetch_bucket_size": 4_000, "stage3_max_reuse_distance": 0}

    def settings(*arguments):
        made = zero_config(*arguments)
        return {**made, "zero_optimization": {**made["zero_optimization"], **few}}

    private = "_PartitionedParameterCoordinator__all_gather_params"
    gather = getattr(PartitionedParameterCoordinator, private)
    sizes, seen = [], {}

    def gathered(self, parameters, forward):
        sizes.append(sum(p.ds_status == ZeroParamStatus.NOT_AVAILABLE for p in parameters))
        gather(self, parameters, forward)

    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "LossModel", model)
        patch.setattr(engine_module, "zero_config", settings)
        patch.setattr(PartitionedParameterCoordinator, private, gathered)
        config = tiny_run(store, run_dir, "deepspeed.param_persistence_threshold=0", tie_word_embeddings=tied,
                          num_hidden_layers=4)  # fmt: skip
        ranks = start_processes("cpu")
        engine = start_engine(config, training_config(config.model, RopeConfig("rope"), 64), ranks)
        lm, losses = engine.module.lm, []
        head = lm.get_output_embeddings().weight  # once: to look it up in a forward pass would gather it
        for number, layer in enumerate(lm.model.layers):
            for direction, register in (
                ("forward", layer.mlp.register_forward_hook), ("backward", layer.mlp.register_full_backward_hook),
            ):  # fmt: skip
                register(lambda *_, key=(direction, number): seen.setdefault(key, set()).add(head.ds_status))
        mixture = Mixture(0, WEIGHTS, store, config.trainer.global_batch_size)
        for step in range(3):
            sizes.clear()
            seen.clear()
            taken = one_step(engine, micro_batches(mixture, step, ranks, config), mixture.trained_tokens(step), ranks)
            losses.append((taken.loss, taken.grad_norm))
        engine.destroy()
    return losses, seen, sizes


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_is_gathered_while_the_loss_runs(store_64, tmp_path, monkeypatch, tied):
    """Not while a layer does, in either direction, so that parameters are gathered ahead of their use."""
    root, statuses_of_root, sizes_of_root = gathers_of_three_steps(store_64, tmp_path, monkeypatch, LossInTheRoot, tied)
    losses, statuses, sizes = gathers_of_three_steps(store_64, tmp_path, monkeypatch, LossModel, tied)
    assert losses == root
    assert (set().union(*statuses_of_root.values()), max(sizes_of_root)) == ({ZeroParamStatus.AVAILABLE}, 1)
    assert ZeroParamStatus.AVAILABLE not in set().union(*statuses.values())  # in flight shortly before its own use
    gone = [("forward", 0), ("backward", 3), ("backward", 2), ("backward", 1)]
    assert [statuses[moment] for moment in gone] == [{ZeroParamStatus.NOT_AVAILABLE}] * 4
    assert max(sizes) > 1


@pytest.mark.parametrize("stage", [1, 3])
def test_the_fused_optimizer_of_the_host_is_adamw(store_64, tmp_path, monkeypatch, stage):
    """Three steps of offloaded AdamW in DeepSpeed, fused, against the sequence of operations."""
    config = tiny_run(store_64, tmp_path, "deepspeed.offload_optimizer=true", f"deepspeed=zero{stage}")
    ranks, weights = start_processes("cpu"), {}
    mixture = Mixture(0, WEIGHTS, store_64, config.trainer.global_batch_size)
    for fused in (True, False):
        with monkeypatch.context() as patch:
            if not fused:
                patch.setattr(engine_module, "is_fused", lambda config: False)
            engine = start_engine(config, training_config(config.model, RopeConfig("rope"), 64), ranks)
        assert {group["fused"] for group in engine.optimizer.param_groups} == {fused}
        for step in range(3):
            one_step(engine, micro_batches(mixture, step, ranks, config), mixture.trained_tokens(step), ranks)
        weights[fused] = {name: safe_get_full_fp32_param(p).clone() for name, p in engine.module.named_parameters()}
        engine.destroy()
    for name, expected in weights[False].items():
        torch.testing.assert_close(weights[True][name], expected, rtol=1e-5, atol=1e-6, msg=name)


def test_a_model_that_cannot_be_built_leaves_nothing_partitioned(store_64, tmp_path):
    """transformers builds in parts while the settings live, and an exception that is kept keeps frames."""
    config = tiny_run(store_64, tmp_path)
    config.model.path = str(tmp_path / "absent")
    kept = []
    try:
        start_engine(
            config, training_config(tiny_run(store_64, tmp_path).model, RopeConfig("rope"), 64), start_processes("cpu")
        )
    except Exception as error:
        kept.append(error)
    assert kept
    assert not is_deepspeed_zero3_enabled()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("overrides", [
    [], ["trainer.activation_checkpointing=true", "trainer.offload_activations=true"],
    ["trainer.activation_checkpointing=true", "trainer.keep_attention=true"],
    ["trainer.mlp_chunk_size=40"], ["trainer.compile=true"], ["deepspeed.offload_optimizer=true"],
], ids=str)  # fmt: skip
def test_nccl_and_cuda_kernels_agree_with_each_document_alone(tmp_path, store_64, overrides):
    """Every device of this machine, bf16: the loss within 1%, each gradient within 15 degrees of the CPU's."""
    ranks = 2 ** (min(torch.cuda.device_count(), 8).bit_length() - 1)
    case = {
        "name": "cuda", "model": str(save_tiny(tmp_path / "model")), "store": str(store_64.root), "weights": WEIGHTS,
        "global_batch_size": GLOBAL_BATCH, "micro_batch_size": 1,
        "overrides": ["trainer.device=cuda", "trainer.dtype=bfloat16", *overrides],
    }  # fmt: skip
    (tmp_path / "cases.json").write_text(json.dumps({"device": "cuda", "sequence": 1, "cases": [case]}))
    torchrun(ranks, str(HERE / "engine_gradients.py"), str(tmp_path / "cases.json"), str(tmp_path))
    loss, expected, _ = per_document_gradients(case["model"], store_64)
    with np.load(tmp_path / "cuda.npz") as found:
        assert float(found["loss"]) == pytest.approx(loss, rel=1e-2)
        for name, gradient in expected.items():
            cosine = F.cosine_similarity(torch.from_numpy(found[name]).flatten(), gradient.flatten(), dim=0)
            assert cosine > 0.966, name


def test_gradients_add_up_and_travel_in_fp32():
    config = composed("train", "+experiment=cope20")
    settings = zero_config(config.trainer, config.deepspeed, batching(config, 8).accumulation_steps)
    assert settings["data_types"]["grad_accum_dtype"] == "fp32"
    assert settings["communication_data_type"] == "fp32"
    assert settings["bf16"] == {"enabled": True, "immediate_grad_update": True}
    assert settings["gradient_accumulation_steps"] * settings["train_micro_batch_size_per_gpu"] * 8 == 64


READ_BACK = {  # key -> the attribute of DeepSpeed's parsed configuration; bf16 and offloading have objects of their own
    "train_micro_batch_size_per_gpu": "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "gradient_clipping",
    "bf16": "bfloat16_config.enabled",
    "data_types": "grad_accum_dtype",
    "communication_data_type": "communication_data_type",
    "seq_parallel_communication_data_type": "seq_parallel_communication_data_type",
    "zero_allow_untested_optimizer": "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer": "zero_force_ds_cpu_optimizer",
    "steps_per_print": "steps_per_print",
    "stage": "zero_config.stage",
    "overlap_comm": "zero_config.overlap_comm",
    "contiguous_gradients": "zero_config.contiguous_gradients",
    "stage3_param_persistence_threshold": "zero_config.param_persistence_threshold",
    "offload_optimizer": "zero_config.offload_optimizer.pin_memory",
}


def test_deepspeed_reads_every_setting():
    """It passes over keys that it does not know; whatever is set here must come out of its own parser."""
    config = composed("train", "+experiment=cope20", "trainer.micro_batch_size=2", "trainer.gradient_clipping=0.7",
                      "deepspeed.param_persistence_threshold=1234", "deepspeed.overlap_comm=false",
                      "deepspeed.offload_optimizer=true")  # fmt: skip
    settings = zero_config(config.trainer, config.deepspeed, accumulation_steps=5)
    parsed = import_deepspeed("cpu").runtime.config.DeepSpeedConfig(copy.deepcopy(settings))
    given = {**settings, **settings.pop("zero_optimization")}
    assert given.pop("sequence_parallel_size") == 1  # read where DeepSpeed counts its ranks
    given |= {"bf16": given["bf16"]["enabled"], "data_types": given["data_types"]["grad_accum_dtype"]}
    given |= {"offload_optimizer": given["offload_optimizer"]["pin_memory"]}
    for name in ("communication_data_type", "seq_parallel_communication_data_type"):
        given[name] = torch.float32
    del given["zero_optimization"]
    assert {name: attrgetter(READ_BACK[name])(parsed) for name in given} == given


def test_weight_decay_goes_by_the_whole_shape():
    """A partitioned parameter shows one dimension; its ds_shape tells."""
    matrix, norm = torch.nn.Parameter(torch.zeros(6)), torch.nn.Parameter(torch.zeros(3))
    matrix.ds_shape, norm.ds_shape = torch.Size([2, 3]), torch.Size([3])
    plain = torch.nn.Parameter(torch.zeros(2, 2))
    decayed, undecayed = parameter_groups([matrix, norm, plain], 0.1)
    assert [id(p) for p in decayed["params"]] == [id(matrix), id(plain)]
    assert decayed["weight_decay"] == 0.1
    assert [id(p) for p in undecayed["params"]] == [id(norm)]
    assert undecayed["weight_decay"] == 0.0
