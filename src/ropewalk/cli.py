"""The Hydra main that every entry shares: typed schemas, and user errors as one line."""

from __future__ import annotations

import difflib
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from functools import cache, partial, wraps
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import IConfigRepository
from hydra.core.config_store import ConfigStore
from hydra.core.default_element import ResultDefault
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, Quote, QuotedString
from hydra.errors import CompactHydraException, HydraException
from hydra.plugins.sweeper import Sweeper
from hydra.types import RunMode
from omegaconf import DictConfig, MissingMandatoryValue, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ropewalk.cluster.requirements import COMMANDS, check_requirements
from ropewalk.cluster.slurm.options import RESOLVERS
from ropewalk.config import CONFIG_DIR, SCHEMAS, schema_class
from ropewalk.config.rules import validate_numbers
from ropewalk.errors import UserError, quiet_pipe
from ropewalk.files import check_writable, writing
from ropewalk.runs.launch import Terminated, leave, leave_place, terminating

DRY_RUN = "--dry-run="
IN_THIS_PROCESS = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
USER_FAULTS = (UserError, CompactHydraException, OmegaConfBaseException)
RANKED = ("train", "evaluate")  # what several processes do together; the others are one process, whatever RANK says
OUTPUTS = ("output", "figures")  # keys of what a command writes; training looks at its run_dir on every rank alike
HOME = re.compile(r"(?<![^\['\",])~(?=/[^\s]*$)")  # at the beginning of a path, or of one in a list
# Mappings that a later file or an override replaces whole; Hydra would merge their entries.
REPLACED = ("data.mixture", "data.curriculum", "data.length_weights", "corpus.domains", "test_time.at")


@cache
def register_schemas() -> None:
    """Put each entry's dataclass into Hydra's store as ``schema/<entry>``, once; the YAML files build on them.

    Their help texts say ``${choices:rope,test_time}`` for what :func:`choices` lists, the launcher's what slurm.options
    computes.
    """
    for name, resolver in {"choices": choices, **RESOLVERS}.items():
        OmegaConf.register_new_resolver(name, resolver, replace=True)
    _replace_mappings()
    # Hydra copies the store, which no copy changes, for each composition and each group that --help lists: 4 s in all.
    ConfigStore.__deepcopy__ = lambda store, _: store  # type: ignore[attr-defined]
    store = ConfigStore.instance()
    for name, schema in SCHEMAS.items():
        store.store(name=f"schema_{name}", node=schema)


def _replace_mappings() -> None:
    """Have Hydra 1.3.8 replace the mappings of ``REPLACED``: by the last file that sets one, then by the overrides."""
    compose, override = ConfigLoaderImpl._compose_config_from_defaults_list, ConfigLoaderImpl._apply_overrides_to_config
    if compose.__module__ == __name__:
        return

    def compose_replacing(self: ConfigLoaderImpl, defaults: list[ResultDefault], repo: IConfigRepository) -> DictConfig:
        config = compose(self, defaults, repo)
        files = [self._load_single_config(default, repo).config for default in reversed(defaults)]
        for key in REPLACED:
            last = next((mapping for file in files if (mapping := OmegaConf.select(file, key)) is not None), None)
            if last is not None:
                OmegaConf.update(config, key, {}, merge=False)  # it keeps the type of its values
                OmegaConf.update(config, key, last, force_add=True)
        return config

    def override_replacing(overrides: list[Override], config: DictConfig) -> None:
        for change in overrides:
            is_replaced = change.key_or_group in REPLACED and not change.is_delete()
            if is_replaced and isinstance(value := change.value(), dict):
                OmegaConf.update(config, change.key_or_group, {}, merge=False)
                change.type = OverrideType.FORCE_ADD
                if change.key_or_group.startswith("data."):  # shares, as floats: of {books: 1} OmegaConf refuses the 1
                    change._value = _with_floats(value)
            override([change], config)

    ConfigLoaderImpl._compose_config_from_defaults_list = compose_replacing  # type: ignore[method-assign]
    ConfigLoaderImpl._apply_overrides_to_config = staticmethod(override_replacing)  # type: ignore[method-assign, assignment]


def _with_floats(mapping: Mapping[Any, Any]) -> dict[Any, Any]:
    return {
        k: _with_floats(v) if isinstance(v, Mapping) else float(v) if type(v) is int else v for k, v in mapping.items()
    }


def choices(*groups: str) -> str:
    """The options of config groups, a line each: ``tracker: none, wandb``; those of subfolders with their folder."""
    folders = [(group, CONFIG_DIR / group) for group in groups]
    options = {group: sorted(file.relative_to(folder) for file in folder.rglob("*.yaml")) for group, folder in folders}
    return "\n".join(f"{g}: {', '.join(str(name.with_suffix('')) for name in names)}" for g, names in options.items())


def entry(config_name: str, *, reads_inputs: bool = True) -> Callable[[Callable[[Any], None]], Callable[[], None]]:
    """Decorate ``main(config)`` as a command: compose ``configs/<config_name>.yaml``, run, report errors.

    ``main`` gets the dataclass of ``SCHEMAS[config_name]``. With ``--dry-run=LEDGER`` among the arguments it is not
    called; ropewalk.cluster.dry_run checks the configuration and its paths instead. Else the paths that the command
    reads are checked first, unless ``reads_inputs`` is false. In a sweep (``-m``) each combination is named, a wrong
    one is passed over, and a table of all of them is the end. Errors end the process as :func:`user_errors` says.
    """
    register_schemas()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let exceptions reach us instead of Hydra's own printer
    takes_path = any(f.name == "model" and f.type == "ModelPath" for f in fields(SCHEMAS[config_name]))
    ledgers: list[str] = []
    sweep = Sweep()

    def decorate(main: Callable[[Any], None]) -> Callable[[], None]:
        def checked(composed: DictConfig) -> None:
            config_object = to_object(composed)
            validate_numbers(config_object)
            if ledgers:
                from ropewalk.cluster.dry_run import dry_run

                dry_run(config_name, config_object, Path(ledgers[-1]))
                return
            with ExitStack() as disks:
                for key in OUTPUTS:
                    path = getattr(config_object, key, None)
                    if path is None:
                        continue
                    if not (config_name == "prepare" and Path(path).is_dir()):  # finished, it may be read-only
                        check_writable(f"{key}={path}", Path(path))
                    disks.enter_context(writing(f"{key}={path}", Path(path)))
                if reads_inputs and config_name in COMMANDS:
                    check_requirements(config_name, config_object)
                main(config_object)

        @wraps(main)
        def with_object(composed: DictConfig) -> None:
            with user_errors():  # here, so that Hydra adds no line of its own
                if HydraConfig.get().mode == RunMode.MULTIRUN:
                    words: Any = OmegaConf.to_container(HydraConfig.get().overrides.task)  # their ${...} as written
                    sweep.run(words, partial(checked, composed), composed)
                else:
                    checked(composed)

        run = hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name=config_name)(with_object)

        @wraps(main)
        def command() -> None:
            if config_name not in RANKED:
                leave_place()
            with user_errors():
                ledgers[:] = [argument[len(DRY_RUN) :] for argument in sys.argv if argument.startswith(DRY_RUN)]
                sys.argv[:] = [argument for argument in sys.argv if not argument.startswith(DRY_RUN)]
                check_working_directory()
                sys.argv[1:] = hydra_arguments(sys.argv[1:], config_name)
                if takes_path:
                    swept = bool({"-m", "--multirun"} & {*sys.argv})
                    sys.argv[1:] = [plain_argument(argument, swept) for argument in sys.argv[1:]]
                sweep.keys = check_grammar(sys.argv[1:])
                with sweep.composing():
                    run()
                sweep.end()

        return command

    return decorate


class Sweep:
    """The combinations of a sweep in this process, each by the overrides that vary, and how it went."""

    def __init__(self) -> None:
        self.keys: set[str] = set()  # that vary; none: every override is shown
        self.rows: list[tuple[str, str]] = []

    def run(self, overrides: Sequence[str], job: Callable[[], None], config: DictConfig | None = None) -> None:
        """Run one combination; one whose input is wrong, or that its guards end, is noted and passed over.

        The table names the directory that ``config`` has it write.
        """
        words = self._announce(overrides)
        try:
            job()
        except (*USER_FAULTS, FloatingPointError) as error:  # all ranks raise them alike, so all go on
            self.rows.append((words, f"failed: {_report(error)}"))
        except BaseException as error:  # a signal, or a fault of the program: the sweep ends here
            self.rows.append((words, f"left with {error.code}" if isinstance(error, SystemExit) else repr(error)))
            self._print()
            raise
        else:
            results = [] if config is None else [OmegaConf.select(config, key) for key in ("run_dir", "output")]
            self.rows.append((words, ": ".join(["done", *(str(result) for result in results if result)])))

    @contextmanager
    def composing(self) -> Iterator[None]:
        """Have Hydra 1.3.8 note and pass over combinations that do not compose; of jobs it submits all or none."""
        validate = Sweeper.validate_batch_is_legal

        def drop_wrong(sweeper: Sweeper, batch: list[list[str]]) -> None:
            assert sweeper.config is not None  # since its setup
            if sweeper.config.hydra.launcher._target_ != IN_THIS_PROCESS:
                validate(sweeper, batch)
                return
            legal = []
            for overrides in batch:
                try:
                    validate(sweeper, [overrides])
                    legal.append(overrides)
                except USER_FAULTS as error:
                    self.rows.append((self._announce(overrides), f"failed: {_report(error)}"))
            batch[:] = legal

        Sweeper.validate_batch_is_legal = drop_wrong  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            Sweeper.validate_batch_is_legal = validate  # type: ignore[method-assign]

    def _announce(self, overrides: Sequence[str]) -> str:
        varied = [word for word in overrides if word.partition("=")[0].lstrip("+") in self.keys]
        words = " ".join(varied or overrides)
        _print_once(f"\nsweep {len(self.rows) + 1}: {words}")
        return words

    def end(self) -> None:
        """Print the table, if there was a sweep; exit code 2 if a combination has failed."""
        if self.rows:
            self._print()
            if any(not outcome.startswith("done") for _, outcome in self.rows):
                sys.exit(2)

    def _print(self) -> None:
        width = max(len(words) for words, _ in self.rows)
        lines = [f"  {words:<{width}}  {outcome[:200]}" for words, outcome in self.rows]
        done = sum(outcome.startswith("done") for _, outcome in self.rows)
        _print_once("\n".join(["", f"sweep: {done} of {len(self.rows)} done", *lines]))


def composed(config_name: str, overrides: Sequence[str]) -> Any:
    """The dataclass that ``configs/<config_name>.yaml`` gives with these overrides.

    Raises:
        UserError: for a mandatory value that nothing has set; Hydra's own errors for what it does not know.
    """
    register_schemas()
    with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return to_object(hydra.compose(config_name, list(overrides)))


@contextmanager
def user_errors() -> Iterator[None]:
    """Exit codes and messages of a command.

    A UserError, or anything wrong with the configuration itself, ends the process with one line on stderr and exit code
    2, Ctrl-C with one line and 130, SIGTERM likewise and 143, and an output that nobody reads any more (``| head``)
    without a word and 141. Every other exception keeps its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # names and signs that the locale lacks are no reason to end
            stream.reconfigure(errors="backslashreplace")
    try:
        with quiet_pipe(), terminating():
            yield
    except USER_FAULTS as error:
        _report(error)
        leave(2)
    except Terminated:
        print("error: terminated (SIGTERM)", file=sys.stderr)
        leave(128 + signal.SIGTERM)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        leave(128 + signal.SIGINT)


def run_command(commands: Mapping[str, Callable[[], None]], default: str | None = None) -> None:
    """Run the command that the first argument names; ``default`` where it names none.

    Hydra sees the arguments after it, so ``analyze.py advise --help`` is the help of advise.
    """
    with user_errors():
        _run_command(commands, default)


def _run_command(commands: Mapping[str, Callable[[], None]], default: str | None) -> None:
    program, first = Path(sys.argv[0]).name, sys.argv[1] if len(sys.argv) > 1 else "--help"
    if first in commands:
        sys.argv[:2] = [sys.argv[0]]
        commands[first]()
    elif default is not None and (first.startswith("-") or "=" in first):
        commands[default]()
    elif first in ("-h", "--help"):
        print(f"python scripts/{program} COMMAND key=value ...   (COMMAND --help says more)\n")
        for name, command in commands.items():
            print(f"  {name:<10} {(command.__doc__ or '').splitlines()[0]}")
    else:
        near = difflib.get_close_matches(first, commands, n=1)
        fix = f"did you mean {near[0]}?" if near else f"use one of: {', '.join(commands)}"
        print(f"error: {program} has no command {first!r}; {fix}", file=sys.stderr)
        sys.exit(2)


def to_object(composed: DictConfig) -> Any:
    """The composed configuration as its dataclass, every interpolation resolved.

    Raises:
        UserError: for a mandatory value that nothing has set.
    """
    try:
        return OmegaConf.to_object(composed)
    except MissingMandatoryValue as error:
        key = error.full_key
        raise UserError(f"{key} is not set; give it on the command line ({key}=...) or in an experiment") from error


def hydra_arguments(arguments: Sequence[str], config_name: str) -> list[str]:
    """Arguments as Hydra takes them.

    ``--key value`` and ``--flag`` of the configuration's own keys become ``key=value`` and ``flag=true``; ``+group=``
    loses its plus where the group has a default, since Hydra would add a second option to it. ``test_time=[auto,none]``
    becomes the first option and a list of the others, since Hydra would merge them into one. The value of a key that
    is a text is taken as it is written, except in a sweep, whose commas divide it.
    """
    kinds = {f.name: str(f.type) for f in fields(SCHEMAS[config_name])}
    defaults = OmegaConf.to_container(OmegaConf.load(CONFIG_DIR / f"{config_name}.yaml"))["defaults"]  # type: ignore
    groups = {str(group) for entry in defaults if isinstance(entry, dict) for group in entry}
    result: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        key, equals, value = argument.removeprefix("--").partition("=")
        if argument.startswith("--") and key.replace("-", "_") in kinds:
            key = key.replace("-", "_")
            if not equals:
                value = "true" if kinds[key] == "bool" else next(rest, "")
            result.append(f"{key}={value}")
        elif key in groups and f"{key}s" in kinds and value[:1] + value[-1:] == "[]":  # several options of a group
            first, *others = value[1:-1].split(",")
            result += [f"{key}={first.strip()}", f"{key}s=[{','.join(others)}]"]
        elif argument.startswith("+") and argument[1:].partition("=")[0] in groups:
            result.append(argument[1:])
        else:
            result.append(argument)
    if {"-m", "--multirun"} & {*result}:
        return result
    return [_as_text(word) if kinds.get(word.partition("=")[0], "").startswith("str") else word for word in result]


def _as_text(argument: str) -> str:
    """An override whose value Hydra reads as a text; what it would read as a list, a number or a call is quoted."""
    key, equals, value = argument.partition("=")
    try:
        override = OverridesParser.create().parse_override(argument)
        if not override.is_sweep_override() and isinstance(override.value(), str | None):
            return argument
    except HydraException:
        pass
    return f"{key}={QuotedString(value, Quote.single).with_quotes()}" if equals else argument


def plain_argument(argument: str, swept: bool = False) -> str:
    """``model=X`` of a command that reads a model as ``model.path=X``: only training has a model group.

    The path is a text, and taken as it is written, except in a sweep: of a directory 1e5 Hydra would make 100000.0.
    """
    key, equals, value = argument.partition("=")
    if key not in ("model", "model.path"):
        return argument
    return f"model.path{equals}{value}" if swept else _as_text(f"model.path{equals}{value}")


def check_working_directory() -> None:
    """Raise UserError where the working directory is gone, as after another shell has made it anew."""
    try:
        os.getcwd()
    except OSError as error:
        raise UserError(
            f"the working directory cannot be used ({error.strerror}); cd into one that is there"
        ) from error


def check_grammar(arguments: Sequence[str]) -> set[str]:
    """Check that Hydra can parse the overrides among the arguments; returns the keys that are swept.

    Raises:
        UserError: naming the first that it cannot, and the quoted form that it can; or a path that begins with ~.
    """
    parser, swept = OverridesParser.create(), set()
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if argument.startswith("-") or not equals:
            continue
        if not key.strip("+~"):
            raise UserError(f"{argument} has no key before its =; write KEY{argument.lstrip('+~')}")
        if HOME.search(value):
            raise UserError(
                f"{argument} has a ~ that no shell expands, as a word does not begin with it, and would be a directory "
                f"of that name; write {key}={HOME.sub('$HOME', value)}"
            )
        try:
            if (override := parser.parse_override(argument)).is_sweep_override():
                swept.add(override.key_or_group)
        except HydraException as error:
            fixed = f"{key}={_quoted(value)}"
            fix = f"write it as {shlex.quote(fixed)}"
            try:
                parser.parse_override(fixed)
            except HydraException:
                fix = "write it in a file of configs/experiment, where YAML's rules hold"
            raise UserError(f"Hydra cannot read {argument}, which has characters of its grammar; {fix}") from error
    return swept


def _quoted(value: str) -> str:
    """A value of Hydra's grammar with its strings quoted; those of a list or of a mapping's values each by itself."""
    inner = value[1:-1].split(",")
    match value[:1] + value[-1:]:
        case "[]":
            return f"[{','.join(map(_quoted, inner))}]"
        case "{}":
            pairs = (pair.partition(":") for pair in inner)
            return f"{{{','.join(f'{name}: {_quoted(content)}' for name, _, content in pairs)}}}"
    bare = value.strip().strip("\"'")
    return bare if bare.replace(".", "", 1).isdigit() else '"' + bare.replace('"', r"\"") + '"'


def _print_once(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def _report(error: Exception) -> str:
    """Print an error in one line, once a node; returns it."""
    message = str(error)
    if isinstance(error, CompactHydraException) and error.__cause__ is not None:
        message = f"{message.splitlines()[0]} {str(error.__cause__).splitlines()[0]}"
    if isinstance(error, (CompactHydraException, OmegaConfBaseException)):  # without the search path, with a way on
        message = f"{message.split('Config search path')[0].strip().rstrip('.')}; {_fix(message)}"
    message = " ".join(message.split())
    if "RANK" not in os.environ or os.environ.get("LOCAL_RANK", "0") == "0":  # one line a node, not one a GPU
        print(f"error: {message}", file=sys.stderr)
    return message


def _fix(message: str) -> str:
    """The fix for a value that must be a list, or for an unknown key or option: the nearest key, if there is one."""
    if alone := re.search(r"override (\S+?)=(.+?) Invalid value assigned: \w+ is not a ListConfig", message):
        return f"write it as {alone[1]}=[{alone[2]}]"
    unknown = re.search(r"Key '(\w+)' not in '(\w+)'", message)
    schema = schema_class(unknown.group(2)) if unknown else None
    near = difflib.get_close_matches(unknown.group(1), [f.name for f in fields(schema)]) if unknown and schema else []
    if near:
        return f"did you mean {near[0]}?"
    return "--cfg job shows every key with its value, --help every option of a group"
