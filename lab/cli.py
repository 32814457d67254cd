"""The command line of a script, made of a frozen dataclass. Needs no torch.

    @dataclass(frozen=True, kw_only=True)
    class Config:
        epochs: int = flag(20, "passes over the training split")

    cfg = parse(Config, __doc__, argv, PROTOCOLS)
    sys.exit(guard(main))
"""

import argparse
import dataclasses
import sys
import typing
from collections.abc import Callable
from dataclasses import field
from pathlib import Path

from lab.files import BadInput
from lab.guard import guard as guard


def flag(default: object, help: str, local: bool = False, named: bool = False) -> typing.Any:
    """A setting: its default and what `-h` says of it.

    `local` marks where and how a run is made, but not what it computes: it may differ between two
    halves of one run, and no record holds it. Of a folder, or a file in one, that is `named` the
    default `--out` has the folder's name.
    """
    return field(default=default, metadata={"help": help, "local": local, "named": named})


def local(config: object) -> set[str]:
    """The names of the settings that say where and how a run is made."""
    return {setting.name for setting in dataclasses.fields(config) if setting.metadata["local"]}


def defaults(config: type) -> dict[str, object]:
    """{setting: its default} of all settings of a config that are not local."""
    return {setting.name: setting.default for setting in dataclasses.fields(config)
            if not setting.metadata["local"]}


class Parser(argparse.ArgumentParser):
    """One line for a wrong flag, where argparse prints the whole usage too."""

    def error(self, message: str) -> typing.NoReturn:
        raise BadInput(f"{message}; see {self.prog} -h")


def run_command(commands: dict[str, tuple[type, Callable]], doc: str,
                argv: list[str] | None = None) -> None:
    """Run the command, of {name: (config, function of it)}, that the first word of argv names.

    Where it names none, the first command is meant.
    """
    argv = sys.argv[1:] if argv is None else argv
    name = next(iter(commands))
    if argv and argv[0] in commands:
        name, *argv = argv
    config, function = commands[name]
    function(parse(config, doc, argv, prog=f"{Path(sys.argv[0]).name} {name}"))


def parse(config: type, doc: str, argv: list[str] | None = None,
          protocols: dict[str, dict] | None = None, prog: str | None = None) -> typing.Any:
    """Command line -> config: its defaults, over them the protocol's, over them the flags given.

    protocols are {name: settings}, the first one the default of `--protocol`; without them a config
    that has a `protocol` knows one, its defaults.
    """
    parser = Parser(prog, description=doc, allow_abbrev=False, argument_default=argparse.SUPPRESS,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    if protocols is None and (protocol := getattr(config, "protocol", None)):
        protocols = {protocol: {}}
    own = config.__annotations__  # what the script adds comes first
    for setting in sorted(dataclasses.fields(config), key=lambda setting: setting.name not in own):
        default = "" if setting.default is None else f" ({setting.default})"
        options = {"help": setting.metadata["help"] + default}
        if setting.name == "protocol":
            options["choices"] = list(protocols)
        elif setting.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(setting.type) is typing.Literal:
            options["choices"] = typing.get_args(setting.type)
        elif tuple[str, ...] in typing.get_args(setting.type):
            options |= {"nargs": "+", "metavar": "FILE"}
        else:
            kinds = (setting.type, *typing.get_args(setting.type))  # int, or int | None
            options["type"] = next((kind for kind in (int, float) if kind in kinds), str)
            options["metavar"] = options["type"].__name__.upper()
        parser.add_argument(f"--{setting.name.replace('_', '-')}", **options)
    if protocols is None:
        return config(**vars(parser.parse_args(argv)))
    flags_of = lambda values: "  ".join(f"--{key.replace('_', '-')} {value}"
                                        for key, value in values.items())
    parser.epilog = "protocols:\n" + "\n".join(
        f"  {name:<8}{flags_of(values) or 'the defaults above'}"
        for name, values in protocols.items())
    given = vars(parser.parse_args(argv))
    protocol = given.get("protocol", next(iter(protocols)))
    base = config(**{**protocols[protocol], "protocol": protocol})
    changed = [f"{name}={given[name]}" for name, value in dataclasses.asdict(base).items()
               if name not in local(base) | {"seed"} and given.get(name, value) != value]
    for setting in dataclasses.fields(config):
        if setting.metadata["named"] and given.get(setting.name):
            path = Path(given[setting.name]).absolute()
            changed.append(f"{setting.name}={(path.parent if path.is_file() else path).name}")
    out = Path("runs", parser.prog.removesuffix(".py"), protocol, ",".join(changed) or "base")
    return dataclasses.replace(base, **{"out": str(out), **given})
