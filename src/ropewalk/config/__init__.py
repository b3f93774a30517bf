"""The typed configuration: one dataclass for each Hydra group, and the rules that no type can state.

Importing it loads neither torch nor transformers, so composing a configuration stays fast.
"""

from ropewalk.config.analysis import AdviseConfig, FiguresConfig, GeometryConfig, InspectConfig
from ropewalk.config.checks import existing_directory, one_of, require_device
from ropewalk.config.cluster import ClusterConfig
from ropewalk.config.dashboard import DashboardConfig
from ropewalk.config.data import (
    ConvertConfig,
    CorpusConfig,
    DomainConfig,
    ExecutorConfig,
    GatherConfig,
    InspectStoreConfig,
    PrepareConfig,
    SourceConfig,
)
from ropewalk.config.evaluation import (
    CompareConfig,
    EvaluateConfig,
    HelmetConfig,
    NeedleConfig,
    SuiteConfig,
    ValidateConfig,
)
from ropewalk.config.export import CheckExportConfig, EnginesConfig, ExportConfig, RepairConfig
from ropewalk.config.groups import ModelPath, PathsConfig, RopeConfig, TestTimeConfig
from ropewalk.config.plan import AssumptionConfig, PlanConfig
from ropewalk.config.rules import STORE_MEND, instant, is_remote, validate_train
from ropewalk.config.sbatch import SbatchConfig
from ropewalk.config.schemas import SCHEMAS
from ropewalk.config.slurm import SlurmConfig
from ropewalk.config.train import (
    SUPPORTED_MODEL_TYPES,
    DataConfig,
    DeepSpeedConfig,
    GuardConfig,
    InTrainingConfig,
    ModelConfig,
    ParallelConfig,
    ResumeConfig,
    StartConfig,
    TrackerConfig,
    TrainConfig,
    TrainerConfig,
)

__all__ = [
    "SCHEMAS",
    "STORE_MEND",
    "SUPPORTED_MODEL_TYPES",
    "AdviseConfig",
    "AssumptionConfig",
    "CheckExportConfig",
    "ClusterConfig",
    "CompareConfig",
    "ConvertConfig",
    "CorpusConfig",
    "DashboardConfig",
    "DataConfig",
    "DeepSpeedConfig",
    "DomainConfig",
    "EnginesConfig",
    "EvaluateConfig",
    "ExecutorConfig",
    "ExportConfig",
    "FiguresConfig",
    "GatherConfig",
    "GeometryConfig",
    "GuardConfig",
    "HelmetConfig",
    "InTrainingConfig",
    "InspectConfig",
    "InspectStoreConfig",
    "ModelConfig",
    "ModelPath",
    "NeedleConfig",
    "ParallelConfig",
    "PathsConfig",
    "PlanConfig",
    "PrepareConfig",
    "RepairConfig",
    "ResumeConfig",
    "RopeConfig",
    "SbatchConfig",
    "SlurmConfig",
    "SourceConfig",
    "StartConfig",
    "SuiteConfig",
    "TestTimeConfig",
    "TrackerConfig",
    "TrainConfig",
    "TrainerConfig",
    "ValidateConfig",
    "existing_directory",
    "instant",
    "is_remote",
    "one_of",
    "require_device",
    "validate_train",
]
