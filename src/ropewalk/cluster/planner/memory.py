"""Memory of one rank, phase by phase. docs/planner.md has the same sums in words, with their sources.

b is the bytes of a parameter or activation (2 in bf16, 4 in fp32), n the tokens that a rank holds, h the width of the
residual stream, q and k the channels of all query and of all key heads, i the width inside the MLP, V the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ropewalk.cluster.planner.shape import ModelShape

GIB = 2**30
FP32 = 4
ADAM = 8  # two fp32 moments
REDUCE_BUCKET = 500_000_000  # elements; DeepSpeed's reduce_bucket_size
LIVE_PARAMETERS = 1_000_000_000  # DeepSpeed's stage3_max_live_parameters and stage3_max_reuse_distance
SUB_GROUP = 1_000_000_000  # parameters that the optimizer steps at once; DeepSpeed's sub_group_size
HELD_LAYERS = 2  # layer inputs on the GPU while older ones travel to the host


@dataclass(frozen=True)
class Setting:
    """The settings that the memory of a rank depends on, beside the model's shape.

    Attributes:
        ranks: of the run.
        length: tokens of a sequence.
        micro_batch: sequences at once.
        sequence: ranks that share a row.
        element: bytes of a parameter and of an activation: 2 or 4.
        stage: of ZeRO.
        overlap_comm: ZeRO-2 fills one bucket while the other travels.
        cuda: whether the ranks are GPUs.
        checkpointing: only each layer's input is kept, the rest computed again.
        offload_activations: those inputs wait in host memory.
        keep_attention: the attention's output stays on the device beside them.
        mlp_tile: tokens that the MLP works on at once; None: all.
        fused: each norm and the gate are one kernel that keeps its inputs alone, as Liger's do; not for fp32.
        loss_chunk: tokens whose logits exist at once; None: all, through stock cross entropy.
        offload_optimizer: master weights, moments and gradients in host memory.
        offload_parameters: the parameters' shares, too.
        save_in_background: a checkpoint is written from a copy in host memory.
    """

    ranks: int
    length: int
    micro_batch: int = 1
    sequence: int = 1
    element: int = 2
    stage: int = 3
    overlap_comm: bool = True
    cuda: bool = True
    checkpointing: bool = True
    offload_activations: bool = False
    keep_attention: bool = False
    mlp_tile: int | None = None
    fused: bool = False
    loss_chunk: int | None = 2048
    offload_optimizer: bool = False
    offload_parameters: bool = False
    save_in_background: bool = False

    @property
    def tokens(self) -> int:
        """Tokens that a rank holds at once."""
        return self.micro_batch * self.length // self.sequence

    @property
    def adds_up_whole(self) -> bool:
        """True under ZeRO-1 in bf16, whose gradients are added up in place and travel without a bucket."""
        return self.stage == 1 and self.element < FP32 and not self.offload_optimizer

    @property
    def even(self) -> bool:
        """True if the ranks that share a micro batch, laid in one row, get as many tokens each."""
        return self.micro_batch * self.length % self.sequence == 0


@dataclass(frozen=True)
class Allowances:
    """Memory that no formula gives. GiB, and a share of what is allocated and freed."""

    context: float = 0.6  # CUDA context, kernels, cuBLAS workspace
    collectives: float = 1.5  # NCCL's buffers; none where there is one rank
    fragmentation: float = 0.05  # of everything but the states, lost between the allocator's blocks


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at its worst moment.

    Attributes:
        parts: by name, on the device; their sum is the peak.
        phase: the moment: loss, layer (backward of the last one), reduce, step.
        host: by name, in host memory.
        phases: device bytes of every phase.
    """

    parts: dict[str, float]
    phase: str
    host: dict[str, float] = field(default_factory=dict)
    phases: dict[str, float] = field(default_factory=dict)

    @property
    def device_total(self) -> float:
        """Bytes on the device."""
        return sum(self.parts.values())

    @property
    def host_total(self) -> float:
        """Bytes in host memory, for this rank."""
        return sum(self.host.values())


def memory(shape: ModelShape, setting: Setting, allowances: Allowances | None = None) -> Memory:
    """Peak memory of one rank over a training step; without ``allowances`` what the tensors take and no more."""
    held = states(shape, setting)
    phases = {
        "loss": _loss_phase(shape, setting),
        "layer": _layer_phase(shape, setting),
        "reduce": _reduce_phase(shape, setting),
        "step": _step_phase(shape, setting),
    }
    bucket = {"reduce bucket": _bucket(shape, setting)}
    phases = {  # ZeRO-1 and -2 free the bucket before they step
        name: of if name == "step" and setting.stage < 3 else {**bucket, **of} for name, of in phases.items()
    }
    worst = max(phases, key=lambda name: sum(phases[name].values()))
    parts = {**held, **phases[worst]}
    if allowances is not None:
        parts["context and NCCL"] = _fixed(setting, allowances)
        parts["fragmentation"] = allowances.fragmentation * sum(phases[worst].values())
    totals = {name: sum(held.values()) + sum(of.values()) for name, of in phases.items()}
    return Memory(parts, worst, _host(shape, setting), totals)


def states(shape: ModelShape, setting: Setting) -> dict[str, float]:
    """Parameters, gradients and optimizer of one rank on the device (ZeRO, arXiv 1910.02054, section 5).

    Gradients add up in fp32. The optimizer holds an fp32 master copy, of fp32 parameters too (DeepSpeed 0.19.8 would
    share them, but compares a torch.device with its name), and two moments. Where it is offloaded, gradients add up on
    the host under ZeRO-3, and still on the device under ZeRO-1 and -2.
    """
    whole, share = shape.parameters, shape.parameters / setting.ranks
    parameters = share if setting.stage == 3 else whole
    gradients = share if setting.stage >= 2 else whole
    offloaded = setting.offload_optimizer
    return {
        "parameters": 0.0 if setting.offload_parameters else setting.element * parameters,
        "gradients": 0.0 if offloaded and setting.stage == 3 else FP32 * gradients,
        "optimizer": 0.0 if offloaded else (FP32 + ADAM) * share,
    }


def saved_per_token(shape: ModelShape, setting: Setting) -> dict[str, float]:
    """Bytes a token that the backward pass of one layer needs, as transformers' Llama writes its operations."""
    b, h = setting.element, shape.hidden
    norm = FP32 * h + 2 * b * h  # fp32 input, normalised, output
    # fused: input and output; the first one's input is the layer's own
    norms = shape.norms * norm if not setting.fused else (2 * shape.norms - 1) * b * h
    attention = b * (shape.query + 2 * attended_key(shape, setting)) + _attention_output(shape, setting)
    if shape.head_normed:
        attention += (FP32 + b) * (shape.query + shape.key)
    widths = 3 if setting.fused else 4  # gate, up, product, and the activated gate
    mlp = widths * b * shape.intermediate if setting.mlp_tile is None else 0  # a tiled one keeps its input alone
    return {"norms": norms, "attention": attention, "mlp": mlp}


def attended_key(shape: ModelShape, setting: Setting) -> int:
    """Key channels that a rank attends to, for each of its own tokens; as many of the values.

    More ranks than key/value heads share a row: each has a whole head of all tokens, which other ranks hold, too.
    """
    return shape.head_dim * max(shape.kv_heads, setting.sequence)


def _attention_output(shape: ModelShape, setting: Setting) -> float:
    """Bytes a token of one layer's attention: its output and the logarithms of its sums."""
    outputs = 1 if setting.cuda else 2  # documents are joined on the CPU, which copies what each gave
    return outputs * setting.element * shape.query + FP32 * shape.heads


def _boundaries(shape: ModelShape, setting: Setting) -> float:
    """Memory kept by the layers before the one at work."""
    if not setting.checkpointing:
        return shape.layers * setting.tokens * sum(saved_per_token(shape, setting).values())
    inputs = min(HELD_LAYERS, shape.layers) if setting.offload_activations else shape.layers
    kept = shape.layers * _attention_output(shape, setting) if setting.keep_attention else 0.0
    of_tower = setting.element * shape.tower.kept if shape.tower else 0
    return setting.tokens * (inputs * setting.element * shape.hidden + kept + of_tower)


def _loss_phase(shape: ModelShape, setting: Setting) -> dict[str, float]:
    """The end of the forward pass: final norm, and the loss with both its gradients."""
    b, n, h, head = setting.element, setting.tokens, shape.hidden, shape.embedding
    final_norm = n * (FP32 * h + 2 * b * h)
    if setting.loss_chunk is None:  # logits, their fp32 copy, log-softmax, its gradient
        logits = n * shape.vocabulary * ((b if b < FP32 else 0) + 3 * FP32)
        gradients = float(b * head)
    else:  # a chunk's logits, the exponentials of its log-sum, what is left of the chunk before; both gradients
        chunks = 2 if n <= setting.loss_chunk else 3
        logits = min(setting.loss_chunk, n) * shape.vocabulary * chunks * FP32
        gradients = n * b * h + (FP32 + (FP32 if setting.cuda else b)) * head  # whole, and what a chunk adds to it
    return {
        "stored activations": _boundaries(shape, setting),
        "working activations": float(final_norm),
        "logits and loss": float(logits + gradients),
        "gathered parameters": _gathered(shape, setting, head=shape.embedding),
    }


def _layer_phase(shape: ModelShape, setting: Setting) -> dict[str, float]:
    """Backward of the last layer, while the inputs of all are still there."""
    b, n, h, i = setting.element, setting.tokens, shape.hidden, shape.intermediate
    saved = saved_per_token(shape, setting)
    recomputed = sum(saved.values()) - (FP32 * h if b == FP32 else 0)  # the fp32 input is the stored one
    recomputed -= _attention_output(shape, setting) if setting.keep_attention else 0  # and that is, too
    again = n * recomputed if setting.checkpointing else 0.0
    # at the product of gate and up: both, the activated gate, and the gradients of product, gate and up
    # a fused gate writes its gradients over its inputs, so that the product's gradient is all there is beside them
    if setting.mlp_tile is None:
        in_mlp = n * b * h + (4 if setting.fused else 6) * b * i * n - n * saved["mlp"]
        weight_gradient = b * h * i
    else:  # so for one tile; beside it the gradients of the output and, in pieces and joined, of the input
        in_mlp = 3 * n * b * h + 6 * b * i * min(n, setting.mlp_tile)
        weight_gradient = (FP32 + b) * 3 * h * i  # of all three weights, added up in fp32
    # gradients of output, queries, keys and values; flash attention sums the queries' in fp32
    key = attended_key(shape, setting)
    in_attention = n * (b * (2 * shape.query + 2 * key) + 2 * b * h) - n * saved["mlp"] - n * saved["norms"] / 2
    workspace = 0.0
    if setting.cuda:
        workspace += n * (FP32 * shape.query + 2 * FP32 * shape.heads)
    if setting.sequence > 1:  # what is sent and what arrives
        workspace += n * b * (shape.query + 2 * key)
    at_mlp = in_mlp >= in_attention + workspace
    weight_gradient = max(weight_gradient, b * shape.embedding if setting.loss_chunk is not None else 0)
    return {
        "stored activations": _boundaries(shape, setting),
        "working activations": max(0.0, again + (in_mlp if at_mlp else in_attention)),
        "attention workspace": 0.0 if at_mlp else workspace,
        "weight gradients": float(weight_gradient) + _flushed(shape, setting),
        "gathered parameters": _gathered(shape, setting),
    }


def _reduce_phase(shape: ModelShape, setting: Setting) -> dict[str, float]:
    """The end of the backward pass: the embedding's gradient, and the bucket's contents laid out for the ranks.

    gloo scatters a copy of what it is given, where there are several ranks; it adds up where the values lie.
    """
    laid_out = _laid_out(setting, min(REDUCE_BUCKET, shape.parameters))
    if setting.adds_up_whole and shape.parameters > REDUCE_BUCKET:
        laid_out = 0.0  # a vector past the bucket's size is reduced where it lies
    copies = not setting.cuda and setting.ranks > 1 and setting.stage == 3
    copied = FP32 * min(REDUCE_BUCKET, shape.parameters) if copies else 0
    return {
        "weight gradients": float(setting.element * shape.embedding + laid_out + copied),
        "gathered parameters": _gathered(shape, setting),
    }


def _step_phase(shape: ModelShape, setting: Setting) -> dict[str, float]:
    """The optimizer: gradients laid flat, and on the CPU the temporaries of an unfused AdamW.

    ZeRO-3 steps one sub-group at a time. In bf16 the gradients of ZeRO-1 and -2 are flat already.
    """
    if setting.offload_optimizer:
        return {"weight gradients": 0.0}
    share = shape.parameters / setting.ranks
    group = min(SUB_GROUP, share) if setting.stage == 3 else share
    is_flat = setting.stage < 3 and setting.element < FP32
    temporaries = 0 if setting.cuda else 2 * FP32  # the square root, and the quotient beside it
    return {"weight gradients": 0.0 if is_flat else FP32 * group, "optimizer temporaries": temporaries * group}


def _bucket(shape: ModelShape, setting: Setting) -> float:
    """DeepSpeed's flat bucket. CUDA allocates it whole; on the CPU a page counts once it was written to.

    It holds fp32 under ZeRO-3, and the gradients as they come under ZeRO-2, which has a second one to overlap with.
    Under ZeRO-1 in fp32 the gradients move into it, and the rank's own part out of it again.
    """
    if setting.adds_up_whole:
        return 0.0
    if setting.stage == 1 and not setting.cuda:
        return FP32 * shape.parameters / setting.ranks
    element = setting.element if setting.stage == 2 else FP32
    buckets = 2 if setting.stage < 3 and setting.overlap_comm else 1
    size = buckets * REDUCE_BUCKET
    return float(element * (size if setting.cuda else min(size, shape.parameters)))


def _flushed(shape: ModelShape, setting: Setting) -> float:
    """The copy of a full bucket, where it fills before the backward pass is over."""
    if setting.adds_up_whole or shape.parameters <= REDUCE_BUCKET:
        return 0.0
    return _laid_out(setting, REDUCE_BUCKET)


def _laid_out(setting: Setting, elements: float) -> float:
    """Bytes that a reduction makes of the bucket; ZeRO-2 in bf16 joins the ranks' parts, and then widens them."""
    widened = setting.element if setting.stage == 2 and setting.element < FP32 else 0
    return float((FP32 + widened) * elements)


def _gathered(shape: ModelShape, setting: Setting, head: int = 0) -> float:
    """Whole parameters at the turn from forward to backward, which keeps what it needs again soon.

    DeepSpeed gathers ahead of use up to LIVE_PARAMETERS, and what a module needs on top of them: the loss its head.
    """
    if setting.stage < 3 or (setting.ranks == 1 and not setting.offload_parameters):
        return 0.0
    return float(setting.element * min(LIVE_PARAMETERS + head, shape.parameters))


def _fixed(setting: Setting, allowances: Allowances) -> float:
    if not setting.cuda:
        return 0.0
    return GIB * (allowances.context + (allowances.collectives if setting.ranks > 1 else 0.0))


def _host(shape: ModelShape, setting: Setting) -> dict[str, float]:
    """Host memory of one rank. Offloaded gradients of ZeRO-3 exist twice: added up, and laid flat for the optimizer.

    Those of ZeRO-1 and -2 come once a step, and the new weights go back through a copy.
    """
    share, host = shape.parameters / setting.ranks, {}
    if setting.offload_optimizer:
        host["optimizer"] = (FP32 + ADAM) * share
        host["gradients"] = (2 * FP32 if setting.stage == 3 else FP32 + setting.element) * share
    if setting.offload_parameters:
        host["parameters"] = setting.element * share
    if setting.checkpointing and setting.offload_activations:
        block = setting.tokens * setting.element * shape.hidden
        if setting.cuda:  # torch rounds pinned memory up to a power of two (ATen/core/CachingHostAllocator.h)
            block = 1 << (block - 1).bit_length()
        host["stored activations"] = float(shape.layers * block)
    if setting.save_in_background:
        # rank 0's is the larger one under ZeRO-1 and -2, as it saves the whole weights, too
        host["checkpoint"] = (FP32 + ADAM) * share + (setting.element * shape.parameters if setting.stage < 3 else 0)
    return host
