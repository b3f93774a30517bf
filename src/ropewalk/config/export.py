"""Export: ``scripts/export.py``."""

from __future__ import annotations

from dataclasses import dataclass, field

from ropewalk.config.groups import ModelPath, PathsConfig, RopeConfig, TestTimeConfig


@dataclass
class EnginesConfig:
    """Interpreters of engines that live in environments of their own; null: looked for beside this package."""

    vllm: str | None = None
    sglang: str | None = None


@dataclass
class AverageConfig:
    """Checkpoints whose mean is exported in place of one; members are chosen by one of the three, or there is no mean.

    Members must have one chain, model and tokenizer, and must have begun with the same weights.
    """

    last: int | None = None  # of the run: ``checkpoint`` and the newest before it, so many in all
    steps: list[int] = field(default_factory=list)  # of the run: those after so many steps
    runs: list[str] = field(default_factory=list)  # beside ``checkpoint``: the newest of other runs, or checkpoints

    def suffix(self) -> str:
        """The end of the export's name; empty: there is no mean."""
        members = self.last or len(self.steps) or (len(self.runs) + 1 if self.runs else 0)
        return f"-average{members}" if members else ""


@dataclass
class ExportConfig:
    """``python scripts/export.py``: one of ``checkpoint`` and ``model``."""

    checkpoint: str | None = None  # training checkpoint, or run directory for its newest
    average: AverageConfig = field(default_factory=AverageConfig)
    model: ModelPath = field(
        default_factory=lambda: ModelPath("")
    )  # Hugging Face directory or hub id, not trained here
    rope: RopeConfig = field(default_factory=RopeConfig)  # applied to `model` without training
    test_time: TestTimeConfig = field(default_factory=TestTimeConfig)  # folded in; the same at every length
    to: str = "hf"  # hf, gguf or all
    output: str | None = None  # null: <run directory>/export, or <paths.output_dir>/exports/<model>
    dtype: str | None = None  # of the weights; null: the dtype that was trained in, or each weight's own
    gguf: str | None = None  # f32, f16, bf16, q8_0 for the file's matrices; null: as dtype
    verify: bool = True
    verify_tokens: int | None = None  # null: past the original length
    engines: EnginesConfig = field(default_factory=EnginesConfig)
    license: str | None = None  # of the base model, for the card; null: what the base's own card says
    push_to_hub: str | None = None  # repository, owner/name
    private: bool = True  # of a repository that is made by the push
    overwrite: bool = False  # replace an earlier export
    paths: PathsConfig = field(default_factory=PathsConfig)


@dataclass
class CheckExportConfig:
    """``python scripts/export.py check DIR``."""

    model: ModelPath = field(default_factory=ModelPath)  # Hugging Face directory or GGUF file


@dataclass
class RepairConfig:
    """``python scripts/export.py repair``: a checkpoint that was trained with a method that its config does not say."""

    model: ModelPath = field(default_factory=ModelPath)  # Hugging Face directory or hub id
    rope: RopeConfig = field(default_factory=RopeConfig)  # what it was trained with
    pretrained_length: int | None = None  # tokens its base model was trained at; null: as the config says
    output: str | None = None  # new directory; null: only with in_place
    in_place: bool = False  # change config.json where it lies and keep the old one as config.json.before-repair
    paths: PathsConfig = field(default_factory=PathsConfig)
