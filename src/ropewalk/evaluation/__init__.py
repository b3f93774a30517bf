"""Evaluation: every harness, from loss by position to HELMET, into one results table."""

from ropewalk.evaluation.bootstrap import paired_difference
from ropewalk.evaluation.generate import generate
from ropewalk.evaluation.in_training import TrainingEvaluation
from ropewalk.evaluation.results import (
    averages,
    not_finite,
    read_document_losses,
    read_record,
    read_results,
)
from ropewalk.evaluation.suites import evaluate
from ropewalk.evaluation.validate import validate

__all__ = [
    "TrainingEvaluation",
    "averages",
    "evaluate",
    "generate",
    "not_finite",
    "paired_difference",
    "read_document_losses",
    "read_record",
    "read_results",
    "validate",
]
