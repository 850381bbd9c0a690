"""Claims: a checkpoint is read as its family's own processor reads it, in each layout in which it
is published: which template wins, which ids a conversation has, what no text may hold. Our states
and answers are those of transformers' own forward pass and `generate` on pixels, whatever the
checkpoint's generation_config says; padding changes nothing; two steps of Pearl train. What cannot
work, weights that are not whole among it, is refused in one sentence."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, AutoTokenizer, GenerationConfig

import data
import evaluate
import train
from model import VLM
from support import records
from support.families import QwenFamily, load_checkpoint
from support.files import read_json
from support.images import ImageStore
from world import scenes

import checkpoints
from checkpoints import BUILDERS, QWEN, build, write
from conftest import TINY

HAVE_TORCHVISION = transformers.utils.is_torchvision_available()
NEED_TORCHVISION = {builder.__name__ for builder in checkpoints.TORCHVISION}
QWEN = {builder.__name__ for builder in QWEN}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """name -> folder of that checkpoint, built when first asked for; not to be changed."""
    made = {}

    def folder(name):
        if name in NEED_TORCHVISION and not HAVE_TORCHVISION:
            pytest.skip("its processor needs torchvision")
        if name not in made:
            made[name] = build(name, tmp_path_factory.mktemp(name))
        return made[name]

    return folder


@pytest.fixture(scope="module", params=list(BUILDERS))
def checkpoint(request, folders):
    return folders(request.param)


@pytest.fixture(scope="module")
def family(checkpoint):
    return load_checkpoint(str(checkpoint), torch.float64)[1]


def copied(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


def text(words):
    return dict(type="text", text=words)


def conversation(tool_images, image_first=False):
    """A question and its trajectory, as messages, and the images that it shows."""
    shown = [Image.new("RGB", size, "red") for size in ((60, 40), (30, 70), (64, 64))]
    turns = [dict(role="user", content=[dict(type="image"), text("Which?\n\nA. red  B. blue")])]
    for _ in range(tool_images):
        call = [dict(role="assistant", content=[text("Zoom in. [crop 12 30 28 46]")]),
                dict(role="user", content=[dict(type="image")])]
        turns += call[::-1] if image_first else call
    turns.append(dict(role="assistant", content=[text("Answer: se7en")]))
    return turns, shown[:tool_images + 1]


def expanded(family, rendered, images):
    """The text that is tokenised: each placeholder replaced by what stands for its image."""
    head, *rest = rendered.split(family.placeholder)
    assert len(rest) == len(images)
    return head + "".join(family.image_text(*i.size)[0] + part for i, part in zip(images, rest))


# ---- the text ------------------------------------------------------------------------------------


SOURCES = dict(qwen2_5_vl_new="chat_template.jinja", qwen3_vl_new="chat_template.jinja",
               llava_interleave="chat_template.jinja", mistral3="chat_template.jinja",
               internvl="chat_template.jinja", idefics3="processor_config.json",
               llava_template_in_processor_config="processor_config.json",
               llava_template_in_tokenizer_config="tokenizer_config.json")


def test_the_processors_template_wins(checkpoint, family):
    assert family.template_source == SOURCES.get(checkpoint.name[:-1], "chat_template.json")
    assert family.placeholder in family.render(conversation(0)[0])


@pytest.mark.parametrize("name", ["llava", "idefics3", "gemma3", "qwen3_vl_new"])
def test_a_template_of_the_tokenizers_own_counts_only_without_another(folders, tmp_path, name):
    folder = copied(folders(name), tmp_path)
    before = load_checkpoint(str(folder), torch.float32)[1]
    write(folder / "tokenizer_config.json", chat_template="{{ 'for text only' }}")
    after = load_checkpoint(str(folder), torch.float32)[1]
    assert (after.template, after.template_source) == (before.template, before.template_source)


@pytest.mark.parametrize("tool_images, image_first, prompt", [
    (0, False, False), (0, False, True), (1, False, False), (1, False, True), (2, False, False),
    (2, True, False)])
def test_ids_are_those_of_the_familys_own_processor(checkpoint, family, tool_images, image_first,
                                                    prompt):
    if family.alone_only and tool_images:
        pytest.skip("refused: see the test of it")
    turns, images = conversation(tool_images, image_first)
    turns = turns[:-1] if prompt else turns
    if image_first and "alternate" in family.template:
        with pytest.raises(ValueError, match="refuses the conversation: .*must alternate"):
            family.render(turns)
        return
    whole = expanded(family, family.render(turns, prompt), images)
    ids, spans = family.encode(whole)
    assert ids == family.own_ids(turns, images, prompt)
    assert len(spans) == len(ids) and spans[-1][1] == len(whole)
    if family.closing:  # published templates without an end: the text is closed by hand
        assert family.render(turns, prompt).count(family.closing) == tool_images + (not prompt)
        for turn in turns:
            if turn["role"] == "assistant":
                turn["content"][0]["text"] += family.closing
    if family.form == "assistant's strings":
        turns = [turn | dict(content=turn["content"][0]["text"]) if turn["role"] == "assistant"
                 else turn for turn in turns]
    if isinstance(family, QwenFamily) and not HAVE_TORCHVISION:
        return
    if checkpoint.name.startswith("qwen2_5_vl_old_size"):
        return  # transformers itself cannot use it
    own = AutoProcessor.from_pretrained(checkpoint)
    waiting = iter(images)
    for part in (part for turn in turns if isinstance(turn["content"], list)
                 for part in turn["content"] if part["type"] == "image"):
        part["image"] = next(waiting)
    theirs = own.apply_chat_template(turns, chat_template=family.template, tokenize=True,
                                     return_dict=True, add_generation_prompt=prompt)["input_ids"]
    assert ids == list(theirs[0])


def test_one_bos_and_an_end_that_stops_answers(checkpoint, family):
    ids, _ = family.encode(family.render(conversation(0)[0][:1]))
    bos = family.tokenizer.bos_token_id
    opened = checkpoint.name.startswith(("llava0", "llava_template_in_pr", "llava_next", "idefics3",
                                         "smolvlm", "gemma3", "pixtral", "mistral3"))
    assert (ids[0] == bos and ids[1] != bos) == opened
    assert family.end_id in family.lm.generation_config.eos_token_id
    assert family.tokenizer.convert_ids_to_tokens(family.end_id) in family.reserved


def test_what_a_text_may_not_hold(checkpoint, family):
    assert {family.placeholder, family.tokenizer.eos_token, family.end_token} <= family.reserved
    image_token = family.tokenizer.convert_ids_to_tokens(family.lm.config.image_token_id)
    assert image_token in family.reserved
    if checkpoint.name.startswith("gemma3"):
        assert {"<start_of_image>", "<image_soft_token>", "<bos>"} <= family.reserved
        assert not {"\n", "\n\n", "▁▁", "<table>", "</table>"} & family.reserved
        assert "\n\n" in family.tokenizer.get_added_vocab()
    assert not [token for token in family.reserved if not token.strip()]
    serializer = data.Serializer(family, 4096)
    for words in ("two  blanks", "a line\n\nbreak", "a <table> of <b>", "[12, 3]", "user: x"):
        serializer.check(records.Example("1", "f", None, words, ["x"], "x", ["x"]))
    for words in (f"an {family.placeholder} here", f"the end{family.end_token}"):
        with pytest.raises(ValueError, match="example 1: the text contains the model's special"):
            serializer.check(records.Example("1", "f", None, "Q", ["x"], "x", [words]))


@pytest.mark.parametrize("name, token", [
    ("llava", "<image>"), ("qwen2_5_vl", "<|video_pad|>"), ("qwen2_5_vl", "<|vision_end|>"),
    ("pixtral", "[IMG_BREAK]")])
def test_marks_of_images_are_reserved_special_or_not(folders, tmp_path, name, token):
    folder = copied(folders(name), tmp_path)
    raw = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    for added in raw["added_tokens"]:
        added["special"] = added["special"] and added["content"] != token
    (folder / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    family = load_checkpoint(str(folder), torch.float32)[1]
    assert token not in family.tokenizer.all_special_tokens and token in family.reserved


@pytest.mark.parametrize("tool_images", [0, 1, 2])
def test_views_are_the_familys_own_tokens(checkpoint, family, mixed, tool_images):
    if family.alone_only and tool_images:
        pytest.skip("refused: see the test of it")
    steps = ["Zoom. [crop 1 2]", mixed[0].images[1]] * tool_images
    example = dataclasses.replace(mixed[0], image=mixed[0].image.resize((60, 40)),
                                  trajectory=[*steps, "It is seven. Answer: seven"])
    serializer, store = data.Serializer(family, 4096), ImageStore(family)
    views = serializer.views(example, *store.add(example), 2, "trajectory")
    messages = [dict(role=role, content=[text(part) if isinstance(part, str) else
                                         dict(type="image") for part in parts])
                for role, parts in serializer.turns(example)]
    ids = family.own_ids(messages, example.images)
    full, asked, target = (view.ids for view in views)
    assert full == ids[:len(full)] and full[-1] == family.end_id  # what follows it is layout
    assert asked[:-2] == family.own_ids(messages[:1], example.images[:1], True)
    bos = family.tokenizer.bos_token_id
    opens_turns = full.count(bos) > 1  # a bos that also opens each turn; R lacks two, the system's
    assert target.count(bos) == full.count(bos) - 2 * opens_turns
    rest = target if opens_turns or target[0] != bos else target[1:]
    assert full[-len(rest):] == rest and len(rest) < len(full)
    said = [token for token, label in zip(full, views.full.labels) if label != -100]
    assert said.count(family.end_id) == tool_images + 1
    words = "".join(family.tokenizer.decode(said, skip_special_tokens=True).split())
    assert words == "".join("".join(example.texts).split())


def test_named_templates_and_templates_for_strings(folders, tmp_path):
    folder = copied(folders("qwen2_5_vl"), tmp_path)
    whole = load_checkpoint(str(folder), torch.float32)[1].render(conversation(1)[0])
    template = read_json(folder / "chat_template.json")["chat_template"]
    (folder / "chat_template.json").unlink()
    family = load_checkpoint(str(folder), torch.float32)[1]  # left with the template for text only
    assert family.form == "strings" and family.template_source == "tokenizer_config.json"
    assert family.render(conversation(1)[0]) == whole  # Qwen's mark-up of an image is known
    named = [dict(name="tool_use", template="x"), dict(name="default", template=template)]
    write(folder / "tokenizer_config.json", chat_template=named)
    assert load_checkpoint(str(folder), torch.float32)[1].render(conversation(1)[0]) == whole
    named[1]["name"] = "other"
    write(folder / "tokenizer_config.json", chat_template=named)
    with pytest.raises(ValueError, match="templates other, tool_use: name one of them default"):
        load_checkpoint(str(folder), torch.float32)


@pytest.mark.parametrize("template, message", [
    (None, "has no chat template: choose a checkpoint"),
    (checkpoints.QWEN_TEXT_ONLY, "refuses the conversation: can only concatenate"),
    ("{% for m in messages %}{{ m.role }}: {{ m.content[-1].text }}{% endfor %}",
     "does not write images into the text; put the chat_template.json"),
    ("{{ raise_exception('no') }}", "refuses the conversation: no")])
def test_templates_that_are_of_no_use(folders, tmp_path, template, message):
    folder = copied(folders("llava"), tmp_path)
    (folder / "chat_template.json").unlink()
    write(folder / "tokenizer_config.json", chat_template=template)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(str(folder), torch.float32)


def test_a_tokenizer_that_closes_every_text_is_refused(folders, tmp_path):
    folder = copied(folders("llava"), tmp_path)
    raw = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    raw["post_processor"]["single"].append(dict(SpecialToken=dict(id="<s>", type_id=0)))
    (folder / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(ValueError, match="puts a token of its own after every text"):
        load_checkpoint(str(folder), torch.float32)


def test_old_names_of_sizes_are_read_and_what_cannot_be_built_is_refused(folders, tmp_path):
    new = load_checkpoint(str(folders("qwen2_5_vl_new")), torch.float32)[1]
    for name in ("qwen2_vl", "qwen2_vl_saved_again", "qwen2_5_vl", "qwen2_5_vl_old_size"):
        old = load_checkpoint(str(folders(name)), torch.float32)[1]
        for size in ((60, 40), (500, 30), (8, 8)):
            assert old.image_text(*size) == new.image_text(*size)
            grid = old.inputs(Image.new("RGB", size))["image_grid_thw"]
            assert grid.tolist() == [list(old.image_text(*size)[1])]
    folder = copied(folders("qwen3_vl"), tmp_path)
    for size, message in (
            (dict(height=64, width=64), "size must say shortest_edge and longest_edge .*height"),
            (dict(shortest_edge=64), "size must say shortest_edge and longest_edge"),
            (dict(min_pixels=64), "the ImageProcessor of .*copy cannot be built: size must have")):
        write(folder / "preprocessor_config.json", size=size)
        with pytest.raises(ValueError, match=message) as refused:
            load_checkpoint(str(folder), torch.float32)
        assert "\n" not in str(refused.value)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="the ImageProcessor of .*copy cannot be built") as refused:
        load_checkpoint(str(folder), torch.float32)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["qwen3_vl", "llava"])
def test_a_tokenizer_that_is_lost_or_of_another_model_is_refused(folders, tmp_path, name):
    folder = copied(folders(name), tmp_path)
    (folder / "tokenizer.json").unlink()  # transformers makes an empty one without a word
    with pytest.raises(ValueError, match="is not the model's|cannot be built"):
        load_checkpoint(str(folder), torch.float32)
    shutil.copy(folders("gemma3") / "tokenizer.json", folder)
    with pytest.raises(ValueError, match="tokenizer in .* is not the model's: it has 5.. tokens"):
        load_checkpoint(str(folder), torch.float32)


def test_a_family_that_counts_positions_in_rows_of_its_own_is_refused(folders, monkeypatch):
    monkeypatch.setattr(transformers.LlavaModel, "get_rope_index", len, raising=False)
    with pytest.raises(ValueError, match="counts positions in several rows: .* only qwen2_vl"):
        load_checkpoint(str(folders("llava")), torch.float32)


def test_a_pad_token_without_an_embedding_does_no_harm(folders, tmp_path):
    folder = copied(folders("qwen2_5_vl"), tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens(dict(pad_token="<padding>"))
    tokenizer.save_pretrained(folder)
    vlm = VLM(folder)
    assert vlm.pad_id < len(vlm.lm.get_input_embeddings().weight) <= tokenizer.pad_token_id


@pytest.mark.skipif(not HAVE_TORCHVISION, reason="its processor needs torchvision")
def test_a_family_that_shows_an_image_otherwise_in_company_is_refused_for_tool_images(folders):
    family = load_checkpoint(str(folders("llava_onevision")), torch.float32)[1]
    family.render(conversation(0)[0])
    with pytest.raises(ValueError, match="shown an image otherwise when others are with it"):
        family.render(conversation(1)[0])


# ---- weights and settings ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava", "tiny"])
def test_weights_that_are_not_whole_are_refused_by_name(folders, tmp_path, name):
    folder = copied(TINY if name == "tiny" else folders(name), tmp_path)
    file, layer = folder / "model.safetensors", "self_attn.q_proj.weight"
    whole = load_file(file)
    keys = [key for key in whole if key.endswith(layer) and "vis" not in key]

    def refusal(tensors, message):
        save_file(tensors, file, metadata=dict(format="pt"))
        with pytest.raises(ValueError, match=message):
            load_checkpoint(str(folder), torch.float32)

    refusal({k: v for k, v in whole.items() if k not in keys}, f"weights in .* lack .*{layer}")
    refusal({k: v for k, v in whole.items() if "vis" not in k}, r" and \d+ more; restore")
    refusal(whole | {keys[0]: whole[keys[0]][:3].clone()}, rf"another shape of .*{layer} \(\(3, ")
    refusal(whole | {"model.strange.weight": torch.zeros(2)}, "no place for: .*strange.weight")
    derived = ("layers.0.self_attn.rotary_emb.inv_freq", "embeddings.position_ids")
    save_file(whole | {f"model.{name}": torch.zeros(2) for name in derived}, file,
              metadata=dict(format="pt"))  # as older versions saved them
    load_checkpoint(str(folder), torch.float32)


def test_a_head_that_is_tied_need_not_be_saved(folders, tmp_path):
    folder = copied(folders("qwen2_5_vl"), tmp_path)
    file = folder / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if k != "lm_head.weight"}, file,
              metadata=dict(format="pt"))
    with pytest.raises(ValueError, match="lack lm_head.weight; restore"):
        load_checkpoint(str(folder), torch.float32)
    write(folder / "config.json", tie_word_embeddings=True)
    lm, _ = load_checkpoint(str(folder), torch.float32)
    assert lm.lm_head.weight is lm.get_input_embeddings().weight


@pytest.mark.parametrize("settings", [
    dict(min_new_tokens=6), dict(repetition_penalty=0.1), dict(do_sample=True, temperature=9.0),
    dict(suppress_tokens=list(range(300))), dict(begin_suppress_tokens=list(range(300))),
    dict(forced_eos_token_id=5), dict(bad_words_ids=[[t] for t in range(300)]),
    dict(num_beams=4, length_penalty=-9.0), dict(max_new_tokens=1), dict(max_length=3)])
def test_the_checkpoints_generation_config_does_not_change_answers(folders, tmp_path, settings):
    folder = copied(folders("qwen2_5_vl"), tmp_path)
    lm, family = load_checkpoint(str(folder), torch.float64)
    ids = torch.tensor([family.encode(family.render(conversation(0)[0][:1]))[0][:9]])
    asked = dict(inputs=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6)
    ends = [family.end_id, int(lm.generate(**asked)[0, 11])]  # one that greedy decoding reaches
    write(folder / "generation_config.json", eos_token_id=ends)
    said = load_checkpoint(str(folder), torch.float64)[0].generate(**asked).tolist()
    assert len(said[0]) == 12
    write(folder / "generation_config.json", **settings)
    again, _ = load_checkpoint(str(folder), torch.float64)
    assert again.generate(**asked).tolist() == said
    again.generation_config = GenerationConfig.from_pretrained(folder)
    if not settings.keys() & {"max_length", "max_new_tokens", "forced_eos_token_id"}:  # lengths
        assert again.generate(**asked).tolist() != said  # what it would have said


def test_answers_stop_where_a_turn_ends_whatever_the_checkpoint_says(folders, tmp_path):
    folder = copied(folders("gemma3"), tmp_path)
    write(folder / "generation_config.json", eos_token_id=7)
    lm, family = load_checkpoint(str(folder), torch.float32)
    assert lm.generation_config.eos_token_id == sorted([7, family.end_id])


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava"])
def test_features_are_kept_by_the_kind_of_image_processor(folders, name):
    """The PIL and the torchvision kind describe themselves alike, but their pixels differ."""
    _, family = load_checkpoint(str(folders(name)), torch.float32)
    images = getattr(family.processor, "image_processor", family.processor)
    before, said, kind = family.fingerprint(), images.to_dict(), type(images)
    other = kind.__name__.removesuffix("Pil") if kind.__name__.endswith("Pil") else (
        f"{kind.__name__}Pil")
    images.__class__ = type(other, (kind,), {})
    assert HAVE_TORCHVISION or images.to_dict() == said  # where it is the PIL kind that is in use
    assert family.fingerprint() != before


@pytest.mark.skipif(HAVE_TORCHVISION, reason="torchvision is installed")
def test_a_processor_that_needs_another_package_says_which(folders, tmp_path):
    folder = copied(folders("idefics3"), tmp_path)
    write(folder / "processor_config.json", processor_class="PixtralProcessor")
    with pytest.raises(ValueError, match="needs a package that is not installed: torchvision$"):
        load_checkpoint(str(folder), torch.float32)


# ---- states and answers --------------------------------------------------------------------------


def placed(vlm, turns, images, prompt=False):
    """A view of the conversation, and the store that its images are in."""
    store, rendered = ImageStore(vlm.family), vlm.family.render(turns, prompt)
    ids = vlm.family.encode(expanded(vlm.family, rendered, images))[0]
    shown = [store.add_image(image, "here") for image in images]
    return data.View(ids, [-100] * len(ids), shown, len(ids) - 1), store


def states(vlm, store, views):
    batch = data.collate(views, vlm.pad_id)
    with torch.no_grad():
        return vlm(batch, store.encoded(batch.images)).states


def own_inputs(vlm, folder, ids, images):
    """What transformers' own model is given for that conversation: ids, the processor's pixels."""
    if isinstance(vlm.family, QwenFamily):
        pixels = vlm.family.processor(images=images, return_tensors="pt")
        pixels["mm_token_type_ids"] = (torch.tensor([ids]) == vlm.lm.config.image_token_id).int()
    else:
        own = AutoProcessor.from_pretrained(folder)
        pixels = own(text=[own.image_token * len(images)], images=[images], return_tensors="pt")
        pixels = {k: v for k, v in pixels.items() if k not in ("input_ids", "attention_mask")}
        if pixels.pop("token_type_ids", None) is not None:
            is_image = torch.tensor([ids]) == vlm.lm.config.image_token_id
            pixels["token_type_ids"] = is_image.long()
    pixels = {k: v.double() if v.is_floating_point() else v for k, v in pixels.items()
              if k != "mm_token_type_ids" or isinstance(vlm.family, QwenFamily)}
    ids = torch.tensor([ids])
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), **pixels)


def test_states_and_answers_are_those_of_transformers(checkpoint):
    vlm = VLM(checkpoint, dtype=torch.float64).eval()
    turns, images = conversation(0 if vlm.family.alone_only else 1)
    view, store = placed(vlm, turns, images)
    with torch.no_grad():
        expected = vlm.lm.model(**own_inputs(vlm, checkpoint, view.ids, images)).last_hidden_state
    torch.testing.assert_close(states(vlm, store, [view]), expected)

    view, store = placed(vlm, turns[:1], images[:1], prompt=True)
    asked = own_inputs(vlm, checkpoint, view.ids, images[:1])
    said = vlm.lm.generate(**asked, max_new_tokens=6)[0, len(view.ids):].tolist()
    assert vlm.generate([view], store, 6) == [said] and len(said) > 1


def test_padding_changes_no_state(checkpoint):
    vlm = VLM(checkpoint, dtype=torch.float64).eval()
    turns, images = conversation(0)
    store, views = ImageStore(vlm.family), []
    for extra in ("", " And which of all the others?"):
        turns[0]["content"][1]["text"] += extra
        view, _ = placed(vlm, turns, images)
        views.append(view._replace(images=[store.add_image(images[0], "here")]))
    assert len(views[0].ids) < len(views[1].ids)
    together, alone = states(vlm, store, views)[0], states(vlm, store, views[:1])[0]
    torch.testing.assert_close(together[:len(views[0].ids)], alone)


# ---- training and merging ------------------------------------------------------------------------


TRAINED = ["qwen2_5_vl", "qwen3_vl_new", "llava", "llava_next", "llava_next_yi", "idefics3",
           "gemma3", "llava_template_in_tokenizer_config", *sorted(NEED_TORCHVISION)]


@pytest.fixture(params=TRAINED)
def small(request, folders, config):
    """A run on that checkpoint; OneVision learns answers alone, since it refuses tool images."""
    folder = folders(request.param)
    alone = dict(data=answers_alone(config.out)) if request.param == "llava_onevision" else {}
    return dataclasses.replace(config, model=str(folder), train_examples=4, valid_examples=2,
                               test_per_family=1, steps=2, max_tokens=4096, **alone)


def answers_alone(out):
    """A data folder of questions and bare answers, which Pearl too can learn from."""
    folder = Path(out).parent / "answers"
    examples = [dataclasses.replace(ex, id=f"{split}-{ex.id}", split=split).answer_only("Answer:")
                for split in ("train", "validation", "test")
                for ex in scenes.make_world("mixed", split, 4, seed=3)]
    records.write_folder(folder, examples)
    return str(folder)


def gradients(config, packed):
    """Of the first step of two, in float64, with LoRA away from its start.

    Not of the second: Adam's first step is as long for a gradient of 1e-9 as for one of 1, so it
    makes differences of the float32 in which transformers computes norms as large as any.
    """
    torch.manual_seed(0)
    run = train.build(dataclasses.replace(config, packed=packed))
    run.step.double()
    assert run.step.config.packed == (packed and run.step.vlm.family.packs)
    run.optimizer.param_groups[0]["lr"] = 1e-3  # not the warm-up's zero
    for name, p in run.step.named_parameters():
        if "lora_B" in name:  # at its start, zero, lora_A would have no gradient
            torch.nn.init.normal_(p, std=0.02)
    trained = {name: p for name, p in run.step.named_parameters() if p.requires_grad}
    train.train_step(run.module, run.optimizer, [0, 1, 2, 3], run.step.config)
    found = {name: p.grad.clone() for name, p in trained.items()}
    train.train_step(run.module, run.optimizer, [0, 1, 2, 3], run.step.config)
    assert all(torch.isfinite(p.grad).all() for p in trained.values())
    return found


def test_two_steps_train_and_the_packed_pass_changes_no_gradient(small):
    found = {packed: gradients(small, packed) for packed in (True, False)}
    assert all(torch.isfinite(g).all() for g in found[True].values())
    moved = {name for name, g in found[True].items() if g.abs().sum() > 0}
    assert "predictor.pred_tokens" in moved and any("lora_A" in name for name in moved)
    for name, gradient in found[True].items():
        torch.testing.assert_close(gradient, found[False][name], msg=lambda said: f"{name}: {said}")


def test_trained_merged_and_answered(small, tmp_path, capsys):
    run = train.train(small)
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    evaluate.merge(str(run), str(tmp_path / "merged"))
    assert "merged loads with transformers' AutoModel" in capsys.readouterr().out
    trained, again = (VLM(path).eval() for path in (run, tmp_path / "merged"))
    torch.testing.assert_close(dict(again.lm.state_dict()), dict(trained.lm.state_dict()))
    tests = train.load_examples(small)[-1]
    said = evaluate.answer_questions(again, tests, small.answer_prefix, small.free_tokens)
    for ours, theirs in zip(said, results["answers"]):
        assert {k: v for k, v in ours.items() if k != "cost"} == {
            k: v for k, v in theirs.items() if k != "cost"}
        assert ours["direct"] in ours["options"]


def test_a_family_that_takes_one_image_alone_learns_bare_answers(folders, config):
    run = train.train(dataclasses.replace(config, model=str(folders("llava_onevision")), steps=1,
                                          method="direct", train_examples=4, valid_examples=2,
                                          test_per_family=1, max_tokens=4096))
    records = json.loads((run / "results.json").read_text(encoding="utf-8"))["answers"]
    assert all(r["direct"] in r["options"] and "tool" not in r for r in records)


def test_what_cannot_work_is_refused_in_one_sentence(folders, config):
    for name, change, message in (
            ("gemma3", dict(order="image_first"), "refuses the conversation: .*roles must alt"),
            ("idefics3", dict(method="recon"), "--method recon .*use a Qwen-VL model")):
        with pytest.raises(ValueError, match=message):
            train.build(dataclasses.replace(config, model=str(folders(name)), max_tokens=4096,
                                            **change))
