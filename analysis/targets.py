"""What does h_R tell? Before any training: what L_JEPA would teach, measured on the training trajectories.

    python analysis/targets.py                               # the shipped model: half a minute on one core
    python analysis/targets.py --model MODEL --data DIR      # yours; takes the options of train.py

Pearl predicts h_R from image and question. What of it depends on the answer can teach answering; what is common to all
trajectories, or to all of a family, cannot. RESULTS.md ("What h_R tells") shows what becomes of Pearl
where h_R hardly tells the answer. Families and answers must repeat in the data: with an answer of its own for every record
there is nothing to average, and answer_by_chance comes close to answer.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import losses  # noqa: E402
import train  # noqa: E402
from analysis.figures import embeddings, shares  # noqa: E402


def report(config: train.Config) -> str:
    world = train.load_examples(config)[0][:config.train_examples]
    _, targets = embeddings(None, config, world)
    found, gauges = shares(targets, world), losses.collapse_gauges(targets, targets)
    return (f"h_R of {config.model} on {len(world)} trajectories of {config.data or config.regime}, shares of its squared length:\n"
            f"  {found['common']:.3f} is common to all\n"
            f"  {found['family']:.3f} tells the family\n"
            f"  {found['answer']:.3f} tells the answer within the family ({found['answer_by_chance']:.3f} with answers dealt anew)\n"
            f"  {found['rest']:.3f} tells something else\n"
            f"mean cosine of two h_R {gauges['mean_cosine']:.3f}, effective rank {gauges['effective_rank']:.1f}")


if __name__ == "__main__":
    try:
        print(report(train.parse_config()))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
