"""The command line of a program whose settings are a dataclass: one option a field.

    steps: int = option(300, "optimiser steps")

makes --steps; a field's help, its choices and its least value stand beside its default.
"""

import argparse
import dataclasses
import re


def option(default, help: str, choices: tuple = (), least: float | None = None):
    """A dataclass field with what the command line says and checks of it."""
    return dataclasses.field(default=default, metadata=dict(help=help, choices=choices, least=least))


def boolean(text: str) -> bool:
    """argparse's own bool would read "False" as true."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError("write true or false")
    return text.lower() == "true"


def parser_of(config_class, description: str) -> argparse.ArgumentParser:
    """Unknown names and values stop with the list of known ones; what is not given is left out."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in dataclasses.fields(config_class):
        kind, choices = type(f.default), f.metadata["choices"] or None
        switch = {}
        if kind is bool:
            kind, switch = boolean, dict(nargs="?", const=True)  # --packed alone, or --packed false
        help = f"{f.metadata['help']} (default: {f.default!r})".replace("%", "%%")
        parser.add_argument(f"--{f.name}", type=kind, choices=choices, default=argparse.SUPPRESS,
                            metavar=None if choices else kind.__name__.upper(), help=help, **switch)
    return parser


def underscored(argument: str) -> str:
    """--lora-rank is --lora_rank."""
    return re.sub(r"^--[\w-]+", _with_underscores, argument)


def _with_underscores(name: re.Match) -> str:
    return "--" + name[0][2:].replace("-", "_")


def given_options(parser: argparse.ArgumentParser, config_class, argv: list[str],
                  moved: dict[str, str] | None = None) -> dict:
    """The options that were given, each checked by itself. moved: old spelling -> what to write now."""
    argv = [underscored(argument) for argument in argv]
    for argument in argv:
        name = argument.split("=")[0]
        if name in (moved or {}):
            parser.error(f"{name} has moved: {moved[name]}")
    given = vars(parser.parse_args(argv))
    for f in dataclasses.fields(config_class):
        least = f.metadata["least"]
        if least is not None and f.name in given and given[f.name] < least:
            parser.error(f"--{f.name} must be at least {least}, not {given[f.name]}")
    return given
