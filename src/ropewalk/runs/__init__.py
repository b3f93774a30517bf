"""Run directories: their files, record, contract and metrics, read and written without torch."""

from ropewalk.runs.directory import JobRecord, RunDirectory

__all__ = ["JobRecord", "RunDirectory"]
