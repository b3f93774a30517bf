"""Provenance: commit and changes of the source tree, package versions, the environment and settings without secrets."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "ropewalk",
    "torch",
    "transformers",
    "deepspeed",
    "accelerate",
    "datasets",
    "tokenizers",
    "numpy",
    "flash-attn",
)
# Variables that change what a job does. Everything else stays out: keys and tokens live in the environment.
RECORDED = re.compile(
    r"(SLURM_|SLURMD_|NCCL_|CUDA_|OMP_|MKL_|TORCH_|PYTORCH_|TRITON_|DS_|HYDRA_|GLOO_|TP_)\w+"
    r"|HF_HOME|HF_HUB_OFFLINE|WANDB_MODE|MASTER_ADDR|MASTER_PORT|TMPDIR|LD_LIBRARY_PATH|HOSTNAME"
)
SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSW|CREDENTIAL|JWT|AUTH|COOKIE", re.IGNORECASE)
MASKED = "***"
# In scripts and patches: a name with such a part, then what separates it from a literal value on the same line. A name
# in capitals is a variable of the environment, and any value of it is masked. Of other names only values of letters
# and digits are, so that `token: str` and `key = digest(text)` stay as they are.
_PART = r"(?:keys?|apikey|tokens?|secrets?|passw\w*|credentials?|jwt|auth|authorization|cookies?|pat)"
_NAME = rf"(?<![A-Za-z0-9])(?:[A-Za-z0-9]+[_-])*{_PART}(?:[_-][A-Za-z0-9]+)*(?![A-Za-z0-9_-])"
_BETWEEN = r"(?:[\"'\])]*[ \t]*[:=]|[\"'][ \t]*,)[ \t]*[\"']?(?:bearer[ \t]+)?"
_LITERAL = r"[^\s\"',;()\[\]{}$]"
ASSIGNED = re.compile(
    rf"((?i:{_NAME}{_BETWEEN}))(?=\S*\d)(?=\S*[A-Za-z])({_LITERAL}{{8,}}+)(?!\()"
    rf"|((?<![a-z])(?=[A-Z0-9_-]+\b)(?i:{_NAME}{_BETWEEN}))(?=\S*[A-Za-z])({_LITERAL}++)(?!\()"
)
# Prefixes of keys that some services issue.
ISSUED = re.compile(r"\b(?:hf_|sk-|ghp_|github_pat_|glpat-|xox[abp]-|AKIA)[\w-]{12,}")
SHORTEST_SECRET = 8  # characters; a shorter value of the environment may stand in a text by chance
ENVIRONMENT_WORD = re.compile(r"[+~]*cluster\b.*\benvironment\b")  # an override of cluster.slurm.environment
TREE = Path(__file__).parent


def git_commit() -> str | None:
    """Commit of the source tree, with "+changes" if files differ from it; None outside a checkout."""
    commit = (_git("rev-parse", "HEAD") or "").strip() or None
    return f"{commit}+changes" if commit and _git("status", "--porcelain") else commit


def git_changes(secrets: Collection[str] = ()) -> str:
    """Masked patch from the commit to the files, and names of files that git does not track; "" outside a checkout."""
    patch, untracked = _git("diff", "HEAD", "--binary"), _git("ls-files", "--others", "--exclude-standard", ":/")
    return masked(patch or "", secrets) + "".join(f"# not in git: {name}\n" for name in (untracked or "").splitlines())


def masked(text: str, secrets: Collection[str] = ()) -> str:
    """A script or patch without the secrets that are given, and without text that is written like one.

    A secret under an unusual name stays: secrets belong in the environment.
    """
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, MASKED)
    text = ASSIGNED.sub(lambda match: f"{match[1] or match[3]}{MASKED}", text)
    return ISSUED.sub(MASKED, text)


def secrets_in(environment: Mapping[str, str]) -> set[str]:
    """Values of the variables that are named like a key or a token, for :func:`masked`."""
    return {v for k, v in environment.items() if SECRET.search(k) and len(v) >= SHORTEST_SECRET}


def versions() -> dict[str, str]:
    """Versions of the installed packages that results depend on."""
    return {name: installed for name in PACKAGES if (installed := _version(name))}


def recorded_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that steer a job, by a list of names; none that is named like a key or a token."""
    return {
        name: value
        for name, value in sorted(environment.items())
        if RECORDED.fullmatch(name) and not SECRET.search(name)
    }


def recorded_config(config: Any) -> dict[str, Any]:
    """A resolved configuration for a record: values of ``cluster.slurm.environment`` named like a key are masked."""
    content = asdict(config)
    environment = content.get("cluster", {}).get("slurm", {}).get("environment", {})
    environment.update({name: MASKED for name in environment if SECRET.search(name)})
    return content


def recorded_arguments(arguments: Sequence[str]) -> list[str]:
    """Overrides for a record: one that gives ``cluster.slurm.environment`` a key or a token is masked."""
    return [
        f"{word.partition('=')[0]}={MASKED}" if ENVIRONMENT_WORD.match(word) and SECRET.search(word) else word
        for word in arguments
    ]


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=TREE, capture_output=True, text=True, errors="replace", check=False
        )
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
