"""The command line of a run: a dataclass of options, read by transformers' HfArgumentParser."""

import argparse
import dataclasses
import importlib
import sys
from functools import partial

import torch
from transformers import HfArgumentParser

# the least values of numbers; of all others it is 0
LEAST = dict(train_examples=2, workers=-1, target_layer=-1) | dict.fromkeys(
    "steps batch accumulate horizon eval_every test_per_task per_task sample".split(), 1)


def option(default, help: str):
    """A field of a config: its default and its line in --help."""
    return dataclasses.field(default=default, metadata=dict(help=help))


class ShortHelp(argparse.RawDescriptionHelpFormatter):
    """One line per option: one spelling, its meaning, its default."""

    def _get_help_string(self, action: argparse.Action) -> str:
        # a switch is off and a text is empty unless it is given
        empty = action.default in (None, "", False, argparse.SUPPRESS)
        return action.help if empty else f"{action.help} (%(default)s)"

    def _format_action_invocation(self, action: argparse.Action) -> str:
        # HfArgumentParser takes --lora-rank as well as --lora_rank; one of them is enough here
        name = action.option_strings[0]
        if action.nargs == 0 or action.const is True:
            return name
        values = "|".join(map(str, action.choices)) if action.choices else ""
        return f"{name} {values or getattr(action.type, '__name__', 'text').upper()}"


def parse(config_class: type, argv: list[str] | None, description: str):
    """An instance of config_class from the command line."""
    layout = partial(ShortHelp, max_help_position=34, width=120)
    parser = HfArgumentParser(config_class, description=description, allow_abbrev=False,
                              formatter_class=layout, usage="%(prog)s [--OPTION VALUE ...]")
    config, = parser.parse_args_into_dataclasses(sys.argv[1:] if argv is None else argv)
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
    """config_class with the options of these methods. A method's `Options` has the fields of a
    dataclass; one that config_class has too gets the method's default."""
    own = [cls.Options for cls in methods if "Options" in vars(cls)]
    # each becomes a dataclass at its first use, because a second time would lose the help
    bases = [cls if dataclasses.is_dataclass(cls) else dataclasses.dataclass(cls) for cls in own]
    # dataclasses collect the fields from the last base to the first
    return dataclasses.make_dataclass("Config", [], bases=(*bases, config_class))


def optional_folder(name: str, needed_for: str):
    """A module of a folder that a fork may have deleted (baselines, world)."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not name.startswith(str(error.name)):
            raise
        raise ValueError(f"there is no folder {name.split('.')[0]}/ here, and {needed_for} "
                         "needs it") from None
