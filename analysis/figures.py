"""The paper's figures and what the embedding knows, from a study (analysis/study.py). Pictures by Pillow, numbers printed.

    python analysis/figures.py runs/study/tiny-vlm/mixed [--out DIR]     # a few minutes on two cores; DIR must be new
    python analysis/figures.py --views figures/views.png                 # the README's picture of the three views

Written to DIR: latents-per-example.png (Fig. 2), latents-decoded.png (Fig. 3), embeddings.png (Fig. 4), skill.png (direct
accuracy against tool accuracy over training), curves.png (training), neighbours.png, and analyses.json with every number.
"""

import argparse
import json
import math
import sys
import textwrap
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import evaluate  # noqa: E402
import losses  # noqa: E402
import train  # noqa: E402
from analysis.tables import summarise  # noqa: E402
from analysis.targets import shares  # noqa: E402
from model import VLM  # noqa: E402
from predictor import Predictor  # noqa: E402
from world import scenes, tools  # noqa: E402

INKS = [(31, 119, 180), (214, 39, 40), (44, 160, 44), (255, 127, 14), (148, 103, 189), (140, 86, 75), (227, 119, 194), (90, 90, 90)]


# ---- charts -----------------------------------------------------------------------------------------------------------


class Chart:
    """One pair of axes: lines and points in data coordinates, a legend on the right."""

    def __init__(self, title: str, x: str, y: str, xs: tuple[float, float], ys: tuple[float, float], size=(760, 420), legend=220):
        self.image = Image.new("RGB", size, "white")
        self.draw, self.font = ImageDraw.Draw(self.image), ImageFont.load_default(13)
        self.left, self.right, self.top, self.bottom = 62, size[0] - legend, 34, size[1] - 48
        self.xs, self.ys, self.names = xs, ys, 0
        self.draw.text((self.left, 8), title, fill="black", font=ImageFont.load_default(15))
        self.draw.text(((self.left + self.right) // 2, size[1] - 20), x, fill="black", font=self.font, anchor="mm")
        turned = Image.new("RGB", (self.bottom - self.top, 16), "white")
        ImageDraw.Draw(turned).text((turned.width // 2, 8), y, fill="black", font=self.font, anchor="mm")
        self.image.paste(turned.rotate(90, expand=True), (2, self.top))
        self.draw.rectangle((self.left, self.top, self.right, self.bottom), outline=(120, 120, 120))

    def ticks(self, xs: dict[float, str] | None = None, count: int = 5) -> "Chart":
        even = lambda low, high: {low + (high - low) * i / count: f"{low + (high - low) * i / count:.3g}" for i in range(count + 1)}
        for value, label in (xs or even(*self.xs)).items():
            px = self.at(value, self.ys[0])
            self.draw.line((px[0], px[1], px[0], px[1] + 4), fill="black")
            self.draw.text((px[0], px[1] + 13), label, fill="black", font=self.font, anchor="mm")
        for value, label in even(*self.ys).items():
            px = self.at(self.xs[0], value)
            self.draw.line((px[0] - 4, px[1], self.right, px[1]), fill=(225, 225, 225))
            self.draw.text((px[0] - 7, px[1]), label, fill="black", font=self.font, anchor="rm")
        return self

    def at(self, x: float, y: float) -> tuple[float, float]:
        share = lambda v, low, high: (v - low) / ((high - low) or 1)
        return (self.left + share(x, *self.xs) * (self.right - self.left),
                self.bottom - share(y, *self.ys) * (self.bottom - self.top))

    def line(self, name: str, points: list[tuple[float, float]], dots: bool = True) -> None:
        ink = INKS[self.names % len(INKS)]
        places = [self.at(*p) for p in points]
        self.draw.line(places, fill=ink, width=2)
        for x, y in places if dots else []:
            self.draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=ink)
        self.label(name, ink)

    def label(self, name: str, ink, mark: str = "dot") -> None:
        y = self.top + 10 + 18 * self.names
        self.names += 1
        self.mark(self.right + 14, y, ink, mark)
        self.draw.text((self.right + 24, y), name, fill="black", font=self.font, anchor="lm")

    def mark(self, x: float, y: float, ink, mark: str) -> None:
        if mark == "dot":
            self.draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=ink)
        else:
            self.draw.line((x - 4, y - 4, x + 4, y + 4), fill=ink, width=2)
            self.draw.line((x - 4, y + 4, x + 4, y - 4), fill=ink, width=2)


def beside(images: list[Image.Image], columns: int) -> Image.Image:
    w, h = max(i.width for i in images), max(i.height for i in images)
    sheet = Image.new("RGB", (w * min(columns, len(images)), h * -(-len(images) // columns)), "white")
    for n, image in enumerate(images):
        sheet.paste(image, (w * (n % columns), h * (n // columns)))
    return sheet


# ---- statistics -------------------------------------------------------------------------------------------------------


def pearson(xs: list[float], ys: list[float]) -> float:
    x, y = (torch.tensor(v, dtype=torch.float64) - sum(v) / len(v) for v in (xs, ys))
    return float((x @ y) / (x.norm() * y.norm()).clamp_min(1e-12))


def tsne(points: Tensor, perplexity: float = 30.0, steps: int = 400) -> Tensor:
    """Exact t-SNE (van der Maaten and Hinton, 2008), started from the first two principal components: (n, D) -> (n, 2)."""
    n = len(points)
    gaps = torch.cdist(points, points).square()
    low, high = torch.zeros(n, 1), torch.full((n, 1), 1e4) / gaps.mean().clamp_min(1e-9)
    diagonal = torch.eye(n, dtype=torch.bool)
    for _ in range(50):  # bisection for the precision that gives each point the wanted perplexity
        beta = (low + high) / 2
        p = F.softmax((-beta * gaps).masked_fill(diagonal, -math.inf), dim=1)
        entropy = -(p * p.clamp_min(1e-30).log()).sum(dim=1, keepdim=True)
        low, high = torch.where(entropy > math.log(perplexity), beta, low), torch.where(entropy > math.log(perplexity), high, beta)
    p = ((p + p.T) / (2 * n)).clamp_min(1e-12)
    _, _, axes = torch.pca_lowrank(points - points.mean(0), q=2, niter=8)
    y = (points - points.mean(0)) @ axes
    y = 1e-2 * y / y.std()
    speed = torch.zeros_like(y)
    for step in range(steps):
        near = 1 / (1 + torch.cdist(y, y).square()).masked_fill(diagonal, math.inf)
        q = (near / near.sum()).clamp_min(1e-12)
        pull = ((4 if step < 100 else 1) * p - q) * near
        gradient = 4 * (pull.sum(dim=1, keepdim=True) * y - pull @ y)
        speed = (0.5 if step < 100 else 0.8) * speed - n / 12 * gradient
        y = y + speed
    return y - y.mean(0)


def separation(points: Tensor, groups: list[str]) -> float:
    """Mean silhouette by cosine distance: 1 clusters far apart, 0 none, negative mixed."""
    gaps = 1 - F.normalize(points, dim=1) @ F.normalize(points, dim=1).T
    names = sorted(set(groups))
    member = torch.tensor([[g == name for name in names] for g in groups], dtype=gaps.dtype)  # (n, groups)
    count = member.sum(0)
    own = (gaps @ member * member).sum(1) / (member @ count - 1).clamp_min(1)
    other = (gaps @ member / count).masked_fill(member.bool(), math.inf).min(1).values
    return float(((other - own) / torch.maximum(other, own).clamp_min(1e-12)).mean())


def probe(x: Tensor, y: Tensor, ridge: float = 1.0) -> float:
    """Linear probe by ridge regression, fitted on the first two thirds, tested on the rest.

    y (n) classes: accuracy. y (n, d) numbers: R^2.
    """
    cut = 2 * len(x) // 3
    x = (x - x[:cut].mean(0)) / x[:cut].std(0).clamp_min(1e-6)
    x = torch.cat([x, torch.ones(len(x), 1)], dim=1).double()
    target = F.one_hot(y).double() if y.dim() == 1 else y.double()
    weight = torch.linalg.solve(x[:cut].T @ x[:cut] + ridge * cut / 100 * torch.eye(x.shape[1]).double(), x[:cut].T @ target[:cut])
    guess = x[cut:] @ weight
    if y.dim() == 1:
        return float((guess.argmax(1) == y[cut:]).float().mean())
    return float(1 - (guess - target[cut:]).square().sum() / (target[cut:] - target[:cut].mean(0)).square().sum())


# ---- embeddings of a run ----------------------------------------------------------------------------------------------


@torch.no_grad()
def embeddings(run: Path | None, config: train.Config, world: list[data.Example]) -> tuple[Tensor, Tensor]:
    """(h^_R, h_R) of the examples, (n, D) each. Without a Pearl predictor h^_R is the state of the last prompt token (K = 0)."""
    vlm = evaluate.load_run(run, "cpu")[0] if run else VLM(config.model).eval()
    pred_tokens = None
    checkpoint = run / json.loads((run / "best.json").read_text())["checkpoint"] if run else None
    if run and (checkpoint / "predictor.safetensors").is_file():
        predictor = Predictor(vlm.dim, config.pred_tokens, torch.zeros(vlm.dim), config.nextlat_sees_next)
        predictor.load_state_dict(evaluate.read_tensors(checkpoint / "predictor.safetensors")[0])
        pred_tokens = predictor.pred_tokens
    else:
        config.pred_tokens = 0
    examples = train.Examples(world, vlm, config)
    pairs = []
    for start in range(0, len(world), 64):
        views = examples.views[start:start + 64]
        features = train.image_features(vlm, examples, [i for v in views for i in v.full.images], config)
        pairs.append([train.encode(vlm, examples, data.collate([getattr(v, which) for v in views], vlm.pad_id), features, slots)[3]
                      for which, slots in (("input", pred_tokens), ("target", None))])
    return tuple(torch.cat(side) for side in zip(*pairs))


def what_it_knows(pair: tuple[Tensor, Tensor], world: list[data.Example]) -> dict:
    """Probes on h^_R and h_R, retrieval, cluster separation. Shares; `chance` is the commonest class of the tested third."""
    families, crops = [ex.family for ex in world], [i for i, ex in enumerate(world) if ex.family == "crop"]
    classes = lambda names: torch.tensor([sorted(set(names)).index(n) for n in names])
    boxes = torch.tensor([[int(v) for v in tools.CALL.search(world[i].texts[0])[2].split()] for i in crops], dtype=torch.float32)
    known = {}
    for name, h in zip(("h^_R", "h_R"), pair):
        known[name] = dict(
            tool=probe(h, classes(families)), digit=probe(h[crops], classes([world[i].answer for i in crops])),
            place_r2=probe(h[crops], boxes),
            separation=separation(h, families))
    digits = [world[i].answer for i in crops][2 * len(crops) // 3:]
    known["shares of h_R"] = shares(pair[1], world)
    known["chance"] = dict(digit=max(map(digits.count, digits)) / len(digits))
    gauges = losses.collapse_gauges(*pair)
    return known | {k: gauges[k] for k in ("retrieval", "retrieval_chance", "r2", "effective_rank", "mean_cosine")}


# ---- the figures ------------------------------------------------------------------------------------------------------


def figure_latents_per_example(config: train.Config, decoded: int) -> tuple[Image.Image, dict]:
    """Fig. 2: cumulative share of training examples with at most so many latents, in every regime."""
    vlm = VLM(config.model)
    top, numbers = 64, {}
    chart = Chart("Latents a training example would need (Fig. 2)", "tokens of its tool images", "share of examples",
                  (0, top), (0, 1))
    chart.ticks(count=4)
    for regime in scenes.REGIMES:
        store, counts = data.ImageStore(vlm.family), []
        for ex in scenes.make_world(regime, "train", 200, config.world_seed):
            counts.append(sum(map(len, store.add(ex)[1][1:])))
        numbers[regime] = dict(median=sorted(counts)[100], share_above_decoded=sum(c > decoded for c in counts) / 200)
        chart.line(regime, [(n, sum(c <= n for c in counts) / 200) for n in range(top + 1)], dots=False)
    chart.line(f"decoded at inference: {decoded}", [(decoded, 0), (decoded, 1)], dots=False)
    return chart.image, numbers


def figure_latents_decoded(run: Path, pearl: float | None, per_family: int) -> tuple[Image.Image, dict]:
    """Fig. 3: the reconstruction arm's accuracy against the number of latents decoded, with Pearson r and R^2 to log2."""
    vlm, config, scale = evaluate.load_run(run, "cpu")
    tests = evaluate.test_examples(config["data"], scenes.REGIMES[config["regime"]], per_family, config["world_seed"])
    tests = [ex for ex in tests if ex.trajectory]
    counts, shares = [0, 1, 2, 4, 8, 16, 32, 64], []
    asker = evaluate.Asker(vlm, tests, config["answer_prefix"])
    for n in counts:
        said = asker.latent(scale, n)
        right = [evaluate.parse_answer(s["text"], config["answer_prefix"]) == ex.answer for s, ex in zip(said, tests)]
        shares.append(100 * sum(right) / len(tests))
    r = pearson([math.log2(n) for n in counts[1:]], shares[1:])
    chart = Chart("Accuracy against latents decoded (Fig. 3)", "latents decoded", "accuracy, %", (-1, 6), (0, 100))
    chart.ticks(dict(zip((-1, 0, 1, 2, 3, 4, 5, 6), map(str, counts))))
    places = [-1.0] + [math.log2(n) for n in counts[1:]]
    chart.line(f"reconstruction, r {r:.2f}", list(zip(places, shares)))
    if pearl is not None:
        chart.line("Pearl, direct", [(-1, pearl), (6, pearl)], dots=False)
    guess = 100 * sum(1 / len(ex.options) for ex in tests) / len(tests)
    chart.line("guessing", [(-1, guess), (6, guess)], dots=False)
    numbers = dict(accuracy=dict(zip(counts, shares)), pearson_r=r, r_squared=r * r, chance=guess, trained_with=config["latents"])
    return chart.image, numbers


def figure_embeddings(pairs: dict[str, tuple[Tensor, Tensor]], world: list[data.Example], known: dict) -> Image.Image:
    """Fig. 4: both views' embeddings in two dimensions (t-SNE), coloured by family, h^_R a cross and h_R a dot."""
    charts, families = [], list(dict.fromkeys(ex.family for ex in world))
    for name, pair in pairs.items():
        points = tsne(F.normalize(torch.cat(pair), dim=1))
        span = float(points.abs().max()) * 1.05
        k = known[name]
        chart = Chart(f"{name}: separation h^_R {k['h^_R']['separation']:.2f}, h_R {k['h_R']['separation']:.2f}, "
                      f"retrieval {k['retrieval']:.2f} (chance {k['retrieval_chance']:.2f})", "", "",
                      (-span, span), (-span, span), (620, 470), 130)
        for n, (x, y) in enumerate(points.tolist()):
            ink = INKS[families.index(world[n % len(world)].family)]
            chart.mark(*chart.at(x, y), ink, "cross" if n < len(world) else "dot")
        for family in families:
            chart.label(family, INKS[families.index(family)])
        chart.label("h^_R", (0, 0, 0), "cross")
        chart.label("h_R", (0, 0, 0))
        charts.append(chart.image)
    return beside(charts, 2)


def records(run: Path, kind: str) -> list[dict]:
    return [r for r in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if r["kind"] == kind]


def figure_curves(runs: dict[str, Path]) -> Image.Image:
    """Training: each loss term and two gauges on validation, one line a run."""
    charts = []
    for name in ("vlm", "jepa", "nextlat", "recon", "effective_rank", "retrieval"):
        lines = {run: [(r["step"], r[name]) for r in records(folder, "valid") if name in r] for run, folder in runs.items()}
        lines = {run: points for run, points in lines.items() if points}
        if lines:
            steps, values = zip(*[p for points in lines.values() for p in points])
            chart = Chart(f"validation: {name}", "step", name, (0, max(steps)), (0, max(values) * 1.05), (620, 330), 200).ticks()
            for run, points in lines.items():
                chart.line(run, points)
            charts.append(chart.image)
    return beside(charts, 2)


def figure_skill(runs: dict[str, Path]) -> Image.Image | None:
    """Direct accuracy against accuracy with the expert's tool over training (runs with --track)."""
    percent = (0, 100)
    chart = Chart("Direct against tool accuracy over training", "with the expert's tool, %", "direct, %", percent, percent).ticks()
    drawn = False
    for name, folder in runs.items():
        points = [(100 * r["tool"], 100 * r["direct"]) for r in records(folder, "valid") if "direct" in r]
        if points:
            before = json.loads((folder / "results.json").read_text())["before"]
            start = summarise(before)
            start = start.get("all") or next(iter(start.values()))
            chart.line(name, [(100 * start["tool"][0], 100 * start["direct"][0]), *points])
            drawn = True
    return chart.image if drawn else None


def figure_neighbours(pair: tuple[Tensor, Tensor], world: list[data.Example], library: list[data.Example], targets: Tensor,
                      rows: int = 10):
    """Test questions beside the true tool output and the training trajectories whose h_R is nearest to h^_R."""
    near = (F.normalize(pair[0], dim=1) @ F.normalize(targets, dim=1).T).topk(4).indices
    share = lambda same: sum(same(ex, library[int(i)]) for ex, (i, *_) in zip(world, near)) / len(world)
    chance = lambda same: sum(same(a, b) for a in world for b in library) / (len(world) * len(library))
    kinds = dict(family=lambda a, b: a.family == b.family, answer=lambda a, b: (a.family, a.answer) == (b.family, b.answer))
    sheet = []
    for n in list(range(0, len(world), len(world) // rows + 1))[:rows]:  # + 1: not always the same family
        ex = world[n]
        steps = [f"answer: {ex.answer}. True tool output:", ex.images[1], "nearest:"]
        for i in near[n].tolist():
            steps += [library[i].images[1], library[i].texts[-1]]
        sheet.append(data.replace(ex, trajectory=steps))
    return scenes.contact_sheet(sheet, 1600, 100), {k: dict(nearest=share(same), chance=chance(same)) for k, same in kinds.items()}


def views_figure(example: data.Example) -> Image.Image:
    """One trajectory as the three views show it, with what each loss sees (the README's picture)."""
    font, bold = ImageFont.load_default(15), ImageFont.load_default(19)
    sheet = Image.new("RGB", (1180, 590), "white")
    draw = ImageDraw.Draw(sheet)
    grey, green, violet, blue = (236, 236, 236), (205, 238, 205), (226, 210, 245), (205, 225, 250)
    lefts = dict(I0=20, Q=130, T1=290, I1=560, T2=670, state=960)

    def block(column: str, y: int, width: int, content, fill=grey) -> None:
        x = lefts[column]
        if isinstance(content, Image.Image):
            sheet.paste(content.resize((96, 96), Image.Resampling.NEAREST), (x, y))
        else:
            draw.rounded_rectangle((x, y, x + width, y + 96), 8, fill=fill)
            draw.multiline_text((x + 9, y + 12), content, fill="black", font=font, spacing=6)

    def row(y: int, title: str, shown: str, fill, state: str) -> None:
        draw.text((20, y - 28), title, fill="black", font=bold)
        plan, call = example.texts[0].split(" [")
        reading, said = example.texts[-1].split(" Answer")
        texts = dict(Q="\n".join(textwrap.wrap(example.question, 16)), T1=plan + "\n[" + call + "\n<|im_end|>",
                     T2=reading + "\nAnswer" + said + "\n<|im_end|>")
        for column, content in dict(I0=example.image, I1=example.images[1], **texts).items():
            if column in shown.split():
                block(column, y, dict(Q=145, T1=255, T2=255).get(column, 96), content, fill if column[0] == "T" else grey)
        block("state", y, 200, state, blue)

    row(40, "full view <I0, Q, R>", "I0 Q T1 I1 T2", green,
        "green words: L_VLM (Eq. 3)\n\ntheir states, one to the\nnext: L_NextLat (Eq. 2)")
    row(220, "input view <I0, Q> + K x [PRED]: all that inference has, plus [PRED]", "I0 Q", grey,
        "h^_R: state of the\nlast [PRED]\n\n(gradient flows here)")
    for k in range(4):
        draw.rounded_rectangle((290 + 84 * k, 240, 366 + 84 * k, 296), 8, fill=violet)
        draw.text((301 + 84 * k, 258), "[PRED]", fill="black", font=font)
    row(420, "target view R: encoded on its own, without gradient", "T1 I1 T2", grey,
        "h_R: state of the\nlast <|im_end|>\n\n(stop-gradient)")
    draw.line((1060, 326, 1060, 410), fill=(40, 80, 200), width=4)
    draw.polygon([(1052, 404), (1068, 404), (1060, 418)], fill=(40, 80, 200))
    draw.text((900, 356), "L_JEPA (Eq. 1)", fill=(40, 80, 200), font=bold)
    draw.text((20, 545), "L = L_VLM + lambda (L_JEPA + L_NextLat)   (Eq. 4)      inference: plain decoding from <I0, Q>, "
              "no tool, no [PRED]", fill="black", font=bold)
    return sheet



def study_figures(folder: Path, out: Path, per_family: int, count: int) -> None:
    """All of the above from the runs of one regime's folder, seed 0 (or the lowest there is)."""
    runs = {}
    for path in sorted(folder.glob("*-seed*/results.json")):
        runs.setdefault(path.parent.name.rpartition("-seed")[0].replace("_", " "), path.parent)
    if not runs:
        raise FileNotFoundError(f"{folder} holds no finished runs (ARM-seedN/results.json); run analysis/study.py first")
    if out.exists():
        raise FileExistsError(f"{out} exists already: choose another --out, nothing is overwritten")
    partial = out.with_name(out.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    numbers, systems = {}, [name for name in ("sft", "direct", "recon", "pearl") if name in runs]
    config_of = lambda name: train.Config(**json.loads((runs[name] / "config.json").read_text()) | dict(device="cpu"))
    config = config_of(systems[0])
    image, numbers["latents per example"] = figure_latents_per_example(config, 8)
    image.save(partial / "latents-per-example.png")
    figure_curves({name: runs[name] for name in systems}).save(partial / "curves.png")
    if image := figure_skill({name: runs[name] for name in systems}):
        image.save(partial / "skill.png")
    if "recon" in runs:
        pearl = None
        if "pearl" in runs:
            table = summarise(json.loads((runs["pearl"] / "results.json").read_text())["answers"])
            pearl = 100 * (table.get("all") or next(iter(table.values())))["direct"][0]
        image, numbers["latents decoded"] = figure_latents_decoded(runs["recon"], pearl, per_family)
        image.save(partial / "latents-decoded.png")
    world = scenes.make_world(config.regime, "test", count, config.world_seed)
    chosen = {"no fine-tuning": (None, config_of(systems[0]))}
    chosen |= {name: (runs[name], config_of(name)) for name in ("sft", "pearl current target", "pearl") if name in runs}
    pairs = {name: embeddings(run, c, world) for name, (run, c) in chosen.items()}
    frozen = "pearl" in runs and config_of("pearl").target_encoder == "frozen"
    if frozen:  # its targets are the starting model's
        pairs["pearl"] = pairs["pearl"][0], pairs["no fine-tuning"][1]
    known = {name: what_it_knows(pair, world) for name, pair in pairs.items()}
    few = range(min(count, 250))
    shown = {name: tuple(side[:len(few)] for side in pair) for name, pair in pairs.items()}
    figure_embeddings(shown, [world[i] for i in few], known).save(partial / "embeddings.png")
    numbers["what the embedding knows"] = known
    if "pearl" in runs:
        library = scenes.make_world(config.regime, "train", count, config.world_seed)
        _, targets = embeddings(None if frozen else runs["pearl"], config_of("pearl"), library)
        image, numbers["nearest trajectories"] = figure_neighbours(pairs["pearl"], world, library, targets)
        image.save(partial / "neighbours.png")
    evaluate.write_json(partial / "analyses.json", numbers)
    partial.rename(out)
    print(json.dumps(numbers, indent=1))
    print(f"pictures and analyses.json are in {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="the runs of one regime: OUT/BASE/REGIME of the study")
    parser.add_argument("--out", type=Path, help="new folder; default: FOLDER/figures")
    parser.add_argument("--views", type=Path, metavar="PNG", help="draw the picture of the three views")
    parser.add_argument("--per_family", type=int, default=100, help="test questions a family for Fig. 3")
    parser.add_argument("--count", type=int, default=1200, help="test examples for embeddings, probes and neighbours")
    args = parser.parse_args()
    if args.views:
        views_figure(scenes.make_example("crop", "train", 1, 0)).save(args.views)
    elif args.folder:
        study_figures(args.folder, args.out or args.folder / "figures", args.per_family, args.count)
    else:
        parser.error("name a folder of runs, or --views PNG")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
