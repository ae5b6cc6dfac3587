"""The command line: `distseg VERB [key=value ...]`. Composes the verb's config with Hydra, calls one function of `api`.

Each verb is conf/VERB.yaml over its dataclass in `config.verbs`; `preset`, `method` and `matching` are groups from
`config.presets`. Hydra writes nothing, changes no directory and logs nothing. Exit codes: 0 done, 1 a fault of ours,
2 bad input or config (one line on stderr), 3 finished with failures (listed), 130 interrupted; DISTSEG_TRACEBACK=1
adds the traceback. Imports stay inside functions: spawned processes import this module again.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distseg import __version__
from distseg.doors import (
    VERBS,
    Verb,
    check_overrides,
    complete_verb,
    first_line,
    help_template,
    literal_override,
    usage,
)
from distseg.errors import ConfigError, DistsegError, InputError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from distseg.doors import Override

OK, FAULT, INTERRUPTED = 0, 1, 130
# The user's machine, not our code: said in one line like any other bad input.
_STORAGE = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO)
_ENVIRONMENT = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG, errno.ENOTDIR),
    *_STORAGE,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the console script's entry. Returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _main(arguments)
    except KeyboardInterrupt:
        return _say("interrupted; the same command again resumes", INTERRUPTED)
    except BrokenPipeError:  # the reader of our output went away, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except Exception as error:
        return _explain(error)


def _main(arguments: list[str]) -> int:
    if (arguments and arguments[0] in ("-sc", "--shell-completion")) or _asks_completion(arguments):
        return _complete(arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return OK
    if arguments[0] == "--version":
        print(f"distseg {__version__}")
        return OK
    verb = Verb.named(arguments[0])
    if "--version" in arguments[1:]:
        print(f"distseg {__version__}")
        return OK
    return _run_verb(verb, arguments[1:])


def _run_verb(verb: Verb, arguments: list[str]) -> int:
    flags = _parse_flags(arguments)
    given = [literal_override(argument) for argument in flags.overrides]
    overrides = check_overrides(verb, _parse(given))
    swept = {override.key: word for override, word in zip(overrides, given, strict=True) if override.is_sweep}
    if swept and not flags.multirun:
        raise ConfigError("several values for one run", where=next(iter(swept.values())), fix="add --multirun")
    derived, notice = _derived(verb, overrides)
    switches = [argument for argument in arguments if argument not in flags.overrides]
    codes: list[int] = []

    def job(composed: DictConfig) -> None:
        # Hydra prints a report of its own for what a job raises, so nothing but an interrupt may pass.
        try:
            _call(verb, composed, notice, _sweep_folder(swept))
        except Exception as error:
            codes.append(_explain(error))

    with tempfile.TemporaryDirectory(prefix="distseg-sweep-") as scratch:  # Hydra insists on writing multirun.yaml
        # Switches first: argparse refuses overrides on both sides of one.
        _hydra(verb, [*switches, *_quiet(verb, scratch, flags.overrides), *derived, *given], job)
    return max(codes, default=OK)


def _call(verb: Verb, composed: DictConfig, notice: str, sweep_folder: str) -> None:
    from omegaconf import OmegaConf

    from distseg.config.compose import to_typed

    # Unresolved, so that an escaped "${" in a path is unescaped once only, by the typed config.
    plain = OmegaConf.to_container(composed, resolve=False)
    node = OmegaConf.merge(OmegaConf.structured(verb.schema()), plain)
    config = to_typed(node, verb.schema())  # type: ignore[arg-type]  # a structured config merged is a DictConfig
    if notice:
        print(notice, flush=True)
    if sweep_folder:
        config.run = os.path.join(config.run, sweep_folder)
        print(f"run: {config.run}", flush=True)
    verb.call(config)


def _derived(verb: Verb, overrides: Sequence[Override]) -> tuple[list[str], str]:
    """What the given keys decide about others: the preset where none was asked for, and the device's groups."""
    if not verb.takes_groups:
        return [], ""
    from distseg.config.presets import default_preset

    chosen = {override.key: override.values for override in overrides}
    key = "resources.gpus_per_worker"
    gpus = {_number(key, value) for value in chosen.get(key) or [0.0]}
    if len({value > 0 for value in gpus}) > 1:
        raise ConfigError("cannot sweep between CPU and GPU", where=key, fix="start one sweep for each")
    on_gpu = max(gpus) > 0
    derived = ["derived/device=gpu"] if on_gpu else []
    if "preset" in chosen:
        return derived, ""
    preset = default_preset(max(gpus))
    why = "workers have GPUs" if on_gpu else "workers have no GPU"
    return [*derived, f"preset={preset}"], f"preset={preset} (default, as {why}; preset=... chooses another)"


def _number(key: str, value: object) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    raise ConfigError("not a number", where=key, value=value, fix=f"set {key}=0 or {key}=1")


def _sweep_folder(swept: Collection[str]) -> str:
    """Each job of a sweep has its own folder under `run`, named after the swept keys' values."""
    if not swept:
        return ""
    from hydra.core.hydra_config import HydraConfig

    pairs = [item.split("=", 1) for item in HydraConfig.get().overrides.task]
    return ",".join(f"{key}={value}" for key, value in pairs if key in swept).replace(os.sep, "_")


# --- Hydra ---------------------------------------------------------------------------------------------------------


def conf_folder() -> Path:
    """conf/ as shipped in the wheel (distseg/conf), or beside the package in a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "train.yaml").is_file():
            return folder
    raise ConfigError("conf/ is not where it was installed", where=package, fix="install distseg again")


def register(verb: Verb) -> None:
    """Tell Hydra's ConfigStore about the verb's schema and groups, which conf/VERB.yaml names, and about its help."""
    from hydra.core.config_store import ConfigStore

    from distseg.config.presets import MATCHINGS, METHODS, ON_GPU, PRESET_METHOD, PRESETS

    store = ConfigStore.instance()
    store.store(name=f"schema_{verb.name}", node=verb.schema())
    help_texts = {"app_name": "distseg", "header": "", "footer": "", "template": help_template(verb)}
    store.store(group="hydra/help", name=f"distseg_{verb.name}", node=help_texts, package="hydra.help")
    if not verb.takes_groups:
        return
    groups: dict[str, dict[str, Any]] = {
        "method": METHODS,
        "preset": PRESETS,
        "matching": MATCHINGS,
        "derived/device": {"cpu": {}, "gpu": {}},
        "derived/preset_device": {f"{preset}_gpu": values for preset, values in ON_GPU.items()},
        "derived/preset_method": {f"{preset}_{method}": values for (preset, method), values in PRESET_METHOD.items()},
    }
    for group, choices in groups.items():
        for name, values in choices.items():
            store.store(group=group, name=name, node=values, package="_global_")


def _hydra(verb: Verb, arguments: list[str], job: Callable[[DictConfig], None]) -> None:
    """Run Hydra's own entry over `arguments`; raises Hydra's errors instead of printing them."""
    import hydra

    register(verb)
    entry = hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name=verb.name)(job)
    with _patched(sys.argv, [sys.argv[0], *arguments]), _environment("HYDRA_FULL_ERROR", "1"):
        try:
            entry()
        except ValueError as error:  # switches that exclude each other
            raise ConfigError(first_line(error), fix="distseg VERB --hydra-help explains the switches") from error
        except SystemExit as stop:  # --help leaves this way
            if stop.code not in (None, 0):
                raise


def _quiet(verb: Verb, scratch: str, overrides: Sequence[str]) -> list[str]:
    """No log files, no output folder, no change of directory; a user's hydra.* still wins."""
    settings = {
        "hydra/job_logging": "none",
        "hydra/hydra_logging": "none",
        "hydra/help": f"distseg_{verb.name}",
        "hydra.output_subdir": "null",
        "hydra.run.dir": ".",
        "hydra.sweep.dir": f"'{scratch}'",
        "hydra.job.chdir": "false",
        "hydra.job.name": verb.name,
    }
    given = {override.split("=", 1)[0].lstrip("+~") for override in overrides}
    return [f"{key}={value}" for key, value in settings.items() if key not in given]


def _parse_flags(arguments: Sequence[str]) -> Any:
    """Hydra's own flags and the overrides; raises ConfigError where argparse would print its usage."""
    from hydra._internal.utils import get_args_parser

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return get_args_parser().parse_intermixed_args(list(arguments))
    except SystemExit:
        said = complaint.getvalue().strip().splitlines()
        raise ConfigError(said[-1].split("error: ", 1)[-1], fix="distseg VERB --hydra-help lists the flags") from None


def _parse(arguments: Sequence[str]) -> list[Override]:
    """Overrides as Hydra reads them: key, and the values it takes (several in a sweep, None if not a choice)."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import ChoiceSweep
    from hydra.errors import HydraException

    from distseg.doors import Override

    parser = OverridesParser.create()
    overrides = []
    for argument in arguments:
        try:
            parsed = parser.parse_override(argument)
        except HydraException as error:
            raise ConfigError(
                "not understood as key=value", where=argument, rule=first_line(error), fix="quote special characters"
            ) from None
        value = parsed.value() if not parsed.is_delete() else None
        values = value.list if isinstance(value, ChoiceSweep) else None if parsed.is_sweep_override() else [value]
        overrides.append(Override(parsed.key_or_group, values, parsed.is_sweep_override(), parsed.is_delete()))
    return overrides


def _asks_completion(arguments: Sequence[str]) -> bool:
    return len(arguments) > 1 and arguments[1] in ("-sc", "--shell-completion")


def _complete(arguments: list[str]) -> int:
    """`eval "$(distseg -sc install=bash)"`: verbs are completed here, a verb's keys by Hydra."""
    request = arguments[-1]
    if not request.startswith("query="):
        _hydra(VERBS["train"], ["-sc", request], lambda _: None)
        return OK
    line = os.environ.get("COMP_LINE", "")
    verbs = complete_verb(line)
    if verbs is not None:
        print(" ".join(verbs))
        return OK
    program, name, *rest = line.split(" ", 2)
    with _environment("COMP_LINE", " ".join([program, *rest])):
        _hydra(Verb.named(name), ["-sc", request], lambda _: None)
    return OK


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextlib.contextmanager
def _patched(values: list[str], replacement: Sequence[str]) -> Iterator[None]:
    before = list(values)
    values[:] = replacement
    try:
        yield
    finally:
        values[:] = before


# --- errors --------------------------------------------------------------------------------------------------------


def _explain(error: Exception) -> int:
    """Say what went wrong, once, and return the exit code."""
    if os.environ.get("DISTSEG_TRACEBACK") == "1":
        traceback.print_exception(error)
    known = _known(error)
    if known is not None:
        return _say(str(known), known.exit_code)
    return _say(
        f"internal error: {type(error).__name__}: {first_line(error)}; this is a fault of distseg, "
        "DISTSEG_TRACEBACK=1 shows where",
        FAULT,
    )


def _environment_error(number: int | None, reason: str | None, file: object) -> InputError:
    fix = "choose another path"
    if number in (errno.ENOSPC, errno.EDQUOT):
        fix = "make room; the same command goes on"
    elif number in _STORAGE:
        fix = "the same command goes on once the storage answers"
    return InputError(reason or "not possible here", where=file, fix=fix)


def _known(error: Exception) -> DistsegError | None:
    """Our error behind what was raised, also where Ray, Hydra or OmegaConf wrapped it."""
    cause = getattr(error, "cause", None)  # Ray's name for the exception of a task
    if isinstance(cause, DistsegError):
        return cause
    if isinstance(error, DistsegError):
        return error
    if isinstance(error, MemoryError):
        return InputError(
            "out of memory", fix="free some, or ask for less; dry_run=true tells what train and label take"
        )
    if isinstance(error, OSError) and error.errno in _ENVIRONMENT:
        return _environment_error(error.errno, error.strerror, error.filename)
    broken = re.search(r"\(os error (\d+)\)", str(error)) if type(error).__module__.startswith("safetensors") else None
    if broken is not None:  # how its Rust side says it
        return _environment_error(int(broken[1]), os.strerror(int(broken[1])), None)
    if type(error).__module__.split(".")[0] in ("hydra", "omegaconf", "antlr4"):
        reason = error.__cause__ or error
        where = getattr(reason, "full_key", None) or None
        return ConfigError(first_line(reason), where=where, fix="distseg VERB --help lists the keys")
    return None


def _say(message: str, code: int) -> int:
    print(message, file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
