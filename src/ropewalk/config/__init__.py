"""Typed configuration: one dataclass for each Hydra group, and the rules that no type can state.

Import classes from their module. Importing them loads neither torch nor transformers, so composing stays fast.
"""

from pathlib import Path

from ropewalk.config import analysis, data, evaluation, export, groups, train

_PACKAGE = Path(__file__).resolve().parents[1]
# In a wheel the package holds the checkout's configs/, scripts/ and data_prep/.
CONFIG_DIR = next(root / "configs" for root in (_PACKAGE, _PACKAGE.parents[1]) if (root / "configs").is_dir())

# the dataclass that each command composes: configs/NAME.yaml
SCHEMAS: dict[str, type] = {
    "train": train.TrainConfig,
    "plan": train.PlanConfig,
    "noise": train.NoiseConfig,
    "study": train.StudyConfig,
    "sbatch": train.SbatchConfig,
    "prepare": data.PrepareConfig,
    "prepare_video": data.PrepareVideoConfig,
    "prepare_vniah": data.PrepareVniahConfig,
    "gather": data.GatherConfig,
    "convert_mds": data.ConvertConfig,
    "inspect_store": data.InspectStoreConfig,
    "evaluate": evaluation.EvaluateConfig,
    "validate": evaluation.ValidateConfig,
    "generate": evaluation.GenerateConfig,
    "key_tokens": evaluation.KeyTokensConfig,
    "compare": evaluation.CompareConfig,
    "dashboard": evaluation.DashboardConfig,
    "export": export.ExportConfig,
    "check_export": export.CheckExportConfig,
    "repair": export.RepairConfig,
    "advise": analysis.AdviseConfig,
    "inspect": analysis.InspectConfig,
    "figures": analysis.FiguresConfig,
    "geometry": analysis.GeometryConfig,
}


def schema_class(name: str) -> type | None:
    """The dataclass of that name, of a command or of a group; None: there is none."""
    modules = (groups, train, data, evaluation, export, analysis)
    return next((vars(module)[name] for module in modules if name in vars(module)), None)
