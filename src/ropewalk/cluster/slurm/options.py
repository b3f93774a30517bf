"""The ``cluster`` group as options of sbatch and of the hydra launcher."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ropewalk.cluster.requirements import check_requirements
from ropewalk.config.groups import ClusterConfig
from ropewalk.config.train import PlanConfig
from ropewalk.errors import UserError

VARIABLE = re.compile(r"[A-Za-z_]\w*")
PER_DAY, PER_HOUR = 24 * 60, 60  # minutes
USUAL_LEAD = 300  # seconds; of the scripts' #SBATCH lines


def sbatch_options(cluster: ClusterConfig, nodes: int | None, lead_seconds: int | None) -> list[str]:
    """Options that stand for the #SBATCH lines of a training script.

    Args:
        cluster: where it is submitted.
        nodes: of the job; None: what the script says.
        lead_seconds: how long before the limit the warning is to come; None: what the script says.
    """
    slurm = cluster.slurm
    options = {
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "nodes": nodes,
        "ntasks-per-node": cluster.gpus_per_node,
        "gpus-per-node": cluster.gpus_per_node if slurm.gpu_request else 0,
        "cpus-per-task": slurm.cpus_per_gpu,
        "mem": slurm.mem,
        "signal": f"B:USR1@{lead_seconds}" if lead_seconds else None,
    }
    return [f"--{name}={value}" for name, value in options.items() if value is not None]


def preview_of(
    batch_script: str, arguments: Sequence[str], composed: Callable[[str, Sequence[str]], Any]
) -> tuple[list[str], bool]:
    """A training job before it is submitted: its configuration's differences, its plan, its sbatch line.

    Args:
        batch_script: one of slurm/; its #SBATCH line says how many nodes.
        arguments: overrides of the training.
        composed: composes a command's configuration from overrides.

    Returns:
        The lines, and whether it can be submitted: the run fits, and its inputs are there.

    Raises:
        UserError: for a configuration that does not hold.
    """
    from ropewalk.cluster.planner import make_plan, summary
    from ropewalk.runs.record import differences, recorded_config  # late: the options of sbatch need no numpy

    match = re.search(r"^#SBATCH --nodes=(\d+)", Path(batch_script).read_text(encoding="utf-8"), re.MULTILINE)
    nodes = int(match[1]) if match else 1
    config, default = composed("train", arguments), composed("train", [])
    plan_config = composed("plan", [*arguments, f"nodes={nodes}"])
    plan = make_plan(plan_config)
    changed = differences(config, recorded_config(default))
    missing = []
    try:
        check_requirements("train", config)
    except UserError as error:
        missing = [f"not ready: {error}"]
    submitted = ["sbatch", *sbatch_options(config.cluster, nodes, plan.lead_seconds), batch_script, *arguments]
    return [
        f"{config.run_name}, into {config.run_dir}; what differs from configs/train.yaml:",
        *(f"  {key}: {other} -> {own}" for key, (other, own) in changed.items()),
        summary(plan, plan_config),
        *missing,
        shlex.join(submitted),
    ], plan.fits and not missing


def exports(environment: Mapping[str, str]) -> list[str]:
    """Shell lines that export the cluster's variables.

    Raises:
        UserError: for what is not the name of a variable.
    """
    for name in environment:
        if not VARIABLE.fullmatch(name):
            raise UserError(f"cluster.slurm.environment has the name {name!r}; use letters, digits and _")
    return [f"export {name}={shlex.quote(str(value))}" for name, value in environment.items()]


def minutes(time: str) -> int:
    """A time limit as sbatch reads it ([days-]hours:minutes:seconds, minutes:seconds, minutes), in whole minutes.

    A bare number below 60 is of minutes. YAML 1.1 makes larger ones of what is not quoted: 86400 of 24:00:00.

    Raises:
        UserError: for what is not such a time, and for a bare number of 60 or more.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if not match:
        raise UserError(f"cluster.slurm.time={time} is not a time limit; write it as 48:00:00 or 2-00:00:00")
    if time.isdigit() and int(time) >= PER_HOUR:
        raise UserError(
            f"cluster.slurm.time={time} is a bare number of {PER_HOUR} or more, as YAML makes of an unquoted 24:00:00; "
            "write hours:minutes:seconds and quote it in YAML: '24:00:00', or '2-00:00:00' for days"
        )
    days, *parts = match.groups()
    a, b, c = (int(part or 0) for part in parts)
    if days is not None or parts[2] is not None:  # days-hours[:minutes[:seconds]], hours:minutes:seconds
        total = int(days or 0) * PER_DAY + a * PER_HOUR + b + (c > 0)
    else:  # minutes[:seconds]
        total = a + (b > 0)
    if total == 0:
        raise UserError(f"cluster.slurm.time={time} leaves no time at all; write it as 48:00:00 or 2-00:00:00")
    return total


def lead_seconds(root: DictConfig) -> int:
    """The planner's lead time of the warning for a composed training, in seconds.

    A sweep is composed once without what is swept. Where the planner can make nothing of that, it is the scripts'
    300 s, with a warning. Each job sets ``trainer.stop_before`` from its own plan in any case.
    """
    from ropewalk.cluster.planner import make_plan

    train = OmegaConf.masked_copy(root, [str(key) for key in root if key != "hydra"])
    try:
        nodes = {"nodes": root.cluster.slurm.nodes}
        plan = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(PlanConfig), train, nodes))
        assert isinstance(plan, PlanConfig)
        return make_plan(plan).lead_seconds
    except (ValueError, OmegaConfBaseException) as error:
        _warn_once(f"warning: the lead time is not planned but {USUAL_LEAD} s ({' '.join(str(error).split())})")
        return USUAL_LEAD


def root() -> str:
    """The directory in which a job of a sweep has to run, as the launcher does.

    Raises:
        UserError: where it is not the repository's root, before anything is submitted.
    """
    here = Path.cwd()
    if not (here / "slurm" / "common.sh").is_file():
        raise UserError(f"hydra/launcher=slurm was started in {here}; start it in the root of the repository")
    return str(here)


@cache
def _warn_once(text: str) -> None:
    """The launcher's settings are resolved several times."""
    print(text, file=sys.stderr, flush=True)


# What configs/hydra/launcher/slurm.yaml computes.
RESOLVERS: dict[str, Callable[..., Any]] = {
    "slurm_minutes": minutes,
    "slurm_gpus": lambda cluster: cluster.gpus_per_node if cluster.slurm.gpu_request else None,
    "slurm_lead": lambda *, _root_: lead_seconds(_root_),
    "slurm_mem": lambda mem: mem or "0",  # all of a node, as in the scripts
    "slurm_quoted": shlex.quote,
    "slurm_root": lambda: shlex.quote(root()),
}
