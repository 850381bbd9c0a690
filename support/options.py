"""The command line of a run: a dataclass of options."""

import argparse
import dataclasses
import importlib
from functools import partial
from typing import get_args

import torch
from transformers.hf_argparser import string_to_bool

# the least values of numbers; of all others it is 0
LEAST = dict.fromkeys(("steps", "batch", "accumulate", "horizon", "eval_every", "test_per_task"),
                      1) | dict(train_examples=2, workers=-1, target_layer=-1)


def option(default, help: str):
    """A field of a config: its default and its line in --help."""
    return dataclasses.field(default=default, metadata=dict(help=help))


def parse(config_class: type, argv: list[str] | None, description: str):
    """An instance of config_class from the command line; --help has a line for each option."""
    formatter = partial(argparse.RawDescriptionHelpFormatter, max_help_position=34, width=120)
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter,
                                     usage="%(prog)s [--OPTION VALUE ...]", allow_abbrev=False)
    for field in dataclasses.fields(config_class):
        choices, help = get_args(field.type), field.metadata["help"].replace("%", "%%")
        # a switch is off, a number 0 and a text empty unless it is given
        help += f" ({field.default})" if field.default else ""
        kind = dict(choices=choices, metavar="|".join(choices)) if choices else dict(
            type=field.type, metavar=field.type.__name__.upper())
        if field.type is bool:
            kind |= dict(type=string_to_bool, nargs="?", const=True)
        parser.add_argument(f"--{field.name}", default=field.default, help=help, **kind)
    config = config_class(**vars(parser.parse_args(argv)))
    for field in dataclasses.fields(config):
        value, least = getattr(config, field.name), LEAST.get(field.name, 0)
        if isinstance(value, (int, float)) and value < least:
            parser.error(f"--{field.name} must be at least {least}, not {value}")
    try:
        torch.empty(0, device=config.device)
    except (RuntimeError, AssertionError):
        parser.error(f"--device {config.device}: PyTorch has no such device on this machine")
    return config


def value_of(name: str, argv: list[str] | None, default: str) -> str:
    """The value of one option, before the others are known."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(f"--{name}", default=default)
    return vars(parser.parse_known_args(argv)[0])[name]


def with_options(config_class: type, methods: list[type]) -> type:
    """config_class with the options of these methods. A method's `Options` is a dataclass: a field
    that config_class has too gets the method's default."""
    # dataclasses collect the fields from the last base to the first
    bases = dict.fromkeys(cls.Options for cls in methods if "Options" in vars(cls))
    return dataclasses.make_dataclass("Config", [], bases=(*bases, config_class))


def room(name: str, needed_for: str):
    """A module of a folder that a fork may have deleted (baselines, world)."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not name.startswith(str(error.name)):
            raise
        raise ValueError(f"there is no folder {name.split('.')[0]}/ here, and {needed_for} "
                         "needs it") from None
