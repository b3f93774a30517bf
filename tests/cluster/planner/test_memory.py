"""Memory against DeepSpeed's estimator, closed forms by hand, and what others have published."""

from dataclasses import replace

import pytest
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from helpers import composed

from ropewalk.cluster.planner import Allowances, ModelShape, Setting, memory, shape_of
from ropewalk.cluster.planner.memory import GIB, LIVE_PARAMETERS, REDUCE_BUCKET, saved_per_token, states

HBM80 = 79.1  # GiB that torch can allocate of an 80 GB GPU


@pytest.fixture(scope="module")
def llama3_8b() -> ModelShape:
    return shape_of(composed("train", "model=llama3_8b").model)


@pytest.mark.parametrize("name", ["llama3_8b", "llama3_70b", "qwen3_8b", "rope_id_1b"])
@pytest.mark.parametrize(("gpus", "nodes"), [(1, 1), (8, 1), (8, 4), (2, 3)])
def test_states_are_deepspeeds_estimate(name, gpus, nodes):
    """Its figure on the GPU less its largest layer: 18 bytes a parameter over all GPUs, 2 with it offloaded."""
    shape = shape_of(composed("train", f"model={name}").model)
    for offload, parameters in ((False, False), (True, False), (True, True)):
        setting = Setting(gpus * nodes, 4096, offload_optimizer=offload, offload_parameters=parameters)
        _, on_gpu, layer = estimate_zero3_model_states_mem_needs(
            shape.parameters, shape.embedding, gpus, nodes, cpu_offload=offload, cpu_offload_params=parameters
        )
        assert int(sum(states(shape, setting).values())) == on_gpu - layer


def test_stages_share_less_and_less(llama3_8b):
    """ZeRO (arXiv 1910.02054): optimizer states are shared from stage 1, gradients from 2, parameters from 3."""
    psi, n = llama3_8b.parameters, 8
    expected = {1: 2 * psi + 4 * psi + 12 * psi / n, 2: 2 * psi + (4 + 12) * psi / n, 3: (2 + 4 + 12) * psi / n}
    for stage, total in expected.items():
        assert sum(states(llama3_8b, Setting(n, 4096, stage=stage)).values()) == pytest.approx(total)


@pytest.mark.parametrize(("gpus", "nodes"), [(1, 1), (8, 4)])
def test_states_of_zero2_are_deepspeeds_estimate(llama3_8b, gpus, nodes):
    """Less the bf16 gradients of a rank's share, which it counts and which are freed as they are added up in fp32."""
    _, on_gpu = estimate_zero2_model_states_mem_needs(llama3_8b.parameters, gpus, nodes, cpu_offload=False)
    found = sum(states(llama3_8b, Setting(gpus * nodes, 4096, stage=2)).values())
    assert found == pytest.approx(on_gpu - 2 * llama3_8b.parameters / (gpus * nodes), abs=8)


def test_buckets_of_the_lower_stages(llama3_8b):
    """ZeRO-2 fills one bf16 bucket while the other travels, joined and widened; ZeRO-1 reduces where it lies."""
    two, one = (memory(llama3_8b, Setting(8, 4096, stage=stage)) for stage in (2, 1))
    assert two.parts["reduce bucket"] == 2 * 2 * REDUCE_BUCKET
    assert memory(llama3_8b, Setting(8, 4096, stage=2, overlap_comm=False)).parts["reduce bucket"] == 2 * REDUCE_BUCKET
    assert one.parts["reduce bucket"] == 0
    embedding = 128256 * 4096
    always = {stage: sum(states(llama3_8b, Setting(8, 4096, stage=stage)).values()) for stage in (1, 2)}
    assert two.phases["reduce"] - always[2] - 4 * REDUCE_BUCKET == 2 * embedding + (4 + 2) * REDUCE_BUCKET
    assert one.phases["reduce"] - always[1] == 2 * embedding
    assert {found.parts["gathered parameters"] for found in (one, two)} == {0}


@pytest.mark.parametrize(("stage", "on_gpu", "on_host"), [(1, 2 + 4, 12 / 8 + 6 / 8), (2, 2 + 4 / 8, 12 / 8 + 6 / 8)])
def test_gradients_of_the_lower_stages_stay_where_they_add_up(llama3_8b, stage, on_gpu, on_host):
    setting = Setting(8, 4096, stage=stage, offload_optimizer=True)
    assert sum(states(llama3_8b, setting).values()) == pytest.approx(on_gpu * llama3_8b.parameters)
    assert memory(llama3_8b, setting).host_total == pytest.approx(on_host * llama3_8b.parameters)


def test_saved_activations_of_a_layer_are_those_that_torch_saves():
    """Every tensor that autograd packs in one layer on the CPU, distinct storages once, weights left out."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from ropewalk.model import attention

    fields = {"vocab_size": 64, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
              "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip
    n = 40
    for kind, dtype, element in (
        ("llama", torch.float32, 4),
        ("llama", torch.bfloat16, 2),
        ("qwen3", torch.float32, 4),
    ):
        sizes = {}
        for layers in (2, 3):
            config = AutoConfig.for_model(kind, **{**fields, "num_hidden_layers": layers})
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention.register())
            weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
            kept: dict[int, torch.UntypedStorage] = {}

            def pack(tensor, weights=weights, kept=kept):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in weights:
                    kept[storage.data_ptr()] = storage  # held, so that no address comes twice
                return tensor

            documents = attention.Documents.from_cu_seqlens(torch.tensor([0, n]), torch.device("cpu"))
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                out = model.model(input_ids=torch.zeros(1, n, dtype=torch.int64), position_ids=torch.arange(n)[None],
                                  use_cache=False, documents=documents)  # fmt: skip
            sizes[layers] = sum(storage.nbytes() for storage in kept.values())
            del out
        shape = ModelShape.from_config({"model_type": kind, **fields}, kind)
        counted = n * sum(saved_per_token(shape, Setting(1, n, element=element, cuda=False)).values())
        assert sizes[3] - sizes[2] == pytest.approx(counted, rel=0.02)  # the norms' reciprocal deviations are left out


def test_a_gpu_holds_the_bucket_whole(llama3_8b):
    found = memory(llama3_8b, Setting(8, 65536))
    assert found.parts["reduce bucket"] == 4 * REDUCE_BUCKET
    assert found.parts["gathered parameters"] == 2 * LIVE_PARAMETERS
    assert found.parts["stored activations"] == 32 * 65536 * 4096 * 2
    assert found.device_total == max(found.phases.values())


def test_prolong_fits_on_eight_gpus_with_checkpointing_and_a_tiled_loss(llama3_8b):
    """ProLong (arXiv 2410.02660) trained Llama-3-8B at 64k on 8 x 80 GB, sequence-parallel 1."""
    assert memory(llama3_8b, Setting(8, 65536), Allowances()).device_total < HBM80 * GIB
    for without in ({"checkpointing": False}, {"loss_chunk": None}):
        assert memory(llama3_8b, Setting(8, 65536, **without), Allowances()).device_total > HBM80 * GIB


def test_torchtitans_peak_without_a_tiled_loss(llama3_8b):
    """Llama-3.1-8B, 64k, FSDP 4 x CP 2, 84.2 GiB reserved by torch (their benchmark of December 2024, table 2).

    Within 5%: their FSDP has no 1.9 GiB bucket, ours no float8 casts; neither counts the CUDA context.
    """
    found = memory(llama3_8b, Setting(8, 65536, sequence=2, loss_chunk=None))
    assert found.device_total == pytest.approx(84.2 * GIB, rel=0.05)


@pytest.mark.parametrize(("ranks", "length", "parameters"), [(1, 500_000, True), (8, 3_800_000, False)])
def test_alst_lengths_fit_with_tiling_and_offload(llama3_8b, ranks, length, parameters):
    """ALST (arXiv 2506.13996): Llama-8B on 80 GB H100s; on one GPU its configuration offloads the parameters, too."""
    tiled = {"offload_activations": True, "mlp_tile": 4096, "offload_optimizer": True, "offload_parameters": parameters}
    setting = Setting(ranks, length, sequence=ranks, **tiled)
    assert memory(llama3_8b, setting, Allowances()).device_total < HBM80 * GIB
    for without in ({"mlp_tile": None}, {"offload_activations": False}):
        assert memory(llama3_8b, Setting(ranks, length, sequence=ranks, **tiled | without)).device_total > HBM80 * GIB


@pytest.mark.parametrize(("length", "published", "ways"), [
    (65_000, 137.36, {"loss_chunk": None}),
    (300_000, 134.96, {"fused": True}),
    (650_000, 126.81, {"fused": True, "offload_activations": True}),
    (1_200_000, 136.15, {"fused": True, "offload_activations": True, "mlp_tile": 4096}),
])  # fmt: skip
def test_largest_contexts_of_one_h200(llama3_8b, length, published, ways):
    """Llama-3.1-8B, what ArcticTraining's configurations note beside max_length (run-h200-sp1-llama-8b-*.yml).

    Parameters and optimizer are on the host; Liger's kernels but in the first. They write GB: within 10% also if that
    is not GiB.
    """
    found = memory(llama3_8b, Setting(1, length, offload_optimizer=True, offload_parameters=True, **ways), Allowances())
    assert found.device_total / GIB == pytest.approx(published, rel=0.1)
    assert found.device_total / 1e9 == pytest.approx(published, rel=0.1)


def test_a_shared_row_holds_its_share(llama3_8b):
    """Two ranks a row at twice the length keep as many activations as one rank alone."""
    alone, shared = (memory(llama3_8b, Setting(8, n, sequence=s)) for n, s in ((32768, 1), (65536, 2)))
    assert shared.parts["stored activations"] == alone.parts["stored activations"]


def test_a_key_head_that_ranks_share_is_whole_on_each(llama3_8b):
    """32 ranks on 8 key/value heads, 2,048 tokens a rank: a head of 65,536 tokens each, where eight have 16,384.

    In bf16, of 128 channels, for keys and values: saved, their gradients, and once more as they are exchanged.
    """
    more = 2 * (65536 - 16384) * 128 * 2
    own, shared = (Setting(32, 2048 * n, sequence=n, mlp_tile=64) for n in (8, 32))  # at its peak in attention
    saved = [2048 * saved_per_token(llama3_8b, setting)["attention"] for setting in (own, shared)]
    assert saved[1] - saved[0] == more
    layer = [memory(llama3_8b, setting).phases["layer"] for setting in (own, shared)]
    assert layer[1] - layer[0] == 3 * more


def test_kept_attention_is_counted_once(llama3_8b):
    """A token and layer: 4,096 bf16 outputs and 32 fp32 logarithms of sums; the layer at work adds none of its own."""
    layer = 65536 * (2 * 4096 + 4 * 32)
    plain, kept = (memory(llama3_8b, Setting(8, 65536, keep_attention=keep)) for keep in (False, True))
    assert kept.phases["loss"] - plain.phases["loss"] == 32 * layer
    assert kept.phases["layer"] - plain.phases["layer"] == 31 * layer
    on_host = memory(llama3_8b, Setting(8, 65536, keep_attention=True, offload_activations=True))
    assert on_host.parts["stored activations"] == 2 * 65536 * 4096 * 2 + 32 * layer


def test_offloaded_activations_wait_in_host_memory(llama3_8b):
    found = memory(llama3_8b, Setting(8, 65536, offload_activations=True))
    assert found.host["stored activations"] == 32 * 65536 * 4096 * 2
    assert found.parts["stored activations"] == 2 * 65536 * 4096 * 2
    three_quarters = Setting(8, 49152, offload_activations=True)
    assert memory(llama3_8b, three_quarters).host == found.host  # torch pins 512 MiB for the 384 of a layer
    assert memory(llama3_8b, replace(three_quarters, cuda=False)).host["stored activations"] == 32 * 49152 * 4096 * 2
