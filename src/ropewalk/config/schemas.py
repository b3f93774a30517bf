"""Which dataclass each command composes."""

from __future__ import annotations

from ropewalk.config.analysis import AdviseConfig, FiguresConfig, GeometryConfig, InspectConfig
from ropewalk.config.dashboard import DashboardConfig
from ropewalk.config.data import ConvertConfig, GatherConfig, InspectStoreConfig, PrepareConfig
from ropewalk.config.evaluation import CompareConfig, EvaluateConfig, ValidateConfig
from ropewalk.config.export import CheckExportConfig, ExportConfig, RepairConfig
from ropewalk.config.plan import PlanConfig
from ropewalk.config.sbatch import SbatchConfig
from ropewalk.config.train import TrainConfig

SCHEMAS: dict[str, type] = {
    "train": TrainConfig,
    "plan": PlanConfig,
    "prepare": PrepareConfig,
    "gather": GatherConfig,
    "convert_mds": ConvertConfig,
    "inspect_store": InspectStoreConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
    "check_export": CheckExportConfig,
    "repair": RepairConfig,
    "compare": CompareConfig,
    "dashboard": DashboardConfig,
    "advise": AdviseConfig,
    "inspect": InspectConfig,
    "figures": FiguresConfig,
    "geometry": GeometryConfig,
    "validate": ValidateConfig,
    "sbatch": SbatchConfig,
}
