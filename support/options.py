"""Every option of a run: its default, its meaning, its values; and the recipes, which set several.

    steps: int = option(200, "optimiser steps", least=1)

makes --steps; a field's help, its choices and its least value stand beside its default.
"""

import argparse
import dataclasses
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch


def option(default, help: str, choices: tuple = (), least: float | None = None,
           old: dict[str, str] | None = None):
    """A dataclass field with what the command line says and checks of it.

    old: values that were written once -> how they are written now; still understood.
    """
    return dataclasses.field(default=default, metadata=dict(help=help, choices=choices, least=least,
                                                            old=old))


TINY = str(Path(__file__).resolve().parent.parent / "tiny-vlm")
CUDA = torch.cuda.is_available()
LAYERS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"


@dataclass
class Config:
    """One run: every field an option, defaults the run that README reports."""

    # what is trained, on what
    method: str = option("pearl", "sft: L_VLM alone; direct: answers alone; both; recon",
                         ("pearl", "sft", "direct", "both", "recon"))
    recipe: str = option("ours", "sets the fields of RECIPES; options beside it win",
                         ("ours", "paper", "release"))
    model: str = option(TINY, "checkpoint folder or hub id")
    data: str = option("", "a data folder; empty: the procedural world")
    regime: str = option("single", "the world's trajectories (world/README.md)")
    outside_images: bool = option(False, "image paths and links may leave the data folder")
    answer_prefix: str = option("Answer:", "what a final text puts before the answer")
    order: str = option("text_first", "call, then image; image_first: the paper's R",
                        ("text_first", "image_first"))
    out: str = option("", "run folder; empty: runs/METHOD-REGIME-seedSEED")
    seed: int = option(0, "initial weights, data order, dropout")
    device: str = option("cuda" if CUDA else "cpu", "any PyTorch device")
    dtype: str = option("float32", "of the frozen weights; on a GPU arithmetic is bfloat16 anyway",
                        ("float32", "bfloat16"))

    # the method
    lambda_latent: float = option(5.0, "Eq. 4 (paper 0.2); of recon: its loss's weight", least=0)
    pred_tokens: int = option(4, "K; 0: h^_R is the state of the last prompt token", least=0)
    distance: str = option("cosine", "D of Eq. 1",
                           ("cosine", "smoothl1", "mse", "l2", "infonce"))
    infonce_masked: bool = option(True, "no negatives of the same family and answer")
    jepa: bool = option(True, "false: L = L_VLM + lambda L_NextLat, an ablation")
    target_encoder: str = option("frozen", "whose Enc gives h_R: the starting model's, the current "
                                 "one's, or a moving average's", ("frozen", "current", "ema"))
    ema: float = option(0.996, "m of that average", least=0)
    ema_rises: bool = option(False, "m rises to 1 at the last step, in a straight line (I-JEPA)")
    target_layer: int = option(-1, "h_R is a state that enters this layer, counted from 0; -1: the "
                               "last, after the norm", least=-1)
    target_position: str = option("end", "of h_R in R: its last token, its last word, the mean "
                                  "over words, or over the tokens of tool images",
                                  ("end", "word", "words", "image"))
    pred_head: str = option("none", "between h^_R and L_JEPA", ("none", "bias", "mlp"))
    vicreg: float = option(0.0, "weight of VICReg's terms on h_R, beside L_JEPA", least=0)
    vicreg_terms: str = option("both", "variance and covariance, or the first alone",
                               ("both", "std"))
    sigreg: float = option(0.0, "weight of SIGReg (LeJEPA) on h_R, beside L_JEPA", least=0)
    with_answers: float = option(0.0, "share of the questions that are learned as bare answers too",
                                 least=0)
    target_view: str = option("trajectory", "what h_R sees: R alone, or I0 too",
                              ("trajectory", "trajectory_with_image"))
    targets: str = option("own", "of L_JEPA; the others are controls",
                          ("own", "shuffled", "random", "family", "answer"))
    nextlat_view: str = option("full", "whose states Eq. 2 runs along",
                               ("full", "trajectory", "none"))
    nextlat_sees_next: bool = option(True, "the latent predictor is given the next embedding")
    nextlat_mean: str = option("tokens", "of Eq. 2: over all t, or an example's, then the batch",
                               ("tokens", "examples"))
    nextlat_token: str = option("none", "also decode h^_{t+1}: to the token it was fed, t+1 (the "
                                "release), or to the next", ("none", "fed", "next"),
                                old=dict(true="next", false="none"))
    pred_position: str = option("prompt", "[PRED] behind the generation prompt, or in the user's "
                                "turn, h^_R at its end (the release)", ("prompt", "user_turn"))
    predictor_weights: str = option("trained", "lora: random and frozen but for LoRA (the release)",
                                    ("trained", "lora"))
    supervise_layout: bool = option(False, "the line break after a turn too (the release)")
    supervise_turns: str = option("all", "last: the answer's alone (the release on LVR data)",
                                  ("all", "last"))
    strip_calls: bool = option(False, "no calls in the texts (the release on PixelReasoner's)")
    horizon: int = option(1, "d of Eq. 2, in tokens", least=1)
    packed: bool = option(True, "full and input view in one pass; false: one pass a view")
    latents: int = option(0, "recon, a tool image: 0 one an image token (LVR); k chunk means",
                          least=0)
    decode_latents: int = option(8, "recon: latents decoded at inference", least=0)

    # optimisation
    steps: int = option(200, "optimiser steps", least=1)
    batch: int = option(32, "examples in one forward pass", least=1)
    accumulate: int = option(1, "forward passes in one optimiser step", least=1)
    lr: float = option(1e-3, "peak; linear warm-up, then cosine to zero", least=0)
    warmup: float = option(0.05, "share of the steps")
    weight_decay: float = option(0.0, "of AdamW")
    clip: float = option(1.0, "gradient norm")
    lora_rank: int = option(64, "0: train all weights of the language model", least=0)
    lora_alpha: float = option(128.0, "the low-rank product counts alpha / rank times")
    lora_dropout: float = option(0.0, "of what enters the low-rank product")
    lora_targets: str = option(LAYERS, "comma-separated layer names, or all-linear")
    train_vision: bool = option(False, "the vision tower too; off: features are made once")
    gradient_checkpointing: bool = option(False, "less memory, a third more time")
    shard: bool = option(False, "several processes each hold a share of frozen layers (FSDP)")
    workers: int = option(2, "threads that prepare the next pass's images", least=0)
    feature_cache_gb: float = option(2.0, "most memory for image features")
    feature_cache: str = option("", "a folder to keep them in from run to run")

    # data, questions, log
    train_examples: int = option(1500, "of the world; of a folder, all", least=1)
    valid_examples: int = option(150, "of a folder, at most so many", least=2)
    test_per_family: int = option(120, "of a folder, at most so many", least=1)
    test_split: str = option("test", "validation, when settings are being chosen",
                             ("test", "validation"))
    free_tokens: int = option(0, "most tokens of a free answer; 0: what the longest needs", least=0)
    call_limit: int = option(0, "also test explicit tool use, at most so many calls", least=0)
    track: int = option(0, "validation questions asked at each validation", least=0)
    world_seed: int = option(0, "of the scenes; a data set of its own for every value")
    eval_every: int = option(50, "steps between validations; the best checkpoint is kept", least=1)
    log_every: int = option(10, "steps between log lines", least=1)
    save_every: int = option(50, "steps between states to --resume from", least=1)
    max_tokens: int = option(2048, "longest view")


RECIPES = {
    "ours": {},
    # the paper's text; its SmoothL1 did not make the reported numbers, the cosine did
    "paper": dict(lambda_latent=0.2, pred_tokens=4, distance="smoothl1", target_encoder="current",
                  target_view="trajectory", nextlat_view="trajectory", nextlat_sees_next=False,
                  lora_rank=64, lora_alpha=128.0),
    # all that the authors' code sets for each of its data sets (docs/differences.md has the rest)
    "release": dict(lambda_latent=0.2, pred_tokens=4, distance="cosine", target_encoder="current",
                    target_view="trajectory_with_image", pred_position="user_turn",
                    supervise_layout=True, order="text_first", nextlat_view="full",
                    nextlat_sees_next=True, nextlat_mean="examples", nextlat_token="fed", horizon=1,
                    predictor_weights="lora", lora_rank=64, lora_alpha=128.0, lora_dropout=0.1,
                    lora_targets="all-linear", train_vision=True, lr=1e-5, warmup=0.05,
                    weight_decay=0.1, clip=1.0),
}
MOVED = {"--check_data": "python analysis/check_data.py takes the same options",
         "--benchmark": "python analysis/benchmark.py steps takes the same options",
         "--center": "the running mean is gone; its row stays in analysis/RESULTS.md"}


def impossible(config: Config) -> str:
    """What is wrong with the options together; empty if nothing is."""
    if config.targets == "shuffled" and config.batch < 2:
        return "--targets shuffled needs --batch 2 or more"
    if config.targets in ("family", "answer") and config.target_encoder != "frozen":
        return (f"--targets {config.targets} is a mean over the data set, which only "
                "--target_encoder frozen has at hand")
    if config.with_answers > 1:
        return f"--with_answers is a share, at most 1, not {config.with_answers}"
    if config.with_answers and config.method not in ("pearl", "sft"):
        return f"--with_answers needs --method pearl or sft, not {config.method}"
    if config.distance == "infonce" and config.batch < 2:
        return "--distance infonce needs --batch 2 or more: the others of a pass are its negatives"
    if config.target_encoder == "ema" and config.nextlat_view == "trajectory":
        return ("--nextlat_view trajectory runs along the current model's states of R, which "
                "--target_encoder ema does not make: use --nextlat_view full or none")
    if config.ema > 1:
        return f"--ema is at most 1, not {config.ema}"
    if (config.vicreg or config.sigreg) and config.target_encoder != "current":
        return ("--vicreg and --sigreg move the h_R that they act on, which only --target_encoder "
                "current does with the model that learns")
    if config.target_position == "image" and config.target_view != "trajectory":
        return "--target_position image needs --target_view trajectory: I0 is no tool image"
    if config.predictor_weights == "lora" and not config.lora_rank:
        return "--predictor_weights lora needs --lora_rank above 0"
    return ""


def parse_config(argv: list[str] | None, description: str, **choices: tuple) -> Config:
    """Config from the command line. choices: of fields whose values another room knows."""
    parser = parser_of(Config, description, choices)
    given = given_options(parser, Config, sys.argv[1:] if argv is None else argv, MOVED)
    config = Config(**RECIPES[given.get("recipe", "ours")] | given)
    if problem := impossible(config):
        parser.error(problem)
    config.out = config.out or f"runs/{config.method}-{config.regime}-seed{config.seed}"
    return config


# ---- from a dataclass to a command line ---------------------------------------------------------


def boolean(text: str) -> bool:
    """argparse's own bool would read "False" as true."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError("write true or false")
    return text.lower() == "true"


def parser_of(config_class, description: str,
              more_choices: dict[str, tuple] | None = None) -> argparse.ArgumentParser:
    """Unknown names and values stop with the list of known ones; what is not given is left out."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in dataclasses.fields(config_class):
        add_field(parser, f, (more_choices or {}).get(f.name, ()))
    return parser


def add_field(parser: argparse.ArgumentParser, f: dataclasses.Field, choices: tuple = ()) -> None:
    """One field of a config as an option of a parser."""
    choices = f.metadata["choices"] or choices or None
    kind = type(f.default)
    switch = {}
    if kind is bool:
        kind, switch = boolean, dict(nargs="?", const=True)  # --packed alone, or --packed false
    elif f.metadata["old"]:
        kind, switch = respelling(f), dict(nargs="?", const=f.metadata["old"].get("true"))
    help = f"{f.metadata['help']} (default: {f.default!r})".replace("%", "%%")
    parser.add_argument(f"--{f.name}", type=kind, choices=choices, default=argparse.SUPPRESS,
                        metavar=None if choices else kind.__name__.upper(), help=help, **switch)


def respelling(field: dataclasses.Field):
    """A type for argparse that takes a value's old spelling too, and says how it is written now."""
    def value(text: str) -> str:
        if (now := field.metadata["old"].get(text.lower())) is None:
            return text
        print(f"--{field.name} {text} is written --{field.name} {now} now", file=sys.stderr)
        return now
    return value


def underscored(argument: str) -> str:
    """--lora-rank is --lora_rank."""
    return re.sub(r"^--[\w-]+", _with_underscores, argument)


def _with_underscores(name: re.Match) -> str:
    return "--" + name[0][2:].replace("-", "_")


def given_options(parser: argparse.ArgumentParser, config_class, argv: list[str],
                  moved: dict[str, str] | None = None) -> dict:
    """The options that were given, each checked by itself. moved: old spelling -> what is now."""
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
