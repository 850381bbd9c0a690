"""What Pearl is compared with, and its variants: each a class that overrides one part of a method.

A name of --method finds its class here, and several names joined by + make one class of all:
mlp_head+vicreg is `class Method(MLPHead, VICReg)`. Each class calls super() for the rest.
"""

from baselines.anti_collapse import InfoNCE, MLPHead, RunningMean, SIGReg, VICReg
from baselines.release import Paper, Release
from baselines.reconstruction import Recon
from baselines.training_records import (Both, Direct, ImageFirst, SelfDistill, StripCalls,
                                        WithAnswers)
from baselines.variants import (EMA, AnswerMean, Centred, Current, Dropout, NextLatFactor, NoJEPA,
                                NoNextLat, RandomTarget, Shuffled, TargetState, TaskMean, TwoPasses)
from train import SFT, Pearl

# in the order in which they are combined: what chooses records comes before what reads them, and
# what weighs a term before what replaces it
METHODS = dict(
    with_answers=WithAnswers, image_first=ImageFirst, strip_calls=StripCalls,
    both=Both, direct=Direct, recon=Recon, no_nextlat=NoNextLat, nextlat_factor=NextLatFactor,
    paper=Paper, release=Release, mlp_head=MLPHead, running_mean=RunningMean,
    infonce=InfoNCE, vicreg=VICReg, sigreg=SIGReg, no_jepa=NoJEPA, shuffled=Shuffled,
    random=RandomTarget, task_mean=TaskMean, answer_mean=AnswerMean, dropout=Dropout,
    two_passes=TwoPasses, centred=Centred, target_state=TargetState, ema=EMA, current=Current,
    self_distill=SelfDistill, sft=SFT, pearl=Pearl)


def find(name: str) -> type[Pearl]:
    """The class for a name, or several joined by +. Raises ValueError."""
    names = name.split("+")
    if unknown := [one for one in names if one not in METHODS]:
        raise ValueError(f"unknown method {unknown[0]!r}: choose from {', '.join(METHODS)}, or "
                         "join several by +")
    classes = [METHODS[name] for name in METHODS if name in names]
    # a class whose subclass is there too adds nothing
    bases = tuple(cls for cls in classes if sum(issubclass(one, cls) for one in classes) == 1)
    # what Pearl's step calls for its latent terms; a method with a step of its own has none of them
    # that another could change
    terms = ("encode_views", "encode_target", "target", "jepa", "nextlat", "prepare")
    own_step = [cls for cls in bases if cls.forward is not Pearl.forward]
    idle = [cls for cls in bases if cls not in own_step and "records" not in vars(cls)
            and any(getattr(cls, name) is not getattr(Pearl, name) for name in terms)]
    if own_step and idle:
        raise ValueError(f"--method {name}: {own_step[0].__name__} has none of the terms that "
                         f"{idle[0].__name__} changes")
    return bases[0] if len(bases) == 1 else type("Method", bases, {})
