"""Claims: a checkpoint is read as its family's own processor reads it, and answers as transformers
does; what is damaged or cannot be served is refused in one sentence, and nothing of it runs."""

import copy
import shutil
from itertools import product
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.utils import is_torchvision_available

from checkpoints import BUILDERS, IMAGES, OLD, TEMPLATES, TOKENS, write
from conftest import refuses
from data import collate, make_views
from model import VLM
from support.chat import Chat
from support.families import load_checkpoint, load_family
from support.images import ImageEncoder, load_images, with_pixels
from support.files import read_json
from support.step import encode_two_views
from support.records import Example


@pytest.fixture
def copy_of(folders, tmp_path):
    return lambda name: Path(shutil.copytree(folders(name), tmp_path / name, dirs_exist_ok=True))


@pytest.fixture(scope="module", params=list(BUILDERS))
def vlm(request, folders):
    return VLM(folders(request.param), torch.float64)


def family_of(folder):
    return load_checkpoint(str(folder), torch.float32)[1]


def record(tool_images):
    image, *crops = [Image.new("RGB", size, "red") for size in ((60, 40), (30, 70), (64, 64))]
    steps = [step for crop in crops[:tool_images] for step in ("Zoom in. [crop 12 30]", crop)]
    return Example("1", "task", image, "Which?\n\nA. red  B. blue", ["red", "blue"], "red",
                   [*steps, "It is se7en. Answer: red"])


def test_ids_are_those_of_the_familys_own_processor(vlm):
    family, chat = vlm.family, vlm.chat
    examples = record(0), record(1), record(2), record(2).image_first()
    for example, prompt in product(examples, (False, True)):
        images, turns = load_images(example, family), chat.turns(example)[:-1 if prompt else None]
        alternate = "alternate" in family.processor.chat_template
        reason = "others stand beside it" if family.single_image_only and images[1:] else (
            "roles must alternate" if alternate and example is examples[3] else None)
        if reason:
            with pytest.raises(ValueError, match=f"refuses the conversation .*{reason}"):
                chat.conversation(turns, images)
            continue
        whole = chat.conversation(turns, images, prompt, layout=True)
        assert whole.ids == family.own_ids(turns, example.images, prompt)
        assert len(whole.ends) == len(whole.ids) and whole.ends[-1] == len(whole.text)
        # ours has no part for videos; theirs makes nothing of a `size` with old keys
        if "qwen" in family.path and is_torchvision_available() and "old_size" not in family.path:
            theirs = copy.copy(family)
            theirs.processor = transformers.AutoProcessor.from_pretrained(family.path)
            assert whole.ids == theirs.own_ids(turns, example.images, prompt)


def test_labels_are_what_the_assistant_says(vlm):
    """The same for a model without its weights. What no text may contain are marks of images and
    ends of turns, but not every added word. The target view opens with bos where every text does,
    unless bos is what opens a turn."""
    family, bos = vlm.family, [vlm.tokenizer.bos_token_id]
    image_token = family.tokenizer.convert_ids_to_tokens(family.lm.config.image_token_id)
    assert {family.placeholder, image_token, family.end_token} <= family.reserved
    assert not {"▁▁", "<table>", "</table>", "\n"} & family.reserved
    for example in map(record, range(1 if family.single_image_only else 3)):
        views, same = (make_views(Chat(reader, 4096), example, load_images(example, reader), 1)
                       for reader in (family, load_family(family.path)))
        assert views == same
        full, _, target = views
        learned = [label for label in full.labels if label != -100]
        assert full.ids[-1] == family.end_id
        assert learned.count(family.end_id) == len(example.texts)
        words = family.tokenizer.decode(learned, skip_special_tokens=True)
        assert "".join(words.split()) == "".join("".join(example.texts).split())
        assert (target.ids[:1] == bos) == (full.ids[:1] == bos)
        assert bos * 2 not in (full.ids[:2], target.ids[:2])
        rest = 1 - len(target.ids)
        assert target.ids[1:] == full.ids[rest:]
        assert target.labels == [-100, *full.labels[rest:]]


def test_which_template_counts(copy_of):
    """The processor's before the tokenizer's; of several the default one; a Qwen folder that has
    only the tokenizer's, for text alone, is given Qwen's mark of an image."""
    folder = copy_of("llava")
    before = family_of(folder).processor.chat_template
    write(folder / TOKENS, chat_template="{{ 'for text only' }}")
    assert family_of(folder).processor.chat_template == before
    (folder / OLD).unlink()
    write(folder / TOKENS, chat_template=TEMPLATES["QWEN_TEXT_ONLY"])
    refuses(folder, "has no chat template that writes a question, its image and an answer")
    folder = copy_of("qwen2_5_vl")
    turns = Chat(family_of(folder), 4096).turns(record(1))
    whole, template = family_of(folder).render(turns), read_json(folder / OLD)["chat_template"]
    (folder / OLD).unlink()
    assert family_of(folder).render(turns) == whole
    templates = [dict(name="tool_use", template="x"), dict(name="default", template=template)]
    write(folder / TOKENS, chat_template=templates)
    assert family_of(folder).render(turns) == whole
    write(folder / TOKENS, chat_template=templates[:1])
    refuses(folder, "has no chat template that writes .*the one called default counts.; restore")


def test_sizes_of_images(folders):
    """By old and new names; --min_pixels and --max_pixels set them."""
    new = family_of(folders("qwen2_5_vl_new"))
    for name in ("qwen2_vl", "qwen2_vl_saved_again", "qwen2_5_vl_old_size"):
        old = family_of(folders(name))
        for size in ((60, 40), (500, 30), (1, 1)):
            assert old.image_text(*size) == new.image_text(*size)
    for name, message in (("qwen3_vl", "from 5000 to 4096 pixels"),
                          ("llava", "models have no --min_pixels and --max_pixels")):
        with pytest.raises(ValueError, match=message):
            load_family(str(folders(name)), min_pixels=5000)


@pytest.mark.parametrize("name, file, change, message", [
    ("tiny", IMAGES, dict(size=dict(shortest_edge="1")), "from '1' to None pixels: correct short"),
    ("tiny", IMAGES, dict(merge_size=1), "fit config.json .* becomes 48 tokens of number 5, and 1"),
    # lost; without its tokenizer.json transformers makes an empty tokenizer without a word
    ("qwen3_vl", IMAGES, None, "cannot be used .OSError"),
    ("qwen3_vl", "tokenizer.json", None, "tokenizer.json of .* does not fit|cannot be used")])
def test_processor_files_that_do_not_fit_the_model(copy_of, name, file, change, message):
    folder = copy_of(name)
    (folder / file).unlink() if change is None else write(folder / file, **change)
    refuses(folder, message)


def test_foreign_tokenizers_and_models(folders, copy_of, monkeypatch):
    """Marks of images are reserved also where a tokenizer does not call them special."""
    file = copy_of("llava") / "tokenizer.json"
    raw = read_json(file)
    plain = [dict(token, special=token["content"] != "<image>") for token in raw["added_tokens"]]
    write(file, added_tokens=plain)
    assert "<image>" in family_of(file.parent).reserved
    write(file, added_tokens=[*plain, dict(plain[-1], id=999, content="new", special=False)])
    refuses(file.parent, "has tokens for which there is no embedding")
    raw["post_processor"]["single"].append(dict(SpecialToken=dict(id="<s>", type_id=0)))
    write(file, **raw)
    refuses(file.parent, "puts a token of its own after every text: set add_eos_token to false")
    monkeypatch.setattr(transformers.LlavaModel, "get_rope_index", len, raising=False)
    refuses(folders("llava"), "positions in several rows .of these only qwen2_vl, qwen2_5_vl")


def test_weights_that_are_not_whole_are_refused_by_name(copy_of):
    file, layer = copy_of("qwen2_5_vl") / "model.safetensors", "self_attn.q_proj.weight"
    whole = load_file(file)
    key, *keys = [key for key in whole if key.endswith(layer)]
    derived = ("model.layers.0.self_attn.rotary_emb.inv_freq", "model.embeddings.position_ids")
    for tensors, message in (
            ({k: v for k, v in whole.items() if k not in keys}, rf"lack .*{layer}.*\d+ in all\)"),
            (whole | {key: whole[key][:3].clone()}, f"another shape of .*{layer}"),
            (whole | {key: whole[key] * float("nan")}, f"{layer} holds values that are no"),
            (whole | {"model.strange.weight": torch.zeros(2)}, "no place for: .*strange.weight"),
            (whole | {key: torch.zeros(2) for key in derived}, None)):
        save_file(tensors, file, dict(format="pt"))
        refuses(file.parent, message) if message else family_of(file.parent)


def test_damaged_weights_and_code_in_a_checkpoint_never_run(copy_of, tmp_path):
    folder, mark = copy_of("tiny"), tmp_path / "mark"
    file = folder / "model.safetensors"
    file.write_bytes(f"cos\nsystem\n(S'touch {mark}'\ntR.".encode())
    refuses(folder, f"{folder}, seen from .*, cannot be loaded")
    file.rename(folder / "pytorch_model.bin")
    refuses(folder, "safetensors")
    write(folder / "config.json", model_type="mine", auto_map=dict(AutoConfig="code.Config"))
    (folder / "code.py").write_text(f"open({str(mark)!r}, 'w')", encoding="utf-8")
    refuses(folder, "cannot be loaded")
    assert not mark.exists()


def test_of_generation_config_only_the_eos_ids_count(copy_of):
    folder = copy_of("qwen2_5_vl")
    write(folder / "generation_config.json", eos_token_id=[7], min_new_tokens=6, do_sample=True)
    family = family_of(folder)
    greedy = transformers.GenerationConfig(eos_token_id=[7, family.end_id], do_sample=False,
                                           pad_token_id=family.end_id)
    assert family.lm.generation_config.to_diff_dict() == greedy.to_diff_dict()


def own_inputs(family, turns, images, prompt=False):
    """What transformers' own processor makes of a conversation for its own model."""
    return family.processor(text=[family.render(turns, prompt)], images=[images],
                            add_special_tokens=family.adds_bos,
                            return_tensors="pt").to(dtype=torch.float64)


@torch.no_grad()
def test_states_and_answers_are_those_of_transformers(vlm):
    """Padding, and a second view in the same pass, change no state."""
    family, chat = vlm.family, vlm.chat
    example = record(0 if family.single_image_only else 1)
    turns = chat.turns(example)
    images, encode = with_pixels(load_images(example, family), family), ImageEncoder(family)
    full, prompt, _ = make_views(chat, example, images, 0)
    features, rows = encode(images), torch.randn(3, vlm.dim, dtype=torch.float64)
    states = vlm(collate([full], vlm.pad_id), features).states
    own = vlm.lm.model(**own_inputs(family, turns, example.images)).last_hidden_state
    torch.testing.assert_close(states, own[:, :len(full.ids)])
    question = own_inputs(family, turns[:1], example.images[:1], prompt=True)
    answer = vlm.lm.generate(**question, max_new_tokens=6)
    assert vlm.generate([prompt], images[:1], encode, 6) == [answer[0, len(prompt.ids):].tolist()]
    longer = full._replace(ids=full.ids + full.ids[-4:-1], labels=full.labels + [-100] * 3)
    padded = vlm(collate([full, longer], vlm.pad_id), features).states
    torch.testing.assert_close(padded[:1, :len(full.ids)], states)
    if family.packs:
        prompt = make_views(chat, example, images, len(rows)).input
        both, prediction = encode_two_views(vlm, [full], [prompt], features, rows, collate)
        torch.testing.assert_close(both.states, states)
        alone = vlm(collate([prompt], vlm.pad_id), features, rows)
        torch.testing.assert_close(prediction, alone.embedding)
