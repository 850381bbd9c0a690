"""Claims: families beyond the shipped one work through transformers' own processors. For tiny random models of each: our
view has the ids that the family's processor makes of the conversation, our states and our answer are those of its own
forward pass and `generate` on pixels, padding changes nothing, and two steps of Pearl train. What cannot work says why."""

import dataclasses
import json

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (AutoImageProcessor, AutoProcessor, AutoTokenizer, Gemma3Config, Gemma3ForConditionalGeneration,
                          Gemma3Processor,
                          Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor, InternVLConfig,
                          InternVLForConditionalGeneration, InternVLProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaNextConfig,
                          LlavaNextForConditionalGeneration, LlavaNextProcessor, LlavaOnevisionConfig,
                          LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor, LlavaProcessor, Mistral3Config,
                          Mistral3ForConditionalGeneration, PixtralProcessor, PreTrainedTokenizerFast, Qwen2VLConfig,
                          Qwen2VLForConditionalGeneration, Qwen3VLConfig, Qwen3VLForConditionalGeneration)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

import data
import train
from model import VLM

from conftest import TINY

TEXT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
            max_position_embeddings=4096)
VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, patch_size=8)
EACH = "{% for m in messages %}"
PARTS = "{% for p in m.content %}{% if p.type == 'image' %}IMAGE{% else %}{{ p.text }}{% endif %}{% endfor %}"


def byte_tokenizer(special: list[str], end: str, template: str, **roles) -> PreTrainedTokenizerFast:
    """One token a byte, and the family's special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token=end, **roles)
    tokenizer.add_special_tokens(dict(additional_special_tokens=special))
    tokenizer.chat_template = template
    return tokenizer


def qwen(config_class, model_class, folder, text, vision, **rest):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    token = tokenizer.convert_tokens_to_ids
    config = config_class(text_config=TEXT | dict(vocab_size=len(tokenizer)) | text,
                          vision_config=vision | dict(patch_size=8, spatial_merge_size=2, temporal_patch_size=1),
                          image_token_id=token("<|image_pad|>"), video_token_id=token("<|video_pad|>"),
                          vision_start_token_id=token("<|vision_start|>"), vision_end_token_id=token("<|vision_end|>"), **rest)
    AutoImageProcessor.from_pretrained(TINY).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model_class(config)


def qwen2_vl(folder):
    return qwen(Qwen2VLConfig, Qwen2VLForConditionalGeneration, folder,
                dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 2, 2])),
                dict(depth=2, embed_dim=32, hidden_size=32, num_heads=2, mlp_ratio=2))


def qwen3_vl(folder):
    return qwen(Qwen3VLConfig, Qwen3VLForConditionalGeneration, folder,
                dict(num_hidden_layers=3,
                     rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 2, 2], mrope_interleaved=True)),
                dict(depth=3, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=32, num_position_embeddings=64,
                     deepstack_visual_indexes=[0, 1]))


def idefics3(folder):
    """Tiles and rows of tiles in the text; a space between the generation prompt and the answer."""
    end = "<end_of_utterance>"
    tiles = [f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)]
    tokenizer = byte_tokenizer(["<image>", "<fake_token_around_image>", "<global-img>", *tiles], end, (
        EACH + "{{ m.role.capitalize() }}{% if m.content[0].type == 'image' %}:{% else %}: {% endif %}" + PARTS.replace("IMAGE", "<image>")
        + "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"))
    images = Idefics3ImageProcessorPil(size=dict(longest_edge=64), max_image_size=dict(longest_edge=32))
    Idefics3Processor(images, tokenizer, image_seq_len=4).save_pretrained(folder)
    config = Idefics3Config(text_config=dict(model_type="llama", vocab_size=len(tokenizer), **TEXT),
                            vision_config=VISION | dict(image_size=32),
                            scale_factor=2, image_token_id=tokenizer.convert_tokens_to_ids("<image>"), pad_token_id=tokenizer.pad_token_id)
    return Idefics3ForConditionalGeneration(config)


def gemma3(folder):
    """Image tokens see each other, most layers have a window, and the placeholder is not the token that holds the features."""
    end = "<end_of_turn>"
    tokenizer = byte_tokenizer(["<start_of_turn>"], end, (
        "{{ bos_token }}" + EACH
        + "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
        "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n" + PARTS.replace("IMAGE", "<start_of_image>").replace(
            "p.text", "p.text | trim")
        + "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"), bos_token="<bos>",
        extra_special_tokens=dict(image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>"))
    images = Gemma3ImageProcessorPil(size=dict(height=32, width=32))
    Gemma3Processor(images, tokenizer, image_seq_length=4).save_pretrained(folder)
    token = tokenizer.convert_tokens_to_ids
    config = Gemma3Config(text_config=TEXT | dict(vocab_size=len(tokenizer), sliding_window=8,
                                                  layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=16),
                          vision_config=VISION | dict(image_size=32), mm_tokens_per_image=4, image_token_index=token("<image_soft_token>"),
                          boi_token_index=token("<start_of_image>"), eoi_token_index=token("<end_of_image>"))
    return Gemma3ForConditionalGeneration(config)


def llava_next(folder):
    """Tiles unpadded into a number of tokens that depends on the image's sides."""
    tokenizer = byte_tokenizer(["<image>"], "</s>", (
        "{{ bos_token }}" + EACH + "{% if m.role == 'user' %}[INST] " + PARTS.replace("IMAGE", "<image>\n")
        + " [/INST]{% else %} " + PARTS + "</s>{% endif %}{% endfor %}"), bos_token="<s>")
    images = LlavaNextImageProcessorPil(size=dict(shortest_edge=32), crop_size=dict(height=32, width=32),
                                        image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]])
    LlavaNextProcessor(images, tokenizer, patch_size=8, vision_feature_select_strategy="default",
                       num_additional_image_tokens=1).save_pretrained(folder)
    config = LlavaNextConfig(text_config=dict(model_type="llama", vocab_size=len(tokenizer), **TEXT),
                             vision_config=dict(model_type="clip_vision_model", image_size=32, projection_dim=32, **VISION),
                             image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]], image_token_index=tokenizer.convert_tokens_to_ids("<image>"))
    return LlavaNextForConditionalGeneration(config)


CHATML = (EACH + "<|im_start|>{{ m.role }}\n" + PARTS.replace("IMAGE", "<image>\n")
          + "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def llava(folder):
    """The same number of tokens for every image (LLaVA-Interleave with its Qwen template)."""
    tokenizer = byte_tokenizer(["<image>", "<|im_start|>"], "<|im_end|>", CHATML)
    LlavaProcessor(LlavaImageProcessorPil(size=dict(shortest_edge=32), crop_size=dict(height=32, width=32)), tokenizer,
                   patch_size=8,
                   vision_feature_select_strategy="default", num_additional_image_tokens=1).save_pretrained(folder)
    config = LlavaConfig(text_config=dict(model_type="qwen2", vocab_size=len(tokenizer), **TEXT),
                         vision_config=dict(model_type="clip_vision_model", image_size=32, projection_dim=32, **VISION),
                         image_token_index=tokenizer.convert_tokens_to_ids("<image>"))
    return LlavaForConditionalGeneration(config)


def llava_onevision(folder):
    pytest.importorskip("torchvision")
    from transformers import LlavaOnevisionImageProcessor, LlavaOnevisionVideoProcessor
    tokenizer = byte_tokenizer(["<image>", "<video>", "<|im_start|>"], "<|im_end|>", CHATML)
    pins = [[32, 64], [64, 32], [64, 64]]
    images = LlavaOnevisionImageProcessor(size=dict(height=32, width=32), image_grid_pinpoints=pins)
    LlavaOnevisionProcessor(images, tokenizer, LlavaOnevisionVideoProcessor(), num_image_tokens=16,
                            vision_feature_select_strategy="full").save_pretrained(folder)
    config = LlavaOnevisionConfig(text_config=dict(model_type="qwen2", vocab_size=len(tokenizer), **TEXT),
                                  image_grid_pinpoints=pins,
                                  vision_config=dict(model_type="siglip_vision_model", image_size=32, vision_use_head=False,
                                                     **VISION),
                                  image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
                                  video_token_index=tokenizer.convert_tokens_to_ids("<video>"))
    return LlavaOnevisionForConditionalGeneration(config)


def internvl(folder):
    pytest.importorskip("torchvision")
    from transformers import GotOcr2ImageProcessor, InternVLVideoProcessor
    tokenizer = byte_tokenizer(["<|im_start|>"], "<|im_end|>", CHATML.replace("<image>", "<IMG_CONTEXT>"),
                               extra_special_tokens=dict(
        start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>", video_token="<video>"))
    images = GotOcr2ImageProcessor(size=dict(height=32, width=32), crop_to_patches=True, min_patches=1, max_patches=4)
    InternVLProcessor(images, tokenizer, InternVLVideoProcessor(), image_seq_length=4).save_pretrained(folder)
    config = InternVLConfig(text_config=dict(model_type="qwen2", vocab_size=len(tokenizer), **TEXT), downsample_ratio=0.5,
                            image_seq_length=4,
                            vision_config=VISION | dict(image_size=[32, 32], patch_size=[8, 8]),
                            image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"))
    return InternVLForConditionalGeneration(config)


def mistral3(folder):
    """Rows of an image end in tokens of their own; no generation prompt at all."""
    pytest.importorskip("torchvision")
    tokenizer = byte_tokenizer(["[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"], "</s>", (
        "{{ bos_token }}" + EACH + "{% if m.role == 'user' %}[INST]" + PARTS.replace("IMAGE", "[IMG]")
        + "[/INST]{% else %}" + PARTS + "</s>{% endif %}{% endfor %}"), bos_token="<s>")
    images = PixtralImageProcessorPil(size=dict(longest_edge=64), patch_size=dict(height=8, width=8))
    PixtralProcessor(images, tokenizer, patch_size=8, spatial_merge_size=2).save_pretrained(folder)
    config = Mistral3Config(text_config=dict(model_type="mistral", vocab_size=len(tokenizer), sliding_window=None, **TEXT),
                            vision_config=dict(model_type="pixtral", image_size=64, head_dim=16, **VISION), spatial_merge_size=2,
                            image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"), vision_feature_layer=-1)
    return Mistral3ForConditionalGeneration(config)


BUILDERS = dict(qwen2_vl=qwen2_vl, qwen3_vl=qwen3_vl, idefics3=idefics3, gemma3=gemma3, llava=llava, llava_next=llava_next,
                llava_onevision=llava_onevision, internvl=internvl, mistral3=mistral3)  # the last three need torchvision


@pytest.fixture(scope="module", params=list(BUILDERS))
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(1)
    BUILDERS[request.param](folder).double().save_pretrained(folder)
    return folder


def placed(vlm, examples, pred=0):
    serializer, store = data.Serializer(vlm.tokenizer, vlm.placeholder_id, 4096), data.ImageStore(vlm.family)
    return [serializer.views(ex, *store.add(ex), pred, "trajectory") for ex in examples], serializer, store


def states(vlm, store, views):
    batch = data.collate(views, vlm.pad_id)
    with torch.no_grad():
        features = vlm.encode_images([store.inputs(i) for i in batch.images])
        return batch, vlm(batch, features, [store.grids[i] for i in batch.images])[0]


def own_inputs(vlm, folder, serializer, turns, images, generation_prompt=False):
    """What the family's own processor makes of a conversation."""
    text = vlm.tokenizer.apply_chat_template([serializer._message(role, parts) for role, parts in turns], tokenize=False,
                                             add_generation_prompt=generation_prompt)
    if vlm.family.__class__.__name__ == "QwenFamily":  # no combined processor without torchvision: expand by hand
        image_inputs = vlm.family.processor(images=images, return_tensors="pt")
        for grid in image_inputs["image_grid_thw"]:
            text = text.replace("<|image_pad|>", "<|held|>" * (int(grid.prod()) // 4), 1)
        ids = vlm.tokenizer(text.replace("<|held|>", "<|image_pad|>"), add_special_tokens=False, return_tensors="pt")
        return dict(ids) | dict(image_inputs) | dict(mm_token_type_ids=(ids.input_ids == vlm.image_token_id).int())
    return dict(AutoProcessor.from_pretrained(folder)(text=[text], images=[images], add_special_tokens=False, return_tensors="pt"))


def test_views_states_and_answers_are_the_familys_own(checkpoint, mixed):
    vlm = VLM(checkpoint, dtype=torch.float64)
    vlm.eval()
    example = dataclasses.replace(mixed[0], image=mixed[0].image.resize((60, 40)))  # not square: tiles and rows differ
    if vlm.lm.config.model_type == "llava_onevision":  # in company it gives each image one tile; we place each as if alone
        example = example.answer_only("Answer:")
    [views], serializer, store = placed(vlm, [example])
    turns = [(role, [data.opened(p) if not isinstance(p, str) else p for p in parts]) for role, parts in serializer.turns(example)]
    theirs = own_inputs(vlm, checkpoint, serializer, turns, example.images)
    ids = theirs["input_ids"][0].tolist()
    assert ids[:len(views.full.ids)] == views.full.ids and len(ids) - len(views.full.ids) <= 1  # what follows the end is layout
    bos = [vlm.tokenizer.bos_token_id] if vlm.tokenizer.bos_token_id in ids[:1] else []
    alone = views.target.ids[len(bos):]  # R as it stands in the conversation, opened as any conversation is
    assert views.target.ids[:len(bos)] == bos and views.full.ids[-len(alone):] == alone
    pixels = {k: v.double() if v.is_floating_point() else v for k, v in theirs.items()}
    with torch.no_grad():
        expected = vlm.lm.model(**pixels).last_hidden_state[0, :len(views.full.ids)]
    torch.testing.assert_close(states(vlm, store, [views.full])[1][0], expected)

    prompt = own_inputs(vlm, checkpoint, serializer, turns[:1], example.images[:1], generation_prompt=True)
    assert prompt["input_ids"][0].tolist() == views.input.ids
    prompt = {k: v.double() if v.is_floating_point() else v for k, v in prompt.items()}
    said = vlm.lm.generate(**prompt, max_new_tokens=6, do_sample=False, pad_token_id=vlm.pad_id)[0, len(views.input.ids):]
    assert vlm.generate([views.input], store, 6) == [said.tolist()]


def test_padding_changes_no_state(checkpoint, mixed):
    vlm = VLM(checkpoint, dtype=torch.float64)
    vlm.eval()
    views, _, store = placed(vlm, mixed[:3])
    short, long = sorted((v.full for v in views), key=lambda v: len(v.ids))[::2]
    assert len(short.ids) < len(long.ids)
    torch.testing.assert_close(states(vlm, store, [short, long])[1][0, :len(short.ids)], states(vlm, store, [short])[1][0])


def test_two_steps_train_and_the_packed_pass_changes_no_gradient(checkpoint, config):
    config = dataclasses.replace(config, model=str(checkpoint), train_examples=4, valid_examples=2, max_tokens=4096)
    found = {}
    for packed in (True, False):
        torch.manual_seed(0)
        vlm, extra, module, optimizer, *_ = train.build(dataclasses.replace(config, packed=packed), 1)
        assert module.config.packed == (packed and vlm.family.packs)
        module.double()
        optimizer.param_groups[0]["lr"] = 1e-3  # not the warm-up's zero
        for _ in range(2):
            optimizer.zero_grad()
            train.train_step(module, [0, 1, 2, 3], config)
            optimizer.step()
        found[packed] = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    assert all(torch.isfinite(g).all() for g in found[True].values())
    moved = {name for name, g in found[True].items() if g.abs().sum() > 0}
    assert "extra.pred_tokens" in moved and any("lora_A" in name for name in moved)
    for name, gradient in found[True].items():
        torch.testing.assert_close(gradient, found[False][name], msg=lambda text: f"{name}: {text}")


def test_a_merged_checkpoint_of_another_family_loads_with_transformers_alone(tmp_path, config):
    torch.manual_seed(1)
    idefics3(tmp_path / "base").save_pretrained(tmp_path / "base")
    config = dataclasses.replace(config, model=str(tmp_path / "base"), steps=2, train_examples=4, valid_examples=2, max_tokens=4096,
                                 test_per_family=1)
    run = train.train(config)
    train.merge(run, tmp_path / "merged")
    again = VLM(tmp_path / "merged")
    assert AutoProcessor.from_pretrained(tmp_path / "merged").image_seq_len == 4
    trained, _, _ = train.evaluate.load_run(run, "cpu")
    torch.testing.assert_close(again.lm.state_dict(), trained.lm.state_dict())


def test_a_processor_that_needs_another_package_says_which(tmp_path):
    """Without torchvision the processors of SmolVLM2, LLaVA-OneVision, InternVL and Mistral 3 cannot be built."""
    if transformers.utils.is_torchvision_available():
        pytest.skip("torchvision is installed")
    idefics3(tmp_path).save_pretrained(tmp_path)
    file = tmp_path / "processor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(processor_class="PixtralProcessor")))
    with pytest.raises(ValueError, match="needs a package that is not installed: torchvision$"):
        VLM(tmp_path)


def test_what_cannot_work_is_refused_in_one_sentence(tmp_path, config):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    gemma3(tmp_path / "g").save_pretrained(tmp_path / "g")
    with pytest.raises(ValueError, match="chat template refuses the conversation: roles must alternate"):
        train.build(dataclasses.replace(config, model=str(tmp_path / "g"), order="image_first", max_tokens=4096), 1)
    idefics3(tmp_path / "a").save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match="--method recon .*use a Qwen-VL model"):
        train.build(dataclasses.replace(config, model=str(tmp_path / "a"), method="recon"), 1)
    processor = AutoProcessor.from_pretrained(tmp_path / "a")
    processor.chat_template = None
    processor.tokenizer.chat_template = None
    processor.save_pretrained(tmp_path / "b")
    (tmp_path / "a" / "config.json").rename(tmp_path / "b" / "config.json")
    (tmp_path / "a" / "model.safetensors").rename(tmp_path / "b" / "model.safetensors")
    with pytest.raises(ValueError, match="no chat template"):
        VLM(tmp_path / "b")
    tokenizer.chat_template = EACH + "{{ m.role }}: " + PARTS + " {% endfor %}{% if add_generation_prompt %}now assistant:{% endif %}"
    with pytest.raises(ValueError, match="chat template does not write an assistant turn"):
        data.Serializer(tokenizer, 0, 99)
