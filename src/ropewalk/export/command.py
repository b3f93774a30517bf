"""The export command (write, verify, describe, push) and the repair of a config that lacks its method."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from httpx2 import HTTPError
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError

from ropewalk.config.export import ExportConfig, RepairConfig
from ropewalk.config.rules import one_of
from ropewalk.errors import UserError
from ropewalk.export.average import averaged_source
from ropewalk.export.card import write_card
from ropewalk.export.gguf.gguf_file import check_same, gguf_type, write_gguf
from ropewalk.export.gguf.gguf_model import family_of, gguf_position
from ropewalk.export.hf import is_current, place_hf
from ropewalk.export.output import (
    STOCK,
    Finding,
    NotVerified,
    begin_adding,
    check_addable,
    only_export,
    record,
    written_beside,
)
from ropewalk.export.portable import place_portable, write_portable_config
from ropewalk.export.source import (
    Source,
    committed_checkpoint,
    converted_source,
    dtype_name,
    local_model,
    static_steps,
    trained_source,
)
from ropewalk.export.verify.check_export import Claim, print_check
from ropewalk.export.verify.verify_gguf import engine_name, verify_gguf
from ropewalk.export.verify.verify_stock import verify_stock, verify_table
from ropewalk.model.hf_directory import StoredWeights, read_config
from ropewalk.rope import Position, RopeChain
from ropewalk.runs.directory import RunDirectory

BACKUP = "config.json.before-repair"


def export(config: ExportConfig) -> Path:
    """Export as ``config`` says, verify, and print the findings; returns the directory.

    Raises:
        UserError: where there is no committed checkpoint or model, the method does not fit, or the output is not empty
            and may not be replaced.
        NotVerified: where an engine does not reproduce the checkpoint's logits. What was written stays, and its card
            says so.
    """
    one_of("to", config.to, ("hf", "gguf", "all"))
    dtype = dtype_name(config.dtype)
    source = _source(config)
    output = _output(config, source)
    if config.to != "hf":
        served = source.config.get_text_config().max_position_embeddings
        family_of(source.config, gguf_position(source.position, served))  # refuses before anything is written
    with only_export(output):
        failures: list[str] = []
        if config.to in ("hf", "all"):
            _export_hf(config, source, output, dtype, failures)
        if config.to in ("gguf", "all"):
            _export_gguf(config, source, output, dtype, failures)
        write_card(source, output, config.license)
    if failures:
        raise NotVerified("\n".join(failures))
    if config.push_to_hub is not None:
        push(output, config.push_to_hub, private=config.private)
    return output


def _source(config: ExportConfig) -> Source:
    extra = static_steps(config.test_time)
    if config.checkpoint is not None and config.model.path:
        raise UserError(f"checkpoint={config.checkpoint} and model={config.model.path} are both set; give one of them")
    if config.checkpoint is not None:
        if config.rope.chain:
            raise UserError(
                f"rope={config.rope.name} is for model=; a training checkpoint has the chain it was trained with "
                "(test_time= appends to that)"
            )
        checkpoint = committed_checkpoint(config.checkpoint)
        if config.average.suffix():
            return averaged_source(checkpoint, config.average, extra)
        return trained_source(checkpoint, extra)
    if config.average.suffix():
        raise UserError(f"average={config.average} is of training checkpoints; name a run (checkpoint=RUN), not model=")
    if not config.model.path:
        raise UserError(
            "checkpoint is not set; give it on the command line (checkpoint=RUN_OR_CHECKPOINT), or a model to convert "
            "(model=DIR_OR_HUB_ID rope=cope20)"
        )
    return converted_source(config.model.path, config.rope, extra)


def _output(config: ExportConfig, source: Source) -> Path:
    if config.output:
        return Path(config.output)
    scaled = f"-{config.test_time.name}" if config.test_time.beyond else ""
    if source.run_dir is not None:
        export = RunDirectory(source.run_dir).export
        kind = "-gguf" if config.to == "gguf" else ""
        return export.with_name(f"{export.name}{config.average.suffix()}{kind}{scaled}")
    method = f"-{config.rope.name}" if config.rope.chain else ""
    return Path(config.paths.output_dir) / "exports" / f"{model_name(source)}{method}{scaled}"


def model_name(source: Source) -> str:
    """The model's name for people: the run, or the last part of the model's name."""
    if source.run_dir is not None:
        return source.run_dir.name
    return os.path.basename(os.path.abspath(source.identity["model"]))  # of "." too


def _export_hf(config: ExportConfig, source: Source, output: Path, dtype: str | None, failures: list[str]) -> None:
    if is_current(output, source, dtype) and not config.overwrite:
        print(f"{output} holds this checkpoint already")
    else:
        place_hf(source, output, dtype, overwrite=config.overwrite)
        print(f"exported {source.origin} to {output}")
    if source.position.depends_on_length and not source.keeps_entry:
        print(f"position: {source.position}; at other lengths the source rotates otherwise")
    if config.verify:
        _verify(STOCK, output, partial(verify_stock, source, output, config.verify_tokens), failures)
        for engine, python in vars(config.engines).items():
            _verify(engine, output, partial(verify_table, engine, output, python), failures)


def _export_gguf(config: ExportConfig, source: Source, output: Path, dtype: str | None, failures: list[str]) -> None:
    with _directory_for(config, source, output, dtype, failures) as directory:
        kind = gguf_type(config.gguf, read_config(directory))
        path = output / f"{model_name(source)}-{kind}.gguf"
        if path.exists() and not config.overwrite:
            check_same(path, directory)
            print(f"{path} is there already")
        else:
            write_gguf(directory, path, kind)
            print(f"exported {source.origin} to {path}")
        if source.position.depends_on_length:
            print(f"position of {path.name}: {source.position}; at other lengths the source rotates otherwise")
        if config.verify:
            verify = partial(verify_gguf, directory, path, kind, config.verify_tokens)
            _verify(engine_name(path), output, verify, failures)


@contextmanager
def _directory_for(
    config: ExportConfig, source: Source, output: Path, dtype: str | None, failures: list[str]
) -> Iterator[Path]:
    """The Hugging Face directory that a GGUF file is made from and compared with; a scratch one where none is kept."""
    if config.to == "all":
        yield output
        return
    check_addable(output, source.identity, config.overwrite)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        directory = Path(scratch) / "hf"
        place_hf(source, directory, dtype, overwrite=False)
        begin_adding(output, source.identity, config.overwrite)  # now that there is a model to add
        if config.verify:
            _verify(STOCK, output, partial(verify_stock, source, directory, config.verify_tokens), failures)
        yield directory


def _verify(engine: str, output: Path, verify: Callable[[], Finding], failures: list[str]) -> None:
    finding = record(output, engine, verify)
    if finding.passed is False:
        failures.append(f"{output}: {engine}: {finding}")
    else:
        print(f"{engine}: {finding}", flush=True)


def push(directory: Path, repository: str, *, private: bool) -> str:
    """Upload a directory, the record of its making left out; returns the address.

    The login is that of ``hf auth login``; no token is read or written here.

    Raises:
        UserError: where the hub cannot be reached or refuses; the export stays and the command can be repeated.
    """
    api = HfApi()
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=directory, commit_message=f"Upload {directory.name}")
    except (OSError, HTTPError, HFValidationError) as error:
        raise UserError(
            f"push_to_hub={repository} failed ({' '.join(str(error).split())[:300]}); {directory} is whole: log in "
            "with `hf auth login`, check the name and the network, and repeat the command"
        ) from error
    print(f"uploaded {directory} to {address}")
    return str(address)


def repair(config: RepairConfig) -> Path:
    """Write the config of ``config.rope`` for a model that was trained with it; the weights stay as they are.

    In a new directory the other files are hard links where the disk allows it, else copies. CoPE's own keys are taken
    out of the config: with them its published code would clip a second time.

    Returns:
        the repaired directory.

    Raises:
        UserError: where the config names a method already, or contradicts the given one, or a file would be
            overwritten.
        RuntimeError: where the result does not carry the method.
    """
    directory = local_model(config.model.path)
    claim = Claim.of(directory)
    position, stock = _position(config, claim), claim.config
    StoredWeights(directory)  # a repaired config beside half the weights helps nobody
    for key in claim.reference_keys:
        delattr(stock, key)
    stock = place_portable(stock, position, stock.max_position_embeddings)
    output = _in_place(config, directory) if config.in_place else _new(config)
    with only_export(output):
        if config.in_place:
            os.replace(shutil.copyfile(directory / "config.json", output / f"{BACKUP}.partial"), output / BACKUP)
            write_portable_config(stock, output)
        else:
            with written_beside(output) as partial:
                for path in directory.iterdir():
                    if path.is_file() and path.name != "config.json":
                        _link(path, partial / path.name)
                write_portable_config(stock, partial)
    print(f"repaired: {output}")
    if not print_check(str(output)):
        raise RuntimeError(f"{output} does not carry {position.chain} after all; see above")
    return output


def _position(config: RepairConfig, claim: Claim) -> Position:
    if claim.has_metadata:
        raise UserError(
            f"model={config.model.path} says its method already; check it: python scripts/export.py check "
            f"{config.model.path}"
        )
    chain = RopeChain.of(config.rope)
    if not chain.steps:
        raise UserError("rope is not set; name the method that the model was trained with (rope=cope20)")
    present = claim.position
    if present.chain.steps:
        raise UserError(
            f"model={config.model.path} says {present.chain} already, so nothing is lost; to apply a method to it: "
            f"python scripts/export.py model={config.model.path} rope={config.rope.name}"
        )
    length = present.trained_length
    position = Position(
        name=config.rope.name,
        chain=chain,
        theta=present.theta,
        head_dim=present.head_dim,
        pretrained_length=config.pretrained_length or length,
        trained_length=length,
    )
    first = next(iter(position.chain.frequencies().steps), None)
    base = first.arguments["theta"] if first is not None and first.method == "abf" else present.theta
    if base != present.theta:
        raise UserError(
            f"rope={config.rope.name} has base {base:g}, but config.json says rope_theta={present.theta:g}, the base "
            "it was trained at; name the method at that base ('rope.chain=[{method: cope, clip: 20}]'), or fix it"
        )
    return position


def _in_place(config: RepairConfig, directory: Path) -> Path:
    if config.output is not None:
        raise UserError(f"in_place=true and output={config.output} are both set; give one of them")
    if not Path(config.model.path).is_dir():
        raise UserError(f"in_place=true needs a directory, and model={config.model.path} is the hub's; give output=DIR")
    if (directory / BACKUP).exists():
        raise UserError(f"{directory / BACKUP} is there from an earlier repair and is not overwritten; move it away")
    return directory


def _new(config: RepairConfig) -> Path:
    if config.output is None:
        raise UserError("output is not set; name a new directory, or change the config where it lies (in_place=true)")
    output = Path(config.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"output={output} is not empty; name a new directory")
    return output


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)
