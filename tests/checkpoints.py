r"""Tiny random checkpoints, each a complete folder in the layout in which its family is published.

`build(name, folder)` writes config, weights, tokenizer, processor and template, in a tenth of a
second. Kept of the originals: which file holds which template; how it opens, ends and separates
turns, blanks included; the kind of tokenizer, what it puts in front of a text, and which of its
added tokens are special. Not kept: sizes, weights, vocabularies. TOKENIZERS has each kind alone.
"""

import json
from functools import partial
from pathlib import Path

import torch
import transformers as hf
from tokenizers import (AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers,
                        processors, trainers)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil)
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

HEADS = dict(num_hidden_layers=2, num_attention_heads=2, hidden_size=32, intermediate_size=48)
TEXT = HEADS | dict(num_key_value_heads=1, head_dim=16, max_position_embeddings=4096)
VISION = HEADS | dict(patch_size=8)

# ---- tokenizers, one of each kind ----------------------------------------------------------------

SENTENCES = ["Which digit is on the red disc? Zoom in on the red disc. The digit is seven. five",
             "Which dotted bar is the tallest? The second one. Answer: blue", "model answer: two\n",
             "USER: Which colour is the square? ASSISTANT: It is red. Answer: red", "user\n\n"]
LETTERS = [chr(c) for c in range(33, 127)]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def sentencepiece_bpe() -> Tokenizer:
    """<unk>, <s>, </s>, 256 bytes for what no word covers, words; <s> in front of every text."""
    learned = Tokenizer(models.BPE(unk_token="<unk>"))
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    learned.train_from_iterator(SENTENCES * 3, trainers.BpeTrainer(
        vocab_size=260, initial_alphabet=["▁", *LETTERS], show_progress=False))
    words = learned.get_vocab()
    words = dict.fromkeys(["<unk>", "<s>", "</s>", *BYTES, *sorted(words, key=words.get)])
    merges = [tuple(pair) for pair in json.loads(learned.to_str())["model"]["merges"]]
    raw = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges,
                               unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                     decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return opening(raw, "<s>")


def opening(raw: Tokenizer, bos: str) -> Tokenizer:
    raw.add_special_tokens([bos])
    raw.post_processor = processors.TemplateProcessing(
        f"{bos} $A", f"{bos} $A {bos} $B", [(bos, raw.token_to_id(bos))])
    return raw


def metaspace(scheme: str) -> Tokenizer:
    """Llama's without `legacy` (first) and with it (always), InternVL's on Llama (never)."""
    raw = sentencepiece_bpe()
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    return raw


def prepend() -> Tokenizer:
    """Llama 2's and the first Mistral's as published: a normaliser prepends the word mark."""
    raw = sentencepiece_bpe()
    marks = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    raw.normalizer = normalizers.Sequence(marks)
    return raw


def gemma() -> Tokenizer:
    """No word mark in front; line breaks, runs of blanks, HTML tags: added, but not special."""
    raw = sentencepiece_bpe()
    raw.normalizer = normalizers.Replace(" ", "▁")
    raw.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                     decoders.Fuse()])
    words = [c * n for c in "\n▁" for n in range(1 + (c == "▁"), 32)]
    words += ["<table>", "</table>", "<h1>", "<b>"]
    raw.add_tokens([AddedToken(word, special=False, normalized=False) for word in words])
    return opening(raw, "<bos>")


def unigram() -> Tokenizer:
    """As T5's and XLM-R's."""
    raw = Tokenizer(models.Unigram())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    raw.train_from_iterator(SENTENCES * 3, trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>",
        initial_alphabet=["\n", *LETTERS], show_progress=False))
    return raw


def byte_level() -> Tokenizer:
    """As Qwen's, Llama 3's, SmolLM's and the newer ones of Mistral."""
    raw = Tokenizer(models.BPE())
    raw.normalizer, raw.decoder = normalizers.NFC(), decoders.ByteLevel()
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.train_from_iterator(SENTENCES * 3, trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return raw


TOKENIZERS = dict(
    byte_level=byte_level, prepend=prepend, gemma=gemma, unigram=unigram,
    **{f"metaspace_{s}": partial(metaspace, s) for s in ("first", "always", "never")})


def finished(raw: Tokenizer, special: list[str], eos: str, pad: str = "<pad>", **rest):
    """A transformers tokenizer of it, its special tokens added."""
    raw.add_special_tokens([AddedToken(t, special=True, normalized=False)
                            for t in [*special, eos, pad]])
    return hf.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=eos, pad_token=pad, **rest)


# ---- writing a folder ----------------------------------------------------------------------------


def jinja(text: str) -> str:
    """A template written over several lines; line breaks that it is to write are \\n in quotes."""
    return "".join(line.strip() for line in text.splitlines())


def write(file: Path, **fields) -> None:
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    fields = {key: value for key, value in (known | fields).items() if value is not None}
    file.write_text(json.dumps(fields, indent=2), encoding="utf-8")


def save(folder: Path, model, processor, template: str, layout: str, **generation) -> None:
    """layout: `new` (transformers 5: chat_template.jinja, all settings in processor_config.json) or
    old, the template in chat_template.json, processor_config.json or tokenizer_config.json."""
    folder = Path(folder)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    eos = getattr(processor, "tokenizer", processor).eos_token_id
    write(folder / "generation_config.json", **dict(eos_token_id=eos) | generation)
    if layout == "new":
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        return
    config = folder / "processor_config.json"
    if config.is_file():
        settings = json.loads(config.read_text(encoding="utf-8"))
        for kind, file in (("image_processor", "preprocessor_config.json"),
                           ("video_processor", "video_preprocessor_config.json")):
            if kind in settings:
                write(folder / file, **settings.pop(kind))
        config.unlink()
        write(config, **settings)
    write(folder / layout, chat_template=template)


OLD, IN_PROCESSOR = "chat_template.json", "processor_config.json"

# ---- Qwen-VL -------------------------------------------------------------------------------------

QWEN_PARTS = jinja("""
    {% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}
    {% if p.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>
    {% elif 'text' in p %}{{ p.text }}{% endif %}{% endfor %}{% endif %}""")
GO = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
SYSTEM = "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"
SYSTEM = "{% if loop.first and m.role != 'system' %}" + SYSTEM + "{% endif %}"
TURN = "{{ '<|im_start|>' + m.role + '\\n' }}" + QWEN_PARTS + "{{ '<|im_end|>\\n' }}{% endfor %}"
QWEN_2 = "{% for m in messages %}" + SYSTEM + TURN + GO  # Qwen2-VL's and Qwen2.5-VL's
QWEN_3 = "{% for m in messages %}" + TURN + GO
QWEN_TEXT_ONLY = QWEN_2.replace(QWEN_PARTS, "{{ '' + m.content }}")


def qwen(folder, stem: str, layout: str, preprocessor: dict, tokenizers_template=None) -> None:
    """stem: of transformers' class names. preprocessor: what its file says besides patch sizes."""
    marks = ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = finished(byte_level(), marks, "<|im_end|>", "<|endoftext|>")
    token = tokenizer.convert_tokens_to_ids
    vision = dict(patch_size=8, spatial_merge_size=2, temporal_patch_size=2, num_heads=2,
                  hidden_size=32, depth=2, out_hidden_size=32)
    more = {"Qwen2VL": dict(embed_dim=32, mlp_ratio=2),
            "Qwen2_5_VL": dict(intermediate_size=32, window_size=32, fullatt_block_indexes=[1]),
            "Qwen3VL": dict(intermediate_size=32, depth=3, num_position_embeddings=64,
                            deepstack_visual_indexes=[0, 1])}[stem]
    rope = dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 2, 2])
    text = TEXT | dict(vocab_size=len(tokenizer), num_hidden_layers=3, rope_parameters=rope)
    if stem == "Qwen3VL":
        rope["mrope_interleaved"] = True
    config = getattr(hf, f"{stem}Config")(
        text_config=text, vision_config=vision | more, image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"), vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"))
    save(folder, getattr(hf, f"{stem}ForConditionalGeneration")(config), tokenizer,
         QWEN_3 if stem == "Qwen3VL" else QWEN_2, layout, do_sample=True, temperature=1e-6,
         repetition_penalty=1.05, eos_token_id=[token("<|im_end|>"), token("<|endoftext|>")])
    folder, common = Path(folder), dict(patch_size=8, merge_size=2, temporal_patch_size=2)
    images = common | dict(image_mean=[0.5] * 3, image_std=[0.5] * 3) | preprocessor
    kind = "Qwen3VLVideoProcessor" if stem == "Qwen3VL" else "Qwen2VLVideoProcessor"
    video = common | dict(size=EDGES, video_processor_type=kind)
    if layout == "new":
        write(folder / "processor_config.json", image_processor=images, video_processor=video,
              processor_class=f"{stem}Processor")
    else:
        write(folder / "preprocessor_config.json", **images, processor_class=f"{stem}Processor")
        write(folder / "video_preprocessor_config.json", **video)
        write(folder / "tokenizer_config.json", chat_template=tokenizers_template,
              tokenizer_class="Qwen2Tokenizer")


SLOW = dict(image_processor_type="Qwen2VLImageProcessor")
FAST = dict(image_processor_type="Qwen2VLImageProcessorFast")
PIXELS = dict(min_pixels=1024, max_pixels=4096)
EDGES = dict(shortest_edge=1024, longest_edge=4096)


def qwen2_vl(folder):  # the same template in both files
    qwen(folder, "Qwen2VL", OLD, SLOW | PIXELS, QWEN_2)


def qwen2_vl_saved_again(folder):  # by an older transformers: `size` too has the old keys
    qwen(folder, "Qwen2VL", OLD, SLOW | PIXELS | dict(size=PIXELS), QWEN_2)


def qwen2_5_vl(folder):  # the tokenizer's template is for text only
    qwen(folder, "Qwen2_5_VL", OLD, SLOW | PIXELS, QWEN_TEXT_ONLY)


def qwen2_5_vl_old_size(folder):  # `size` alone, with the old keys
    qwen(folder, "Qwen2_5_VL", OLD, FAST | dict(size=PIXELS), QWEN_TEXT_ONLY)


def qwen2_5_vl_new(folder):
    qwen(folder, "Qwen2_5_VL", "new", FAST | dict(size=EDGES))


def qwen3_vl(folder):
    qwen(folder, "Qwen3VL", OLD, FAST | dict(size=EDGES), QWEN_3)


def qwen3_vl_new(folder):
    qwen(folder, "Qwen3VL", "new", FAST | dict(size=EDGES))


# ---- LLaVA: 1.5, NeXT (1.6), Interleave, OneVision -----------------------------------------------

WORDS = "{% for p in m.content | selectattr('type', 'equalto', 'text') %}{{ p.text }}{% endfor %}"
IMAGES = WORDS.replace("'text'", "'image'").replace("p.text", "'<image>'")
IMAGE_LINES = IMAGES.replace("<image>", "<image>\\n")
VICUNA = jinja("""
    {% for m in messages %}{% if m.role != 'system' %}{{ m.role.upper() + ': ' }}{% endif %}LINES
    {% for p in m.content | selectattr('type', 'equalto', 'text') %}{{ p.text + ' ' }}{% endfor %}
    {% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}
    """).replace("LINES", IMAGE_LINES)
INST = jinja(r"""
    {% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' }}LINES{{ ' [/INST]' }}
    {% elif m.role == 'assistant' %}{{ ' ' + m.content[0].text + '<\\s> ' }}
    {% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}
    {% endfor %}""").replace("LINES", IMAGE_LINES + WORDS)  # sic: four characters, no token
LLAMA_3 = jinja("""
    {% for m in messages %}{% if loop.first and m.role != 'system' %}
    {{ '<|start_header_id|>system<|end_header_id|>\\n\\nYou are helpful.<|eot_id|>' }}{% endif %}
    {{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}LINES{{ '<|eot_id|>' }}
    {% endfor %}{% if add_generation_prompt %}
    {{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
    """).replace("LINES", IMAGE_LINES + WORDS)
YI = jinja("""
    {{ '<|im_start|>system\\nAnswer the questions.<|im_end|>' }}{% for m in messages %}
    {{ '<|im_start|>' + m.role + '\\n' }}LINES{{ '<|im_end|>' }}{% endfor %}
    """).replace("LINES", IMAGE_LINES + WORDS) + GO  # no line break between turns
INTERLEAVE = YI.replace("<|im_end|>'", "<|im_end|>\\n'")
ONEVISION = jinja("""
    {% for m in messages %}{{ '<|im_start|>' + m.role + ' ' }}IMAGES
    {% for p in m.content | selectattr('type', 'equalto', 'text') %}{{ '\\n' + p.text }}
    {% endfor %}{{ '<|im_end|>' }}{% endfor %}""").replace("IMAGES", IMAGES) + GO
PINS = [[32, 64], [64, 32], [64, 64]]
SQUARE = dict(height=32, width=32)


def llava_like(folder, stem, tokenizer, template, layout=OLD, text="llama", kind=None) -> None:
    """stem: Llava (as many tokens for every image) or LlavaNext (tiles, unpadded by its sides)."""
    pins = dict(image_grid_pinpoints=PINS) if stem == "LlavaNext" else {}
    images = LlavaNextImageProcessorPil if pins else LlavaImageProcessorPil
    processor = getattr(hf, f"{stem}Processor")(
        images(size=dict(shortest_edge=32), crop_size=SQUARE, **pins), tokenizer, patch_size=8,
        vision_feature_select_strategy="default", num_additional_image_tokens=1)
    clip = VISION | dict(model_type="clip_vision_model", image_size=32, projection_dim=32)
    config = getattr(hf, f"{stem}Config")(
        text_config=TEXT | dict(model_type=text, vocab_size=len(tokenizer)), vision_config=clip,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), **pins)
    model = getattr(hf, f"{stem}ForConditionalGeneration")(config)
    save(folder, model, processor, template, layout, bos_token_id=tokenizer.bos_token_id)
    if kind:
        write(Path(folder) / "tokenizer_config.json", tokenizer_class=kind)


def llama(raw: Tokenizer, *special: str, eos: str = "</s>"):
    return finished(raw, ["<unk>", "<s>", "</s>", "<image>", *special], eos, bos_token="<s>",
                    unk_token="<unk>")


def llava(folder):  # 1.5: no token ends a turn, a blank does
    llava_like(folder, "Llava", llama(prepend()), VICUNA, kind="LlamaTokenizer")


def llava_template_in_processor_config(folder):
    llava_like(folder, "Llava", llama(metaspace("first")), VICUNA, IN_PROCESSOR)


def llava_template_in_tokenizer_config(folder):  # no published family has its kind of tokenizer
    tokenizer = llama(unigram(), "<|im_start|>", eos="<|im_end|>")
    llava_like(folder, "Llava", tokenizer, INTERLEAVE, "tokenizer_config.json")


def llava_interleave(folder):
    tokenizer = finished(byte_level(), ["<image>", "<|im_start|>"], "<|im_end|>", "<|endoftext|>")
    llava_like(folder, "Llava", tokenizer, INTERLEAVE, "new", "qwen2")


def llava_next(folder):  # 1.6 Mistral
    llava_like(folder, "LlavaNext", llama(prepend()), INST, text="mistral", kind="LlamaTokenizer")


def llava_next_vicuna(folder):
    llava_like(folder, "LlavaNext", llama(metaspace("always")), VICUNA)


def llava_next_llama3(folder):
    raw = opening(byte_level(), "<|begin_of_text|>")
    marks = ["<image>", "<|start_header_id|>", "<|end_header_id|>"]
    tokenizer = finished(raw, marks, "<|eot_id|>", bos_token="<|begin_of_text|>")
    llava_like(folder, "LlavaNext", tokenizer, LLAMA_3)


def llava_next_yi(folder):  # 1.6 34B; here the bos token is also what opens every turn
    raw = metaspace("never")
    raw.post_processor = processors.TemplateProcessing("$A", "$A $B", [])
    tokenizer = finished(raw, ["<unk>", "<image>", "<|im_start|>"], "<|im_end|>",
                         bos_token="<|im_start|>", unk_token="<unk>")
    llava_like(folder, "LlavaNext", tokenizer, YI)


def llava_onevision(folder):  # turns and the generation prompt differ in a blank
    marks = ["<image>", "<video>", "<|im_start|>"]
    tokenizer = finished(byte_level(), marks, "<|im_end|>", "<|endoftext|>")
    images = hf.LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=PINS)
    processor = hf.LlavaOnevisionProcessor(
        images, tokenizer, hf.LlavaOnevisionVideoProcessor(), num_image_tokens=16,
        vision_feature_select_strategy="full")
    siglip = VISION | dict(model_type="siglip_vision_model", image_size=32, vision_use_head=False)
    config = hf.LlavaOnevisionConfig(
        text_config=TEXT | dict(model_type="qwen2", vocab_size=len(tokenizer)),
        vision_config=siglip, image_grid_pinpoints=PINS,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"))
    save(folder, hf.LlavaOnevisionForConditionalGeneration(config), processor, ONEVISION, OLD)


# ---- Pixtral and Mistral Small 3.1 ---------------------------------------------------------------

INST_PARTS = jinja("""
    {{ '[INST]' }}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}
    {% if p.type == 'text' %}{{ p.text }}{% elif p.type == 'image' %}{{ '[IMG]' }}{% endif %}
    {% endfor %}{% endif %}{{ '[/INST]' }}""")
PIXTRAL = jinja("""
    {{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
    {{ raise_exception('conversation roles must alternate user/assistant/...') }}{% endif %}
    {% if m.role == 'user' %}PARTS{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}
    """).replace("PARTS", INST_PARTS)
MISTRAL_3 = jinja("""
    {{ bos_token }}{{ '[SYSTEM_PROMPT]You are Mistral.[/SYSTEM_PROMPT]' }}{% for m in messages %}
    {% if m.role == 'user' %}PARTS{% elif m.content is string %}{{ m.content + eos_token }}
    {% else %}{{ m.content[0].text + eos_token }}{% endif %}{% endfor %}
    """).replace("PARTS", INST_PARTS)


def mistral(folder, stem: str, template: str, layout: str) -> None:
    """Rows of an image end in tokens of their own; there is no generation prompt."""
    marks = ["<unk>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]"]
    tokenizer = finished(opening(byte_level(), "<s>"), [*marks, "[IMG_BREAK]", "[IMG_END]"], "</s>",
                         bos_token="<s>")
    images = PixtralImageProcessorPil(size=dict(longest_edge=64),
                                      patch_size=dict(height=8, width=8))
    merge = dict(spatial_merge_size=2) if stem == "Mistral3" else {}
    pixtral = dict(model_type="pixtral", image_size=64, head_dim=16)
    config = getattr(hf, f"{stem}Config")(
        text_config=TEXT | dict(model_type="mistral", vocab_size=len(tokenizer)),
        vision_config=VISION | pixtral, vision_feature_layer=-1, **merge,
        vision_feature_select_strategy="full",
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"))
    save(folder, getattr(hf, f"{stem}ForConditionalGeneration")(config),
         hf.PixtralProcessor(images, tokenizer, patch_size=8, **merge), template, layout)


def pixtral(folder):  # an assistant's content must be a string, and roles alternate
    mistral(folder, "Llava", PIXTRAL, OLD)


def mistral3(folder):
    mistral(folder, "Mistral3", MISTRAL_3, "new")


# ---- Idefics3, SmolVLM, Gemma 3, InternVL --------------------------------------------------------

IDEFICS = jinja("""
    {{ bos_token }}{% for m in messages %}{{ m.role | capitalize }}
    {% if m.content[0].type == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}
    {% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}
    {% elif p.type == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}
    {{ '<end_of_utterance>\\n' }}{% endfor %}
    {% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}""")
GEMMA = jinja("""
    {{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
    {{ raise_exception('Conversation roles must alternate user/assistant/...') }}{% endif %}
    {{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}
    {% if m.content is string %}{{ m.content | trim }}{% else %}{% for p in m.content %}
    {% if p.type == 'image' %}{{ '<start_of_image>' }}{% else %}{{ p.text | trim }}{% endif %}
    {% endfor %}{% endif %}{{ '<end_of_turn>\\n' }}{% endfor %}
    {% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}""")


def idefics3(folder, bos: str = "<|begin_of_text|>", layout: str = IN_PROCESSOR):
    """Tiles and rows of tiles in the text; a blank between the generation prompt and the answer."""
    marks = [bos, "<image>", "<fake_token_around_image>", "<global-img>"]
    marks += [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    tokenizer = finished(byte_level(), marks, "<end_of_utterance>", bos_token=bos)
    images = Idefics3ImageProcessorPil(size=dict(longest_edge=64),
                                       max_image_size=dict(longest_edge=32))
    config = hf.Idefics3Config(
        text_config=TEXT | dict(model_type="llama", vocab_size=len(tokenizer)), scale_factor=2,
        vision_config=VISION | dict(image_size=32), pad_token_id=tokenizer.pad_token_id,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"))
    save(folder, hf.Idefics3ForConditionalGeneration(config),
         hf.Idefics3Processor(images, tokenizer, image_seq_len=4), IDEFICS, layout)


def smolvlm(folder):  # the first release: an Idefics3, opened by what opens turns in ChatML
    idefics3(folder, "<|im_start|>", OLD)


def gemma3(folder):
    """Image tokens see each other, most layers have a window, a placeholder unlike the features'
    token, and an image that stands between line breaks of its own."""
    roles = dict(image_token="<image_soft_token>", boi_token="<start_of_image>",
                 eoi_token="<end_of_image>")
    marks = ["<start_of_turn>", "<end_of_turn>", *roles.values()]
    tokenizer = finished(gemma(), marks, "<eos>", bos_token="<bos>", unk_token="<unk>",
                         extra_special_tokens=roles)
    token = tokenizer.convert_tokens_to_ids
    layers = dict(sliding_window=8, layer_types=["sliding_attention", "full_attention"])
    config = hf.Gemma3Config(
        text_config=TEXT | layers | dict(vocab_size=len(tokenizer), query_pre_attn_scalar=16),
        vision_config=VISION | dict(image_size=32), mm_tokens_per_image=4,
        image_token_index=token("<image_soft_token>"), boi_token_index=token("<start_of_image>"),
        eoi_token_index=token("<end_of_image>"))
    processor = hf.Gemma3Processor(Gemma3ImageProcessorPil(size=SQUARE), tokenizer,
                                   image_seq_length=4)
    save(folder, hf.Gemma3ForConditionalGeneration(config), processor, GEMMA, OLD, do_sample=True,
         top_k=64, top_p=0.95, eos_token_id=[token("<eos>"), token("<end_of_turn>")])
    write(Path(folder) / "tokenizer_config.json", tokenizer_class="GemmaTokenizer")


def internvl(folder):
    roles = dict(start_image_token="<img>", end_image_token="</img>", video_token="<video>",
                 context_image_token="<IMG_CONTEXT>")
    tokenizer = finished(byte_level(), ["<|im_start|>", *roles.values()], "<|im_end|>",
                         "<|endoftext|>", extra_special_tokens=roles)
    images = hf.GotOcr2ImageProcessor(size=SQUARE, crop_to_patches=True, min_patches=1,
                                      max_patches=4)
    config = hf.InternVLConfig(
        text_config=TEXT | dict(model_type="qwen2", vocab_size=len(tokenizer)),
        vision_config=VISION | dict(image_size=[32, 32], patch_size=[8, 8]), downsample_ratio=0.5,
        image_seq_length=4, image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"))
    processor = hf.InternVLProcessor(images, tokenizer, hf.InternVLVideoProcessor(),
                                     image_seq_length=4)
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    save(folder, hf.InternVLForConditionalGeneration(config), processor,
         QWEN_3.replace(image, "{{ '<IMG_CONTEXT>\\n' }}"), "new")


QWEN = [qwen2_vl, qwen2_vl_saved_again, qwen2_5_vl, qwen2_5_vl_old_size, qwen2_5_vl_new, qwen3_vl,
        qwen3_vl_new]
PROCESSOR = [llava, llava_template_in_processor_config, llava_template_in_tokenizer_config,
             llava_interleave, llava_next, llava_next_vicuna, llava_next_llama3, llava_next_yi,
             idefics3, smolvlm, gemma3]
TORCHVISION = [llava_onevision, pixtral, mistral3, internvl]  # their processors need it
BUILDERS = {builder.__name__: builder for builder in QWEN + PROCESSOR + TORCHVISION}


def build(name: str, folder: Path) -> Path:
    """The checkpoint `name` in `folder`: the same weights each time, in float64 to be compared."""
    torch.manual_seed(1)
    torch.set_default_dtype(torch.float64)
    try:
        BUILDERS[name](folder)
    finally:
        torch.set_default_dtype(torch.float32)
    return Path(folder)
