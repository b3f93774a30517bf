"""Planning: ``scripts/plan.py``."""

from __future__ import annotations

from dataclasses import dataclass, field

from ropewalk.config.train import TrainConfig


@dataclass
class AssumptionConfig:
    """What the planner cannot compute. Each is an assumption to replace by a measurement of your own."""

    utilisation: float = 0.28  # share of the peak that is reached, counting causal attention over whole rows
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
