"""The record of a run, and its contract: what it is made of, and what a resumed run must share with it."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ropewalk.config.train import GuardConfig, PrimaryConfig, TrainConfig
from ropewalk.data import Mixture, PackedStore
from ropewalk.errors import UserError, in_one_line
from ropewalk.files import copy_files, read_object, write_atomically
from ropewalk.rope.chain import RopeChain
from ropewalk.rope.position import Position
from ropewalk.runs.directory import RunDirectory

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
    "flash-attn-3",
    "flash-attn-4",
    "liger-kernel",
    "triton",
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
    device = content.get("trainer", {}).get("device")
    if device is not None and device != content["cluster"]["device"]:  # not the nodes of the group
        content["cluster"] = {**content["cluster"], "name": device, "device": device}
    return content


# Keys, by their beginning, that name and locate a run, or set how often it is logged, saved or evaluated.
WITHOUT_EFFECT = (
    "run_name", "run_dir", "baseline", "data.verify", "data.cache_", "trainer.log_every", "trainer.checkpoint_every",
    "trainer.keep_", "trainer.stop_", "trainer.profile_steps", "trainer.peak_flops", "tracker.", "paths.", "resume.",
    "cluster.", "evaluation.",
)  # fmt: skip


def recorded_at(run_dir: str | Path) -> dict[str, Any] | None:
    """The configuration that a run has recorded; None: it has no record yet.

    Raises:
        UserError: its config.yaml is not what was written, as after an edit.
    """
    path = RunDirectory(Path(run_dir)).config
    if not path.is_file():
        return None
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path} cannot be read ({in_one_line(error)}); correct it, or move it away") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a mapping of keys; correct it, or move it away")
    return cast(dict[str, Any], content)


def differences(config: Any, baseline: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The keys in which a configuration differs from another one as recorded, with the other's value and its own.

    Keys of WITHOUT_EFFECT are left out; a chain is in its notation.
    """
    own, other = _flat(recorded_config(config)), _flat(baseline)
    keys = sorted(key for key in {**other, **own} if not key.startswith(WITHOUT_EFFECT))
    return {
        key: (in_notation(key, other.get(key)), in_notation(key, own.get(key)))
        for key in keys
        if other.get(key) != own.get(key)
    }


def in_notation(key: str, value: Any) -> Any:
    """The recorded value of ``rope.chain`` in a chain's notation; of any other key, or no chain of today, as it is."""
    if key != "rope.chain" or value is None:
        return value
    try:
        return str(RopeChain(value))
    except UserError:  # of a method that has gone
        return value


def _flat(content: Any, prefix: str = "") -> dict[str, Any]:
    if not (isinstance(content, dict) and content):
        return {prefix.removesuffix("."): content}
    return {key: value for name, part in content.items() for key, value in _flat(part, f"{prefix}{name}.").items()}


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


def write_record(
    config: TrainConfig,
    position: Position,
    mixture: Mixture,
    model: dict[str, Any],
    world_size: int,
    step: int = 0,
    accepted: Mapping[str, list[str]] | None = None,
) -> dict[str, Any]:
    """Write config.yaml and run.json into the run directory; return the content of run.json.

    Args:
        config: resolved.
        position: position encoding of the model.
        mixture: the order of what it is trained on, in one store or several with one tokenizer.
        model: further facts about the model (parameters, attention kernel).
        world_size: number of ranks.
        step: that the session begins after.
        accepted: changes of the contract that ``resume.accept`` let pass, as :func:`check_contract` returns them; they
            stay in the record, beside those of earlier sessions whose steps are kept.
    """
    run = RunDirectory(Path(config.run_dir))
    earlier = read_object(run.record).get("accepted", [])
    spectrum = position.spectrum()
    record = {
        "run_name": config.run_name,
        "method": position.name,
        "chain": str(position.chain),
        "chain_sha256": position.chain.sha256,
        "spectrum_sha256": position.sha256,
        "theta": position.theta,
        "rope_theta": spectrum.theta,  # after the chain, as in a stock entry
        "head_dim": position.head_dim,
        "pretrained_length": position.pretrained_length,
        "trained_length": position.trained_length,
        "inv_freq": spectrum.inv_freq.tolist(),
        "attention_scaling": spectrum.attention_scaling,
        **model,
        "store_fingerprint": mixture.store.fingerprint,
        "special_tokens": next(iter(mixture.store.stores.values())).special_tokens,
        "git_commit": git_commit(),
        "versions": versions(),
        "world_size": world_size,
        "accepted": [
            *(change for change in earlier if change["step"] < step),
            *({"step": step, "entry": entry, "changes": changes} for entry, changes in (accepted or {}).items()),
        ],
    }
    write_atomically(run.config, OmegaConf.to_yaml(OmegaConf.create(recorded_config(config))))
    write_atomically(run.record, json.dumps(record, indent=2) + "\n")
    return record


def copy_tokenizer(source: Path | None, run_dir: Path) -> None:
    """Keep the tokenizer beside the run, so that an export needs nothing else."""
    if source is not None and source.is_dir():
        copy_files(source, RunDirectory(run_dir).tokenizer)


def contract(
    config: TrainConfig,
    position: Position,
    store: PackedStore,
    mixture: Mixture,
    start_from: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Everything that changes the numbers of a step, entry by entry, and what was declared before the first one.

    Args:
        config: resolved.
        position: position encoding of the model.
        store: packed sequences that it is trained on.
        mixture: order of the data.
        start_from: identity of the checkpoint whose weights the run started with, and the step of the data order that
            it began with; None: it has none.
    """
    trainer = config.trainer
    metadata = position.metadata()
    return {
        "position": {
            **{k: v for k, v in metadata.items() if k not in ("name", "base_model")},
            "chain": str(position.chain),
        },
        "base_model": {
            "path": config.model.path,
            "revision": config.model.revision,
            "architecture": {} if config.model.path else dict(config.model.architecture),  # else only the planner's
            **({"drop": sorted(config.model.drop)} if config.model.drop else {}),
            **({} if config.model.train_tower else {"train_tower": False}),
        },
        "start_from": start_from and {**start_from, "optimizer": config.start_from.optimizer},
        "tokenizer": dict(store.tokenizer),
        **mixture.contract(),
        "overfit_one_batch": trainer.overfit_one_batch,
        "max_steps": trainer.max_steps,
        "schedule": {
            name: getattr(trainer, name)
            for name in ("learning_rate", "schedule", "min_lr_ratio", "warmup_ratio", "decay_ratio")
        },
        "optimizer": {
            name: getattr(trainer, name)
            for name in ("adam_beta1", "adam_beta2", "adam_eps", "weight_decay", "gradient_clipping")
        },
        "dtype": trainer.dtype,
        "z_loss": trainer.z_loss,
        "guards": _refusals(config.guards),
        "primary": asdict(config.primary),
    }


def _refusals(guards: GuardConfig) -> dict[str, Any]:
    """Settings that decide which steps reach the weights.

    How many refusals end a run, or whether the first spike does, is left out: until it ends, such a run has the losses
    of one that goes on.
    """
    window = guards.spike_window
    return {"spike_window": window, "spike_deviations": None if window is None else guards.spike_deviations}


# Entries that older checkpoints lack, and parts of entries; they count as the default.
DEFAULTS = {"z_loss": 0.0, "guards": _refusals(GuardConfig()), "primary": asdict(PrimaryConfig())}
PARTS: dict[str, dict[str, Any]] = {
    "base_model": {"drop": [], "train_tower": True},
    "schedule": {"schedule": "cosine", "decay_ratio": 1.0},
    "start_from": {"order_step": 0},
    "primary": asdict(PrimaryConfig()),
}


def check_contract(saved: Mapping[str, Any], present: Mapping[str, Any], accept: list[str]) -> dict[str, list[str]]:
    """The changes that are accepted by name, in words, by the contract's entry.

    Raises:
        UserError: naming each entry that differs, with both values, and is not accepted.
    """
    unknown = set(accept) - set(present)
    if unknown:
        raise UserError(f"resume.accept={sorted(unknown)} names no contract entry; there are: {', '.join(present)}")
    saved, present = _whole({**DEFAULTS, **saved}), _whole(present)
    changes = {key: _changes(key, saved.get(key), present[key]) for key in present if saved.get(key) != present[key]}
    refused = [key for key in changes if key not in accept]
    if refused:
        raise UserError(
            f"this run is not the one that was saved: {'; '.join(line for key in refused for line in changes[key])}. "
            "Restore the settings, choose another run_name, or accept the change by name: "
            f"resume.accept=[{','.join(refused)}]"
        )
    return changes


def _whole(contract: Mapping[str, Any]) -> dict[str, Any]:
    """The contract with every part that was left out at its default."""
    return {
        name: {**PARTS.get(name, {}), **entry} if isinstance(entry, dict) else entry for name, entry in contract.items()
    }


def _changes(name: str, saved: Any, present: Any) -> list[str]:
    """The leaves in which two contract entries differ, in words; a hash only where nothing else differs."""
    if not (isinstance(saved, dict) and isinstance(present, dict)):
        return [f"{name} was {saved!r}, is {present!r}"]
    differing = [key for key in {**saved, **present} if saved.get(key) != present.get(key)]
    readable = [key for key in differing if not key.endswith("sha256")]
    if name == "position" and not readable:
        return [
            f"position reads {present['chain']} as before, under another chain_sha256 ({saved.get('chain_sha256')} was "
            f"saved, {present['chain_sha256']} is this one's): a long list in it differs, or a method takes other "
            "arguments since then (CHANGELOG.md)"
        ]
    return [
        line for key in readable or differing for line in _changes(f"{name}.{key}", saved.get(key), present.get(key))
    ]
