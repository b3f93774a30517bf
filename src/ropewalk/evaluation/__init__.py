"""Evaluation: loss by position and the needle grid, into one tidy results table."""

from ropewalk.evaluation.in_training import TrainingEvaluation
from ropewalk.evaluation.results import paired_difference, read_document_losses, read_record, read_results
from ropewalk.evaluation.run import evaluate
from ropewalk.evaluation.validate import validate

__all__ = [
    "TrainingEvaluation",
    "evaluate",
    "paired_difference",
    "read_document_losses",
    "read_record",
    "read_results",
    "validate",
]
