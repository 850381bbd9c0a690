"""Do the tests notice? Puts faults of one line each into copies of the repository, one at a time,
and runs the tests that must fail.

    python tests/mutations.py [--jobs 2] [--only 3 17]

A fault that no test notices is printed as MISSED; as ERROR one whose line is not in the code any
more, or whose tests are not there or fail without it. Either makes the exit status 1.
"""

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Iterable, Iterator, NamedTuple

import pytest
import torch.distributed.fsdp  # noqa: F401  here, once: to import it takes longer than most tests
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent


class Fault(NamedTuple):
    file: str
    line: str  # a piece of the code that stands there once
    becomes: str
    noticed: str  # the tests that must fail: files of tests/, then what their names hold (-k)


FAULTS = [
    # ---- losses ----
    Fault("losses.py", "    target = target.detach()\n    # a mean", "    # a mean", "losses: eq1"),
    Fault("losses.py", "1 - F.cosine_similarity(prediction", "F.cosine_similarity(prediction",
          "losses: eq1"),
    Fault("losses.py", "states[at].detach()", "states[at]", "losses: eq2"),
    Fault("losses.py", "states[at].detach()", "states[at.roll(1, dims=1)].detach()", "losses: eq2"),
    Fault("losses.py", "return total / max(1, len(forecasts))", "return total", "losses: eq2"),
    Fault("losses.py", "following = labels[:, 1:]", "following = labels[:, :-1]", "losses: eq3"),
    Fault("losses.py", "return logits.float() if", "return logits if", "losses: eq3"),
    Fault("losses.py", "vlm + lambda_latent * (jepa + nextlat)", "vlm + (jepa + nextlat)",
          "losses: eq4"),
    Fault("losses.py", "vlm + lambda_latent * (jepa + nextlat)",
          "vlm + lambda_latent * jepa + nextlat", "losses: eq4"),
    Fault("losses.py", "distance(predicted, target.detach(), kind)",
          "distance(predicted, target, kind)", "losses: reconstruction"),
    Fault("losses.py", "sum(share * result.parts[name]", "sum(result.parts[name]",
          "train: accumulation"),
    Fault("losses.py", "pred, true = (F.normalize(x, dim=-1) for x in raw)", "pred, true = raw",
          "losses: gauges"),
    Fault("losses.py", "nearest = (pred @ true.T).argmax(dim=1)",
          "nearest = (true @ true.T).argmax(dim=1)", "losses: gauges"),

    # ---- predictor ----
    Fault("predictor.py", "return state + self.mlp(", "return self.mlp(", "predictor"),
    Fault("predictor.py", "embeddings = embeddings.detach()", "pass", "predictor"),
    Fault("predictor.py", "following = targets & F.pad", "following = targets | F.pad",
          "predictor"),
    Fault("predictor.py", "embeddings[following]), following",
          "embeddings[following.roll(-1, 1)]), following", "predictor losses: forecast or eq2"),
    Fault("predictor.py", "nn.init.zeros_(self.mlp[-1].weight)", "pass", "predictor"),

    # ---- data ----
    Fault("data.py", "told.labels, images, len(told.ids) - 1)",
          "told.labels, images, len(told.ids) - 2)", "data: views_equal"),
    Fault("data.py", "[-100] * len(ids), images[:1], len(ids) - 1,\n",
          "[-100] * len(ids), images[:1], len(ids) - 2,\n", "data: views_equal"),
    Fault("data.py", "if any(s.start < end and start <= s.end for s in said) else", "if True else",
          "data: views_equal"),
    Fault("data.py", "start <= s.end for", "start < s.end for", "data: views_equal"),
    Fault("data.py", "told.first_behind(told.turns[1])", "told.first_behind(told.turns[0])",
          "data: views_equal"),
    Fault("data.py", "view.embed_at + before for", "view.embed_at for", "data: collate"),
    Fault("data.py", "[bos] if told.ids[0] == bos and told.ids[first] != bos else []", "[]",
          "families: bos or own"),
    Fault("data.py", "begins = len(self.header) if opening.startswith(self.header) else first",
          "begins = first", "data: a_blank"),
    Fault("data.py", "first.said[0].text + len(form.prefix)", "first.said[0].text",
          "data: an_answer_is_scored"),
    Fault("data.py", "            rows.sort(key", "            sorted(rows, key",
          "train: similar_length"),
    Fault("data.py", "manual_seed(config.seed)", "manual_seed(0)", "train: seeds_order"),

    # ---- model ----
    Fault("model.py", "(self.scaling * self.lora_B).to", "self.lora_B.to", "model: lora"),
    Fault("support/adapters.py", "layer += (scaling * high @ low)", "layer += (high @ low)",
          "model: lora"),
    Fault("model.py", "layer.active = False", "layer.active = True", "model: starting"),
    Fault("model.py", "                layer.active = True", "                pass",
          "model: starting"),

    # ---- train ----
    Fault("train.py", "with nullcontext() if cures.through_target(config) else "
          "torch.no_grad():", "with nullcontext():", "train: sft_makes_one_pass"),
    Fault("train.py", "full.labels != -100", "full.mask", "train: nextlat_runs"),
    Fault("train.py", "examples.targets[row] for row in rows]",
          "examples.targets[row] for row in sorted(rows)]", "train: frozen_targets"),
    Fault("train.py", "views = [examples.views[row].target for row in part]",
          "views = [examples.views[row].full for row in part]", "train: frozen_targets"),
    Fault("train.py", "if row not in examples.targets]", "if row + 1]", "train: frozen_targets"),
    Fault("train.py", "with vlm.starting_model():", "with nullcontext():", "train: frozen_targets"),
    Fault("train.py", "islice(examples.steps(config), config.steps)",
          "islice(examples.steps(config), 1)", "train: targets_are_cached"),
    Fault("train.py", "(result.total * len(part) * world / len(rows)).backward()",
          "result.total.backward()", "train: accumulation"),
    Fault("train.py", "    optimizer.zero_grad(set_to_none=True)\n", "", "train: accumulation"),
    Fault("train.py", ", config.clip)", ", 1e9)", "train: clips"),
    Fault("train.py", "    if torch.isfinite(norm):", "    if True:", "train: clips"),
    Fault("train.py", "islice(examples.steps(config), step, None)", "examples.steps(config)",
          "train: interrupted"),
    Fault("train.py", "while step < config.steps and not stop:", "while step < config.steps:",
          "train: interrupted"),
    Fault("train.py", "init_sync=not config.shard", "init_sync=True", "train: share_frozen"),

    # ---- evaluate ----
    Fault("evaluate.py", "said[\"direct\"][i][\"option\"]", "None", "evaluate: failed_attempt"),

    # ---- support ----
    Fault("support/packing.py", "width + v.input.embed_at - n for", "width + v.input.embed_at - n "
          "- 1 for", "train: packed"),
    Fault("support/packing.py", "in_branch[:, None] & ~in_branch & (index >= batch.shared"
          "[:, None, None])", "in_branch[:, None] & ~in_branch & False", "train: packed"),
    Fault("support/packing.py", "torch.arange(1, batch.branch + 1",
          "torch.arange(0, batch.branch", "train: packed"),
    Fault("support/packing.py", "return (same + [False]).index(False)", "return len(same)",
          "train: packed"),
    Fault("support/families.py", "if found is None:\n        found, files",
          "if True:\n        found, files", "families: template_wins"),
    Fault("support/families.py", "found = found.get(\"default\") or next", "found = next",
          "families: named_templates"),
    Fault("support/families.py", "added_tokens_decoder.values() if t.special}",
          "added_tokens_decoder.values()}", "families: may_not_hold and gemma"),
    Fault("support/families.py", "    found |= {tokenizer.convert_ids_to_tokens(i)",
          "    {tokenizer.convert_ids_to_tokens(i)", "families: reserved_special"),
    Fault("support/families.py", "        if not self.end_token:\n", "        if False:\n",
          "families: one_bos and llava"),
    Fault("support/families.py", "text.startswith(bos)),\n                             return_off",
          "True),\n                             return_off", "families: own_processor and llava"),
    Fault("support/families.py", "text.startswith(bos)),\n                             return_off",
          "False),\n                             return_off", "families: own_processor and gemma"),
    Fault("support/families.py", "if self.encode(\"x\")[0][-1] != tokenizer",
          "if False and tokenizer", "families: closes_every"),
    Fault("support/families.py", "if not size.keys() >= edges and size", "if False and size",
          "families: old_names"),
    Fault("support/families.py", "math.prod(grid) // merge ** 2), grid",
          "math.prod(grid) // merge ** 2 + 1), grid", "families: own_processor and qwen"),
    Fault("support/families.py", "image) or most >= rows:", "image):", "families: is_lost"),
    Fault("support/families.py", "if (tokenizer.pad_token_id or 0) >= rows:", "if False:",
          "families: pad_token"),
    Fault("support/families.py", "if hasattr(lm.model, \"get_rope_index\"):", "if False:",
          "families: rows_of_its"),
    Fault("support/families.py", "check_complete(report, base)\n", "pass\n",
          "families: not_whole"),
    Fault("support/families.py", "report[\"missing_keys\"]", "[]", "families: not_whole"),
    Fault("support/families.py", " if not name.endswith(derived)", "", "families: not_whole"),
    Fault("support/families.py", "lm.generation_config = greedy(", "greedy(",
          "families: generation_config"),
    Fault("support/families.py", "sorted(ends | {family.end_id})", "sorted(ends)",
          "families: whatever_the"),
    Fault("support/families.py", "(kinds + settings).encode()", "settings.encode()",
          "families: kept_by_the_kind"),
    Fault("support/adapters.py", "adapters.insert(0, adapter)", "adapters.append(adapter)",
          "adapters: may_name"),
    Fault("support/adapters.py", "config[\"lora_alpha\"] / config[\"r\"],",
          "config[\"lora_alpha\"],", "adapters: as_peft"),
    Fault("support/adapters.py", "[f for f in UNSUPPORTED", "[f for f in ()",
          "adapters: other_adapters"),
    Fault("support/adapters.py", "if len(low) != rank or high", "if False and high",
          "adapters: other_adapters"),
    Fault("support/adapters.py", "if today in known else name", "if False else name",
          "adapters: older_transformers"),
    Fault("support/adapters.py", "path = str(base.resolve()) if", "path = path if",
          "adapters: from_anywhere"),
    Fault("support/adapters.py", "(partial / \"generation_config.json\").unlink", "str",
          "adapters: merged_checkpoint"),
    Fault("support/adapters.py", "BESIDE = (\"*.json\", ", "BESIDE = (",
          "adapters: merged_checkpoint"),
    Fault("support/adapters.py", "OWN = (\"config.json\", ", "OWN = (",
          "adapters: merged_checkpoint"),
    Fault("support/families.py", "get_rope_index(ids, mm_token_type_ids=is_image",
          "get_rope_index(ids, mm_token_type_ids=0 * is_image", "model: forward"),
    Fault("support/families.py", "self.packs = not self.bidirectional and layers == "
          "{\"full_attention\"}", "self.packs = True", "families: two_steps"),
    Fault("support/families.py", "if self.bidirectional else {}\n        return self.lm.model(",
          "if False else {}\n        return self.lm.model(", "families: states or two_steps"),
    Fault("support/images.py", "f\"{self.fingerprint} ", "f\"", "train: features_on_disk"),
    Fault("support/images.py", "(values / 257)", "values", "robust: image"),
    Fault("support/images.py", "TURNS.get(image.getexif().get(ExifTags.Base.Orientation))", "None",
          "images: turns_size"),
    Fault("support/records.py", "path.resolve().is_relative_to", "path.is_relative_to",
          "robust: links"),
    Fault("support/records.py", "steps[n - 1:n + 1] = steps[n], steps[n - 1]", "pass",
          "data: image_first"),
    Fault("support/files.py", "    check_finite(tensors, str(file))\n", "", "robust: spoilt"),
    Fault("support/files.py", "        os.replace(partial, file)\n", "", "model: disk"),
    Fault("support/progress.py", "if valid[\"loss\"] < best:",
          "if valid[\"loss\"] > best or best == math.inf:", "train: run_folder_holds"),
    Fault("support/run_folder.py", "torch.set_rng_state(tensors[\"random/cpu\"])", "pass",
          "train: interrupted"),
    Fault("support/images.py", "image = _decoded(content)", "image = _decoded(file)",
          "images: turned_once"),
    Fault("support/images.py", "if image.size != self.sizes[index]:", "if False:",
          "images: changes_during"),
    Fault("support/files.py", "fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass",
          "run_folder: in_use"),
    Fault("support/files.py", "errors=\"backslashreplace\"", "errors=\"strict\"",
          "run_folder: in_a_locale"),
    Fault("support/files.py", "os.fsdecode(name.encode(\"utf-8\"))", "name", "robust: locale"),
    Fault("support/run_folder.py", "            remove_leftovers(out)", "            pass",
          "run_folder: half_files"),
    Fault("support/run_folder.py", "dict(image=picture_digest(step))", "\"\"",
          "run_folder: digest_covers"),
    Fault("support/run_folder.py", "if count < 10 or", "if", "run_folder: hint"),
    Fault("train.py", "    config = run_folder.absolute_paths(config)\n", "",
          "robust: another_folder"),
    Fault("train.py", "with run_folder.held(out, resume) if rank == 0 else nullcontext():",
          "with nullcontext():", "robust: in_use"),
    Fault("train.py", "run_folder.refuse_other_inputs(config, loaded)", "pass",
          "robust: not_resumed"),
    Fault("support/processes.py", "    SIGNALS.in_loop = True\n", "", "run_folder: a_signal_ends"),
    Fault("support/processes.py", "if not SIGNALS.in_loop or not (first", "if not (first",
          "run_folder: a_signal_ends"),
    Fault("support/processes.py", "    end_as_signalled()\n\n\n# ", "\n\n# ",
          "run_folder: a_signal_ends"),
    Fault("support/processes.py", ", ignored_params=trained)", ")", "train: share_frozen"),
    Fault("support/processes.py", "[rank::world]", "[rank:]", "train: losing_or_repeating"),
    Fault("support/answers.py", "re.finditer(_as_word(prefix), text)):\n        pass",
          "re.finditer(_as_word(prefix), text)):\n        break", "evaluate: reply"),
    Fault("support/answers.py", "unicodedata.normalize(\"NFC\", text).split()", "text.split()",
          "answers: dressed"),
    Fault("support/answers.py", "return bare or text", "return bare", "answers: taken_off"),
    Fault("support/answers.py", " and _until_closed(inner, opener, closer) == bare", "",
          "answers: taken_off"),
    Fault("support/answers.py", "if len(set(folded)) == len(folded) and fold(said)",
          "if fold(said)", "answers: alike"),
    Fault("support/answers.py", "for fold in (str, str.casefold):", "for fold in (str,):",
          "answers: dressed"),
    Fault("support/answers.py", " and (rest == own[1] or not rest or not own[1])", "",
          "answers: alike"),
    Fault("support/answers.py", "r\"\\(?([A-Za-z])(?:\\)|[.:](?=\\s))\\s*(\\S.*)\"",
          "r\"\\(?([A-Za-z])[).: ]\\s*(\\S.*)\"", "answers: alike"),
    Fault("support/answers.py", "before = rf\"(?<!{LETTER.pattern})\"", "pass", "answers: words"),
    Fault("support/answers.py", "after += r\"(?![.,:/]\\d)\"", "pass", "answers: words"),
    Fault("support/answers.py", "forms.most_common(1)", "forms.most_common()[-1:]",
          "answers: frequent"),
    Fault("support/answers.py", "or closing or wide or unspaced", "or closing or wide",
          "answers: prefix_alone"),
    Fault("support/records.py", "_need(clear if said is None else options[said] == answer",
          "_need(True", "records: another_answer"),
    Fault("support/records.py", "            _need(clear, where", "            _need(True, where",
          "records: another_answer"),
    Fault("support/records.py", "self.without_prefix.append(number)", "pass", "records: counted"),
    Fault("support/records.py", "next(iter(splits)) if len(splits) == 1 else by_hash", "by_hash",
          "records: without_split"),
    Fault("support/records.py", "int(digest[:8], 16) % 10", "len(ex.image.name) % 10",
          "records: one_side"),
    Fault("support/records.py", "if shared := len(shown[one] & shown[other])", "if shared := 0",
          "records: two_sides"),
    Fault("support/records.py", "option not in normal[:n]", "True", "records: count_as_one"),
    Fault("support/records.py", "if len(set(ids)) < len(ids):", "if False:", "records: file_names"),

    # ---- baselines ----
    Fault("baselines/reconstruction.py", "self.predicted(state) * self.std + self.mean",
          "self.predicted(state) * self.std", "train: latent_scale"),
    Fault("baselines/reconstruction.py", "            label = -100\n", "", "data: latent_view"),
    Fault("baselines/reconstruction.py", "before = batch.inject_at.roll(-1, dims=1)",
          "before = batch.inject_at", "train: reconstruction_step"),
    Fault("baselines/reconstruction.py", "inputs_now = scale.input(state)",
          "inputs_now = state", "evaluate: latent_loop"),
    Fault("baselines/reconstruction.py", "position = position + 1\n", "position = position + 2\n",
          "evaluate: latent_loop"),
    Fault("baselines/variants.py", "return target.roll(1, dims=0)", "return target",
          "train: targets"),
    Fault("baselines/variants.py", "example.answer if by == \"answer\" else \"\"", "example.answer",
          "train: averaged"),
    Fault("baselines/variants.py", "return [*as_shown(examples, config), *bare, *",
          "return [*as_shown(examples, config), *", "train: both_trains"),
    Fault("baselines/cures.py", "return predicted + self.bias", "return predicted - self.bias",
          "cures: heads"),
    Fault("baselines/cures.py", "nn.init.zeros_(self.layers[-1].weight)", "pass", "cures: heads"),
    Fault("baselines/cures.py", "mean.lerp_(vlm.get_parameter(name), 1 - momentum)",
          "mean.lerp_(vlm.get_parameter(name), momentum)", "cures: average"),
    Fault("baselines/cures.py", "rise = int(self.steps) / config.steps if", "rise = 0.0 if",
          "cures: average"),
    Fault("baselines/cures.py", "self.register_buffer(place, start, persistent=False)",
          "self.register_buffer(place, start)", "cures: average"),
    Fault("baselines/cures.py", "encoded = functional_call(vlm, weights, (batch, images))",
          "encoded = vlm(batch, images)", "cures: by_hand and ema"),
    Fault("baselines/cures.py", "[i != j and one", "[one", "cures: infonce_equals"),
    Fault("baselines/cures.py", "(ex.task, ex.answer) if config", "ex.task if config",
          "cures: negatives"),
    Fault("baselines/cures.py", " or bool(config.vicreg or config.sigreg)", "",
          "cures: graph_only or by_hand"),
    Fault("baselines/cures.py", "total = total + config.lambda_latent * term",
          "total = total + term", "cures: by_hand and vicreg"),
    Fault("baselines/cures.py", "x = F.normalize(x, dim=-1) * x.shape[1] ** 0.5\n", "pass\n",
          "cures: vicreg_equals"),
    Fault("baselines/cures.py", "covariance = x.T @ x / (len(x) - 1)",
          "covariance = x.T @ x / len(x)", "cures: vicreg_equals"),
    Fault("baselines/cures.py", "int(self.steps))\n        slices", "0)\n        slices",
          "cures: slices"),
    Fault("baselines/cures.py", "len(x) * 2 * torch.trapezoid(gap * gauss", "len(x) * 2 * "
          "torch.trapezoid(gap", "cures: complex"),
    Fault("baselines/cures.py", "layers[layer].register", "layers[layer - 1].register",
          "cures: by_hand and layer"),
    Fault("baselines/cures.py", " & (batch.labels != vlm.family.end_id)", "", "cures: positions"),
    Fault("baselines/cures.py", "words & (behind == 1)", "words & (behind == 2)",
          "cures: positions"),
    Fault("baselines/variants.py", "if row < len(examples.examples)]", "]",
          "cures: only_trajectories"),
    Fault("baselines/variants.py", "list(islice(cycle(bare), len(examples)))", "bare",
          "cures: few_answers"),
    Fault("baselines/variants.py", "in with_trajectory(examples, list(examples.targets)):",
          "in examples.targets:", "cures: only_trajectories or answers_goes"),
    Fault("baselines/variants.py", "if any(example.split == \"train\" for", "if any(True for",
          "cures: few_answers"),
    Fault("train.py", "        cures.after_step(module, config)\n", "", "cures: average"),
    Fault("train.py", "        cures.equip(predictor, vlm, config)\n", "", "cures: average"),
    Fault("train.py", "cures.encode(vlm, batch, images, config).embedding",
          "vlm(batch, images).embedding", "cures: frozen_target"),
    Fault("baselines/release.py", "ends[-2] + 1", "ends[-2]", "release: every_term"),
    Fault("baselines/release.py", "labels[n + 1:n + 1 + len(layout)] = layout\n", "pass\n",
          "release: line_break"),
    Fault("baselines/release.py", "            serializer.check_length(full, example)\n", "",
          "release: limit"),
    Fault("baselines/release.py", "tuple(range(len(words), len(words) + count))",
          "tuple(range(len(words) + 1, len(words) + 1 + count))", "release: inside"),
    Fault("baselines/release.py", "if end not in asked or behind_last(asked, end) != opening:",
          "if False:", "release: turn_that_ends"),
    Fault("baselines/release.py", "(total / at.sum(dim=1).clamp_min(1)).mean()",
          "total.sum() / at.sum()", "release: every_term"),
    Fault("baselines/release.py", "states[at].detach(), \"smoothl1\")", "states[at], \"smoothl1\")",
          "release: every_term"),
    Fault("baselines/release.py", "head = labels[at], head.detach()", "head = labels[at], head",
          "release: spares_the_head"),
    Fault("baselines/release.py", "    if which == \"next\":\n", "    if which == \"fed\":\n",
          "release: every_term"),
    Fault("baselines/release.py", "    predictor.pred_tokens.requires_grad_(False)\n", "",
          "release: random"),
    Fault("baselines/release.py", "    predictor.latent.mlp[-1].reset_parameters()", "    pass",
          "release: random"),
    Fault("baselines/release.py", "state_term + token_term,", "state_term,", "release: timed"),
    Fault("baselines/variants.py", "    if config.strip_calls:\n", "    if False:\n",
          "release: stripped"),
    Fault("model.py", "(\"all-linear\" in targets or ", "(\"all\" in targets or ",
          "release: random"),
    Fault("train.py", "    release.adapt_views(found, taught, config)\n", "", "release: inside"),
    Fault("train.py", "        release.leave_random(predictor, config)  # by", "        # by",
          "release: goes_on"),
    Fault("support/options.py", "nextlat_mean=\"examples\", ", "", "release: page"),
    Fault("baselines/tool_use.py", "call_tool(text, *map(opened, talk[\"shown\"]))",
          "call_tool(text, opened(talk[\"shown\"][0]))", "evaluate: tools_run"),
    Fault("baselines/tool_use.py", "elif talk[\"calls\"] == limit:", "elif False:",
          "evaluate: limit"),
    Fault("baselines/tool_use.py", "if room < TURN_TOKENS:", "if False:", "tool_use: without_room"),
    Fault("world/loader.py", "if os.environ.get(\"RANK\", \"0\") == \"0\":", "if True:",
          "check_data: one_process"),
    Fault("analysis/tables.py", "term * math.cos(angle) ** 2 * k / (k + 1)",
          "term * math.cos(angle) ** 2", "tables: printed_table"),
    Fault("analysis/tables.py", "values[name] * (len(values) - place)",
          "values[name] * len(values)", "tables: holm"),

    # ---- world, analysis ----
    Fault("world/tools.py", "TOOLS[match[1]](shown[number - 1]", "TOOLS[match[1]](shown[-1]",
          "data: a_call_works"),
    Fault("support/tables.py", "(n + z * z), (centre + spread)", "n, (centre + spread)",
          "evaluate: wilson"),
    Fault("analysis/tables.py", "t * statistics.stdev(gaps) / math.sqrt(len(gaps))",
          "t * statistics.stdev(gaps)", "evaluate: comparison"),
    Fault("analysis/tables.py", "groups[f\"{names[name]} again ({name})\"] = {seed: run}",
          "seeds[seed] = run", "tables: second_run"),
    Fault("analysis/tables.py", "if len(kinds := comparable(runs)) > 1:",
          "if len(kinds := comparable(runs)) > 9:", "tables: unlike"),
    Fault("support/tables.py", "[r for r in records if r[\"family\"] != HELD_OUT]", "records",
          "evaluate: summary"),
    Fault("baselines/tool_use.py", "if not CALL_BEGUN.search(text):", "if \"[\" not in text:",
          "tool_use: brackets"),
    Fault("train.py", "for asker in questions, tracked:", "for asker in (tracked,):",
          "check_data: stop and question"),
    Fault("train.py", "for asker in questions, tracked:", "for asker in (questions,):",
          "check_data: stop and tracked"),
    Fault("evaluate.py", "asked.append(told.until_last_label().ids)", "pass", "evaluate: room"),
    Fault("evaluate.py", "tokens or max(4, *self.answer_tokens())", "tokens or 4",
          "check_data: free_answers"),
    Fault("analysis/check_data.py", "        asker.check_lengths()\n", "",
          "check_data: stop and question"),
    Fault("analysis/check_data.py", "            drawn(usable, config)", "            pass",
          "check_data: stop and record"),
    Fault("analysis/states.py", "if row.layer >= middle]", "if row.layer > middle]",
          "states: rule"),
    Fault("analysis/states.py", "return found[\"answer\"] - found[\"answer_by_chance\"]",
          "return found[\"answer\"]", "states: rule"),
    Fault("analysis/states.py", "shares(unit - unit.mean(0), world)", "shares(unit, world)",
          "states: centred"),
    Fault("analysis/targets.py", "        states.free_name(figure)\n", "        pass\n",
          "states: one_command"),
    Fault("analysis/text_model.py", "\"trajectory\").target", "\"trajectory\").full",
          "states: reads_the_words"),
    Fault("analysis/states.py", "for family in dict.fromkeys(families):",
          "for family in set(families):", "analysis: shares"),
    Fault("analysis/states.py", "family=common - family, answer", "family=common - answer, answer",
          "analysis: shares"),

    # ---- causal tests ----
    Fault("baselines/reconstruction.py", "inputs_now = instead(inputs_now, fed, latent)",
          "instead(inputs_now, fed, latent)", "causal: replaced"),
    Fault("analysis/causal.py", "put[n](one, fed[n] - 1)", "put[n](one, fed[n])",
          "causal: replaced"),
    Fault("analysis/causal.py", "if put[n] and latent[n] else one", "if put[n] else one",
          "causal: replaced"),
    Fault("analysis/causal.py", "torch.zeros_like(latent)", "latent", "causal: replaced"),
    Fault("analysis/causal.py", "fits = partners(asker.examples, other_image)",
          "fits = list(range(len(asker.examples)))", "causal: replaced"),
    Fault("analysis/causal.py", "images = asker.placed[question][0][1:]",
          "images = asker.placed[question][0][:1]", "causal: replaced"),
    Fault("analysis/causal.py", "began.setdefault(k // n, latent)", "began.setdefault(0, latent)",
          "causal: two_runs"),
    Fault("analysis/causal.py", "made[min(k // n, runs - 1) * n + k % n]", "made[k % n]",
          "causal: two_runs"),
    Fault("analysis/causal.py", "lambda latent, _: mean + std *", "lambda latent, _: std *",
          "causal: noise"),
    Fault("analysis/causal.py", "manual_seed(question)", "manual_seed(0)", "causal: noise"),
    Fault("analysis/causal.py", "[bool(own.kept[i]) for i in", "[True for i in",
          "causal: nothing_to_replace"),
    Fault("analysis/causal.py", "return picture_digest(one.image) != picture_digest(other.image)",
          "return one.id != other.id", "causal: swapped"),
    Fault("analysis/causal.py", "random.Random(0).shuffle(order)", "random.shuffle(order)",
          "causal: swapped"),
    Fault("analysis/causal.py", "            and other.answer in one.options", "and True",
          "causal: partners"),
    Fault("analysis/causal.py", "(len(one.images) == len(other.images) > 1", "(True",
          "causal: partners"),
    Fault("analysis/causal.py", "isinstance(step, str) else next(images)",
          "isinstance(step, str) else step", "causal: recombined"),
    Fault("analysis/causal.py", "ex.options[option] == other.answer",
          "ex.options[option] == ex.answer", "causal: follows"),
    Fault("analysis/causal.py", "replace(ex, image=other.image)", "ex", "causal: looks"),
    Fault("analysis/causal.py", "one is not None and one == other", "one == other",
          "causal: twice"),
    Fault("analysis/causal.py", "(word != theirs)", "1", "causal: uncovered"),
    Fault("analysis/causal.py", "if family not in REGIMES", "if family in REGIMES",
          "causal: uncovered"),
    Fault("world/scenes.py", "draw_bars(spec, dots=False)", "draw_bars(spec)", "causal: dots"),
    Fault("world/scenes.py", "spec: Spec, dots: bool = True", "spec: Spec, dots: bool = False",
          "causal: no_scene"),
    Fault("analysis/causal_report.py", "1.96 * (variance / n) ** 0.5", "1.96 * variance ** 0.5",
          "causal: gaps"),
    Fault("analysis/causal_report.py", "for i in mine if i in theirs", "for i in theirs",
          "causal: gaps"),
    Fault("analysis/causal_report.py", "other.seeds[n % len(other.seeds)]", "other.seeds[n]",
          "causal: gaps"),
    Fault("analysis/causal_report.py", "abs(gap[0]) > gap[1]", "abs(gap[0]) > 0",
          "causal: gaps"),
    Fault("analysis/causal_report.py", "100 * ((a - b) - (c - d))", "100 * (a - b)",
          "causal: dots_alone"),
    Fault("analysis/causal_report.py", "return mean - before, half", "return mean, half",
          "causal: dots_alone"),
    Fault("analysis/causal_report.py", "if apart[name] >= NEAR or name == NO_DOTS",
          "if apart[name] >= NEAR", "causal: dots_alone"),
    Fault("analysis/causal.py", "if setting(configs[other]) != setting(configs[first]):",
          "if False:", "causal: refused"),

    # ---- what is shown of a record ----
    Fault("analysis/token_view.py", "view.labels[n] != -100", "view.labels[n] == -100",
          "token_view: worked"),
    Fault("analysis/token_view.py", "labels=[-100] * len(target.ids)", "labels=target.labels",
          "token_view: worked"),
    Fault("analysis/token_view.py", "n == view.embed_at)", "n == view.embed_at - 1)",
          "token_view: worked"),
    Fault("analysis/token_view.py", "[*self.letter, id]", "[id]", "token_view: worked"),
    Fault("analysis/token_view.py", "first:first + count]", "first:first + count - 1]",
          "token_view: worked"),
    Fault("analysis/token_view.py", "{grid[1]} x {grid[2]} patches",
          "{grid[2]} x {grid[1]} patches",
          "token_view: wide"),
    Fault("analysis/token_view.py", 'c.encode("unicode_escape").decode()', "c",
          "token_view: folder_by_its_row"),
    Fault("analysis/token_view.py", 'errors="backslashreplace"', 'errors="strict"',
          "token_view: letters"),
    Fault("analysis/token_view.py", "sys.stdout.isatty() and ", "", "token_view: worked"),
    Fault("analysis/token_view.py", ' and not os.environ.get("NO_COLOR")', "",
          "token_view: colour"),
    Fault("analysis/token_view.py", "world_seed=args", "world_seed=0 and args",
          "token_view: world_s_rows"),
    Fault("analysis/token_view.py", "replace(config, max_tokens=sys.maxsize)", "config",
          "token_view: too_long"),
    Fault("support/records.py", "number, line = rows[row]", "number, line = rows[row - 1]",
          "token_view: row"),
    Fault("support/families.py", 'with torch.device("meta"):  # a device of shapes alone\n'
          "        lm = AutoModelForImageTextToText.from_config(config)",
          "lm = AutoModelForImageTextToText.from_pretrained(base)", "token_view: families"),
    Fault("docs/walkthrough.md", "positions 22 to 25", "positions 22 to 26",
          "walkthrough: numbers"),
    Fault("docs/walkthrough.md", "target = target.detach()", "target = target",
          "walkthrough: code"),
    Fault("docs/walkthrough.md", "[crop 70 5 96 31]", "[crop 70 5 96 32]", "walkthrough: record"),
    Fault("README.md", "losses.total.backward()\n", "", "python_use"),
]


def problem(fault: Fault) -> str:
    """Why a fault cannot be tried; empty if it can."""
    file, (names, _, _) = ROOT / fault.file, fault.noticed.partition(":")
    count = file.read_text(encoding="utf-8").count(fault.line) if file.is_file() else 0
    if count != 1:
        return f"its line stands there {count} times"
    missing = [name for name in names.split() if not (ROOT / f"tests/test_{name}.py").is_file()]
    return f"no tests called {' '.join(missing)}" if missing or not names else ""


def begin(fault: Fault, folder: Path) -> int:
    """A process that runs the tests in a copy with the fault; its status is pytest's."""
    shutil.copytree(ROOT, folder / "copy", ignore=shutil.ignore_patterns(
        ".git", "runs", "__pycache__", ".venv", ".pytest_cache", "figures"))
    file = folder / "copy" / fault.file
    text = file.read_text(encoding="utf-8").replace(fault.line, fault.becomes)
    file.write_text(text, encoding="utf-8")
    names, _, expression = fault.noticed.partition(":")
    tests = [f"tests/test_{name}.py" for name in names.split()]
    sys.stdout.flush()
    if child := os.fork():
        return child
    said = os.open(folder / "said", os.O_WRONLY | os.O_CREAT)
    for descriptor in (1, 2):
        os.dup2(said, descriptor)
    os.chdir(folder / "copy")
    sys.path[0] = str(folder / "copy" / "tests")
    status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests,
                          *(["-k", expression] if expression else [])])
    sys.stdout.flush()
    os._exit(status)


def tried(faults: Iterable[Fault], jobs: int) -> Iterator[tuple[Fault, str, str]]:
    """(fault, caught or MISSED or ERROR, the tests' last word), as they end."""
    waiting, running = list(faults), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            fault, folder = waiting.pop(0), tempfile.TemporaryDirectory()
            running[begin(fault, Path(folder.name))] = fault, folder
        child, status = os.wait()
        fault, folder = running.pop(child)
        said = Path(folder.name, "said").read_text(encoding="utf-8", errors="replace")
        word = {0: "MISSED", 1: "caught"}.get(os.waitstatus_to_exitcode(status), "ERROR")
        yield fault, word, (said.strip().splitlines() or ["?"])[-1]
        folder.cleanup()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of faults")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    waiting = list(args.only if args.only is not None else range(len(FAULTS)))
    count, caught = len(waiting), 0
    for number in list(waiting):
        if why := problem(FAULTS[number]):
            print(f"{number:3d} ERROR  {FAULTS[number].file}: {FAULTS[number].line!r:.60} | {why}")
            waiting.remove(number)
    # a test that fails without any fault notices nothing
    sound = {FAULTS[n].noticed: FAULTS[n]._replace(becomes=FAULTS[n].line) for n in waiting}
    failing = {fault.noticed for fault, word, _ in tried(sound.values(), args.jobs)
               if word != "MISSED"}
    for fault, word, said in tried([FAULTS[n] for n in waiting], args.jobs):
        word = "ERROR" if fault.noticed in failing else word
        caught += word == "caught"
        shown = next(piece for piece in fault.line.splitlines() if piece.strip()).strip()[:60]
        print(f"{FAULTS.index(fault):3d} {word}  {fault.file}: {shown} | {said}", flush=True)
    print(f"{caught} of {count} faults caught")
    sys.exit(caught < count)


if __name__ == "__main__":
    main()
