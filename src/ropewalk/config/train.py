"""Training, and what is planned and submitted of it: ``train.py``, ``scripts/plan.py``, ``scripts/job.py options``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from ropewalk.config.groups import AnswersConfig, ClusterConfig, NeedleConfig, PathsConfig, RopeConfig

SUPPORTED_MODEL_TYPES = (
    "llama", "mistral", "qwen2", "qwen3", "smollm3", "ministral3", "olmo", "olmo2", "olmo3", "gemma3_text",
)  # fmt: skip
VISION_MODEL_TYPES = ("qwen2_vl", "qwen2_5_vl")  # of images and videos
DROPPED_FIELDS = ("sliding_window", "attention_dropout")
ATTENTION_CHOICES = ("auto", "fa4", "fa3", "fa2", "torch")


@dataclass
class ModelConfig:
    """The model that training starts from.

    ``theta``, ``head_dim`` and ``pretrained_length`` are declared here, so that a chain can be resolved before
    anything is loaded; they are checked against the checkpoint's own config.json when it is. Under ``start_from.run``
    the weights, the config and the pretrained length are that run's, and ``path`` is not read.
    """

    name: str = MISSING
    path: str | None = None  # hub id or Hugging Face directory; null: random weights of `architecture`
    revision: str | None = None
    # Transformers config fields: what is built where path is null; else what the planner counts with, checked at load.
    architecture: dict[str, Any] = field(default_factory=dict)
    theta: float = MISSING  # RoPE base of the pretrained model
    head_dim: int = MISSING  # channels of a head; head_dim / 2 rotary pairs
    pretrained_length: int = MISSING  # tokens it was last trained at: max_position_embeddings of its config.json
    # Of DROPPED_FIELDS, those of its config.json that are left out, in training and in what is exported.
    drop: list[str] = field(default_factory=list)
    train_tower: bool = True  # of a model of images and videos; false: its vision tower stays as it is


@dataclass
class DataConfig:
    """The packed stores that are read, and their proportions."""

    store: str = MISSING  # directory or URL (s3://, gs://, hf://, file://) of the packed store
    sequence_length: int = MISSING  # tokens; must equal the store's
    mixture: dict[str, float] = field(default_factory=dict)  # domain -> share of sequences; normalised
    curriculum: dict[int, dict[str, float]] = field(default_factory=dict)  # step -> the mixture from that step on
    # First length of a bucket, tokens (the first bucket's: 0) -> how often sequences whose longest document lies in it
    # come beside the domain's others; a domain keeps its share. Empty: all alike.
    length_weights: dict[int, float] = field(default_factory=dict)
    # More stores by name; their domains are NAME/DOMAIN. Shorter sequences that divide sequence_length are joined.
    stores: dict[str, str] = field(default_factory=dict)
    order_seed: int | None = None  # of the order alone; null: trainer.seed
    verify: bool = False  # hash every file of the store before training
    cache_dir: str | None = None  # where stores behind a URL are copied to; a disk of the node
    cache_gib: float = 256.0  # what their token files may take there


@dataclass
class TrainerConfig:
    """The optimization: batch, schedule, precision, and when to save."""

    seed: int = 0
    device: str = "cuda"  # cuda or cpu
    dtype: str = "bfloat16"  # of parameters and activations: bfloat16 or float32
    max_steps: int = MISSING
    global_batch_size: int = MISSING  # sequences a step, over all ranks
    micro_batch_size: int = 1  # sequences a rank holds at once
    learning_rate: float = MISSING  # peak
    schedule: str = "cosine"  # shape of the decay from the peak: cosine or linear
    min_lr_ratio: float = 0.1  # floor of the decay, as a share of the peak; reached at the last step
    warmup_ratio: float = 0.1  # share of max_steps
    decay_ratio: float = 1.0  # last share of max_steps, before which the rate stays at the peak; 0: it never decays
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    weight_decay: float = 0.1  # not on norms and biases
    gradient_clipping: float = 1.0  # global norm
    activation_checkpointing: bool = True
    offload_activations: bool = False  # checkpointed activations wait in host memory
    keep_attention: bool = False  # checkpointing computes all of a layer again but its attention
    mlp_chunk_size: int | None = None  # tokens whose MLP activations exist at once; null: all
    attention: str = "auto"  # kernel on a GPU: auto, fa4, fa3, fa2 or torch; auto takes the best that is installed
    deterministic: bool = False  # kernels that add up in one order; slower on a GPU, by how much is not measured
    compile: bool = False  # torch.compile of the norms, the MLP's gate and the rotation
    loss_chunk_size: int = 2048  # tokens whose logits exist at once
    z_loss: float = 0.0  # times logsumexp(logits)^2, added to each trained token's loss; 1e-4 is PaLM's
    log_every: int = 1  # steps
    peak_flops: float | None = None  # of one device, dense, for MFU; null: known for A100, H100 and H200 in bf16
    checkpoint_every: int | None = 250  # steps; the last step is saved too; null: nothing is saved
    save_in_background: bool = False  # from a copy in host memory, as large as the rank's part of the checkpoint
    keep_last: int | None = None  # newest checkpoints that are kept; null: all
    keep_every: int | None = None  # with keep_last, those at multiples of so many steps are kept too
    stop_after: int | None = None  # end this session after so many steps, saved; the schedule is untouched
    stop_before: str | None = None  # save and leave in time for this instant: seconds since 1970, or ISO 8601
    overfit_one_batch: bool = False  # every step sees step 0's batch
    profile_steps: int = 0  # steps recorded by torch.profiler into the run directory


@dataclass
class DeepSpeedConfig:
    """The choices in ZeRO; the rest is fixed in training/engine.py."""

    stage: int = 3
    param_persistence_threshold: int = 100_000  # parameters smaller than this stay whole on every rank
    overlap_comm: bool = True
    offload_optimizer: bool = False  # optimizer states in host memory


@dataclass
class ResumeConfig:
    """Going on from the newest committed checkpoint of the run directory."""

    enabled: bool = True  # false: a run directory that holds one is an error
    accept: list[str] = field(default_factory=list)  # contract entries that may differ, by name


@dataclass
class StartConfig:
    """A stage that begins with the weights of another run: a longer context, SFT. Its chain comes along."""

    run: str | None = None  # run directory (its newest committed checkpoint), or one checkpoint; null: as model says
    optimizer: str = "keep"  # keep: with its Adam moments and step count; drop: as at the beginning
    order: str = "restart"  # of the data, which must be the same for continue: from the step that the run was at


@dataclass
class GuardConfig:
    """Guards that keep a bad step from the weights. A refused step is counted, written to refused/, and passed over."""

    max_refused: int = 3  # steps refused in a row before the run stops
    spike_window: int | None = None  # steps that a loss is compared with; null: only what is not finite is refused
    spike_deviations: float = 6.0  # above the window's median, in standard deviations (1.4826 x MAD)
    spike_action: str = "skip"  # or stop
    stuck_multiple: float = 10.0  # of the median step; a step that takes longer is reported, with every rank's stack
    stuck_seconds: float = 60.0  # and at least so long
    # A micro batch that takes longer is reported, too, also before there is a median; collectives give up after 600 s.
    # A 64k sequence is half a minute's work of an H100, and the first one waits for the compiler.
    stuck_batch_seconds: float = 480.0


@dataclass
class InTrainingConfig:
    """A small evaluation every so many steps, on all ranks: loss by position and a needle grid.

    It runs under the spectrum that is trained. Neither the data order nor random state is touched.
    """

    every: int | None = None  # steps; after the last one, too; null: none
    documents: str | None = None  # held-out documents: a directory that prepare.py wrote, or one of text files
    lengths: list[int] = field(default_factory=list)  # tokens, up to data.sequence_length; empty: that one
    max_documents: int | None = 16
    seed: int = 0
    needle: NeedleConfig = field(default_factory=lambda: NeedleConfig(depths=[0.0, 0.5, 1.0], samples=2))
    answers: AnswersConfig = field(default_factory=AnswersConfig)


@dataclass
class ParallelConfig:
    """How ranks share the work beside data parallelism."""

    sequence: int = 1  # neighbouring ranks that share each row of tokens (Ulysses), and so its heads


@dataclass
class PrimaryConfig:
    """The primary family of a study, declared before its runs: a report decides what it names and nothing else.

    Runs record it, and a run that goes on must declare what it began with. One number a seed: the row of the results
    table with this task, metric, length and test-time scaling; of several lengths, the mean of their rows.
    """

    pairs: list[list[str]] = field(default_factory=list)  # [arm, the arm it is compared with], each a rope.name
    task: str = "loss_at_length"
    metric: str = "nll"
    length: Any = None  # tokens, or a list of lengths
    test_time_scaling: str | None = None  # as the table prints it; null: whichever was measured, if only one was
    difference: float | None = None  # smallest of interest, in the table's unit: nats, or points of a percentage


@dataclass
class TrackerConfig:
    """The tracker, which gets the metrics beside the run's own metrics.jsonl."""

    name: str = "wandb"  # wandb, trackio or none
    project: str = "ropewalk"
    group: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass
class TrainConfig:
    """``python train.py``."""

    run_name: str = MISSING
    run_dir: str = "${paths.output_dir}/${run_name}"
    model: ModelConfig = field(default_factory=ModelConfig)
    rope: RopeConfig = field(default_factory=RopeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    start_from: StartConfig = field(default_factory=StartConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    guards: GuardConfig = field(default_factory=GuardConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    evaluation: InTrainingConfig = field(default_factory=InTrainingConfig)
    primary: PrimaryConfig = field(default_factory=PrimaryConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)  # where it runs; changes no number
    baseline: str | None = None  # run directory that it is compared with; its first lines say what differs
    paths: PathsConfig = field(default_factory=PathsConfig)


@dataclass
class AssumptionConfig:
    """Numbers that the planner cannot compute. Each is an assumption to replace by a measurement of your own."""

    # Share of the peak that is reached, counting causal attention over whole rows; null: by the speeds of the kernels.
    utilisation: float | None = None
    step_overhead: float = 0.0  # seconds a step beside its micro batches
    context_gib: float = 0.6  # of each GPU: CUDA context, kernels, cuBLAS workspace
    nccl_gib: float = 1.5  # of each GPU, where there are several
    fragmentation: float = 0.05  # of what is allocated and freed within a step
    hash_gb_s: float = 1.0  # that one rank hashes of its checkpoint files


@dataclass
class PlanConfig(TrainConfig):
    """``python scripts/plan.py``: a training run, and the machines that it is planned for."""

    nodes: int = 1
    assume: AssumptionConfig = field(default_factory=AssumptionConfig)
    kv_lengths: list[int] = field(default_factory=lambda: [8192, 65536, 131072, 262144])  # tokens; and the run's
    output: str | None = None  # JSON file of the whole plan
    print: str | None = None  # this entry of the plan and nothing else, e.g. lead_seconds; exits with 0
    brief: bool = False  # one line instead of a page
    advisory: bool = False  # exit with 0 also where the run does not fit


@dataclass
class NoiseConfig(PlanConfig):
    """``python scripts/noise.py``: noise between runs that differ in one thing that should not matter.

    One of ``runs``, ``replicate`` and ``spread`` says what is done; the training run is what ``replicate`` branches
    and what the planner counts.
    """

    runs: list[str] = field(default_factory=list)  # run directories to measure
    replicate: str | None = None  # start branches that differ in seed, data_order or horizon alone
    branches: int = 3  # of `replicate`, each of trainer.max_steps steps
    horizons: list[int] = field(default_factory=list)  # steps of the schedules; empty: 1, 2, ... x trainer.max_steps
    launch: str = "python train.py"  # what starts a branch: torchrun ... train.py, or sbatch slurm/train_64k.sh
    spread: float | None = None  # standard deviation over seeds of the paired difference: plan, and measure nothing
    difference: float | None = None  # that is to be decided, in the unit of `spread`
    pairs: int = 1  # in the primary family
    seeds: list[int] = field(default_factory=lambda: [3, 5, 8, 10])  # an arm, whose detectable differences are shown
    output: str | None = None  # directory for noise.csv and noise.json; null: only printed


@dataclass
class RegimeConfig:
    """One way in which a study trains its arms."""

    runs: str = MISSING  # directory that holds a run directory for each arm and seed
    trained: int = MISSING  # tokens
    lengths: list[int] = MISSING  # tokens; the declared number is the mean over them


@dataclass
class BaseConfig:
    """The score that a seed's base must reach for the seed to count; nothing else leaves a seed out."""

    regime: str = MISSING
    arm: str = MISSING  # rope.name
    task: str = "answers"
    metric: str = "exact_match"
    length: int = MISSING  # tokens
    at_least: float = MISSING  # percent


@dataclass
class StudyPlan:
    """plan.yaml of a study, declared before its runs. A decision is over all pairs in all regimes."""

    primary: PrimaryConfig = field(default_factory=PrimaryConfig)
    regimes: dict[str, RegimeConfig] = field(default_factory=dict)
    base: BaseConfig = field(default_factory=BaseConfig)
    seeds: int = MISSING  # accepted seeds an arm


@dataclass
class StudyConfig:
    """``python scripts/study.py``."""

    plan: str = MISSING  # plan.yaml
    results: str | None = None  # directory of results.csv, runs.csv and the figure; null: that of the plan
    collect: bool = False  # first write results.csv and runs.csv from the runs on this machine
    seeds: str | None = None  # print seeds alone: next (bases to be tried), accepted
    paths: PathsConfig = field(default_factory=PathsConfig)


@dataclass
class SbatchConfig:
    """Options in place of the #SBATCH lines of a training script."""

    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    nodes: int | None = None  # null: as the script says
    lead_seconds: int | None = None  # of the warning before the time limit; null: as the script says
    paths: PathsConfig = field(default_factory=PathsConfig)
