"""Do the tests notice? Injects single-line faults one at a time into a copy of the repository and runs the tests that should fail.

    python tests/mutations.py [--jobs 2] [--only 3 17]      # half an hour on two cores; the last line counts what was caught

Each fault is (file, the line's piece, what it becomes, tests that should fail). A fault no test notices is printed as MISSED.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FAULTS = [
    ("losses.py", "    target = target.detach()\n    if centre", "    if centre", "losses train"),
    ("losses.py", "1 - F.cosine_similarity(prediction", "F.cosine_similarity(prediction", "losses"),
    ("losses.py", "target = states[row, position].detach()", "target = states[row, position]", "losses"),
    ("losses.py", "target = states[row, position].detach()", "target = states[row, position - 1].detach()", "losses train"),
    ("losses.py", "return total / max(1, len(rollout))\n\n\ndef nextlat_token", "return total\n\n\ndef nextlat_token",
     "losses train"),
    ("losses.py", "head_weight = head_weight.detach()", "head_weight = head_weight", "losses"),
    ("losses.py", "[row, position + 1]", "[row, position]", "losses"),
    ("losses.py", "follows = labels[:, 1:]", "follows = labels[:, :-1]", "losses train"),
    ("losses.py", "vlm + lambda_latent * (jepa + nextlat)", "vlm + (jepa + nextlat)", "losses train"),
    ("losses.py", "vlm + lambda_latent * (jepa + nextlat)", "vlm + lambda_latent * jepa + nextlat", "losses train"),
    ("losses.py", "    target = target.detach()\n    return distance", "    return distance", "losses"),
    ("losses.py", "pred, true = (F.normalize(x, dim=-1) for x in raw)", "pred, true = raw", "losses"),
    ("losses.py", "nearest = (pred @ true.T).argmax(dim=1)", "nearest = (true @ true.T).argmax(dim=1)", "losses"),
    ("predictor.py", "return state + self.mlp(seen)", "return self.mlp(seen)", "predictor"),
    ("predictor.py", "embeddings = embeddings.detach()", "embeddings = embeddings", "predictor"),
    ("predictor.py", "goes_on = ~last & targets", "goes_on = ~last | targets", "predictor train"),
    ("predictor.py", "return self.predicted(state) * self.std + self.mean", "return self.predicted(state) * self.std", "train"),
    ("predictor.py", "nn.init.zeros_(self.mlp[-1].weight)", "pass", "predictor"),
    ("data.py", "return View(ids, labels, images, len(ids) - 1, slots)", "return View(ids, labels, images, len(ids) - 2, slots)",
     "data train"),
    ("data.py", "known = tokens if supervised else", "known = tokens if True else", "data"),
    ("data.py", "known = tokens[:1] + [-100] * (len(tokens) - 1)", "known = tokens", "data"),
    ("data.py", "target = self._ended(opening + pieces[1:], images[1:], spans[1:])", "target = full", "data"),
    ("data.py", "(LATENT_END, False)]", "(LATENT_END, True)]", "data"),
    ("data.py", "steps[n - 1:n + 1] = steps[n], steps[n - 1]", "pass", "data"),
    ("data.py", "embed_at=torch.tensor([v.embed_at + s for v, s in zip(views, shift)])",
     "embed_at=torch.tensor([v.embed_at for v in views])", "data"),
    ("data.py", "embed_at=torch.tensor([width + branch - 1 if branch else n - 1 for n in shared])",
     "embed_at=torch.tensor([width + branch - 1 if branch else n for n in shared])", "train"),
    ("model.py", "(self.scaling * self.lora_B).to", "self.lora_B.to", "model"),
    ("model.py", "self.base.weight += (self.scaling * self.lora_B", "self.base.weight += (self.lora_B", "model"),
    ("model.py", "hidden = in_branch[:, None] & ~in_branch & (index >= batch.shared[:, None, None])",
     "hidden = in_branch[:, None] & ~in_branch & False", "train"),
    ("model.py", "steps = torch.arange(1, batch.branch + 1", "steps = torch.arange(0, batch.branch", "train"),
    ("model.py", "scale.input(state).to(embeds.dtype)", "state.to(embeds.dtype)", "evaluate"),
    ("model.py", "position = position + 1\n", "position = position + 2\n", "evaluate"),
    ("model.py", "get_rope_index(ids, mm_token_type_ids=is_image", "get_rope_index(ids, mm_token_type_ids=0 * is_image", "model"),
    ("train.py", "before = batch.slots.roll(-1, dims=1)", "before = batch.slots", "train"),
    ("train.py", "return embedding.roll(1, dims=0)", "return embedding", "train"),
    ("train.py", "with nullcontext() if needs_gradient else torch.no_grad():", "with nullcontext():", "train"),
    ("train.py", "views = [examples.views[row].target for row in part]", "views = [examples.views[row].full for row in part]", "train"),
    ("train.py", "for _ in range(config.steps) for row in next(order)}", "for _ in range(1) for row in next(order)}", "train"),
    ("train.py", "(loss * len(part) * world / len(rows)).backward()", "loss.backward()", "train"),
    ("train.py", "if valid[\"loss\"] < best:", "if valid[\"loss\"] > best or best == math.inf:", "train"),
    ("train.py", "        torch.set_rng_state(tensors[\"random/cpu\"])", "        pass", "train"),
    ("train.py", "    for _ in range(first):\n        next(order)\n", "", "train"),
    ("analysis/tables.py", "(n + z * z), (centre + spread)", "n, (centre + spread)", "evaluate"),
    ("analysis/tables.py", "t * statistics.stdev(gaps) / math.sqrt(len(gaps))", "t * statistics.stdev(gaps)", "evaluate"),
    ("evaluate.py", "call_tool(text, *map(opened, talk[\"shown\"]))", "call_tool(text, opened(talk[\"shown\"][0]))", "evaluate"),
    ("world/tools.py", "TOOLS[match[1]](shown[number - 1]", "TOOLS[match[1]](shown[-1]", "data"),
    ("evaluate.py", "elif talk[\"calls\"] == limit:", "elif False:", "evaluate"),
    ("analysis/tables.py", "[r for r in records if r[\"family\"] != HELD_OUT]", "records", "evaluate"),
    ("evaluate.py", "text.rpartition(prefix)[2]", "text.partition(prefix)[2]", "evaluate"),
    ("data.py", "if bos is not None and full.ids[0] == bos", "if False", "families"),
    ("data.py", "(self.lead + parts[0], True)", "(parts[0], True)", "families"),
    ("model.py", "self.packs = not self.bidirectional and layers == {\"full_attention\"}", "self.packs = True", "families"),
    ("model.py", "seen = dict(token_type_ids=is_image.long()) if self.bidirectional else {}\n        return self.lm.model",
     "seen = {}\n        return self.lm.model", "families"),
    ("data.py", "path.resolve().is_relative_to", "path.is_relative_to", "robust"),
    ("data.py", "(np.asarray(image) / 257)", "np.asarray(image)", "robust"),
    ("data.py", "ImageOps.exif_transpose(image)", "image", "data"),
    ("model.py", "    check_finite(tensors, str(file))\n", "", "robust"),
    ("model.py", "    os.replace(partial, file)", "    partial.unlink()", "robust"),
    ("train.py", "f\"{examples.fingerprint} {image.size}\".encode()", "f\"{image.size}\".encode()", "train"),
    ("train.py", "init_sync=not config.shard", "init_sync=True", "train"),
    ("model.py", ", ignored_params=trained)", ")", "train"),
    ("train.py", "given.answer if by == \"answer\" else \"\"", "given.answer", "train"),
    ("analysis/targets.py", "for family in dict.fromkeys(families):", "for family in set(families):", "analysis"),
    ("analysis/targets.py", "family=common - family, answer", "family=common - answer, answer", "analysis"),
    ("train.py", "            examples += [ex.answer_only(config.answer_prefix) for ex in self.given]", "            pass", "train"),
    ("train.py", "    LOOP[\"running\"] = True\n", "", "train"),
    ("train.py", "if LOOP[\"signals\"] > 1 or not LOOP[\"running\"]:", "if LOOP[\"signals\"] > 1:", "robust"),
    ("train.py", "    while step < config.steps and not stop:", "    while step < config.steps:", "train"),
]


def inject(number: int) -> tuple[int, bool, str]:
    """(number, caught, the tests' last line) of one fault, in a copy of its own."""
    file, old, new, tests = FAULTS[number]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "runs", "__pycache__", ".venv", ".pytest_cache"))
        text = (copy / file).read_text()
        assert text.count(old) == 1, f"fault {number}: {old!r} is {text.count(old)} times in {file}"
        (copy / file).write_text(text.replace(old, new))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider",
                   *(f"tests/test_{name}.py" for name in tests.split())]
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return number, done.returncode == 1, (done.stdout.strip().splitlines() or ["?"])[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of faults")
    args = parser.parse_args()
    numbers = args.only if args.only is not None else range(len(FAULTS))
    caught = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        for number, noticed, last in pool.map(inject, numbers):
            caught += noticed
            fault = f"{FAULTS[number][0]}: {FAULTS[number][1].strip().splitlines()[0][:70]}"
            print(f"{number:2d} {'caught' if noticed else 'MISSED'}  {fault} | {last}", flush=True)
    print(f"{caught} of {len(numbers)} faults caught")
    sys.exit(caught < len(numbers))


if __name__ == "__main__":
    main()
