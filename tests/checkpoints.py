r"""Tiny random checkpoints, each a complete folder in the layout in which its family is published.

`build(name, folder)` writes config, weights, tokenizer, processor and template, in a tenth of a
second. Kept of the originals: which file holds which template (templates.jinja), the kind of
tokenizer and which of its added tokens are special. Not kept: sizes, weights, vocabularies.
"""

import json
import re
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

SENTENCES = ["Which digit is on the red disc? Zoom in on the red disc. The digit is seven. five",
             "Which dotted bar is the tallest? The second one. Answer: blue", "model answer: two\n",
             "USER: Which colour is the square? ASSISTANT: It is red. Answer: red", "user\n\n"]
LETTERS = [chr(c) for c in range(33, 127)]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
# name -> template, its lines joined
TEMPLATES = {name: "".join(line.strip() for line in text.splitlines()) for name, text in re.findall(
    r"\{# ([A-Z_0-9]+): .*#\}\n((?:.+\n)+)", Path(__file__).with_name("templates.jinja").read_text(
        encoding="utf-8"))}
TEMPLATES["INTERLEAVE"] = TEMPLATES["YI"].replace("<|im_end|>'", "<|im_end|>\\n'")
TEMPLATES["INTERNVL"] = TEMPLATES["QWEN_3"].replace(
    "<|vision_start|><|image_pad|><|vision_end|>", "<IMG_CONTEXT>\\n")



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


def finished(make, special: list[str], eos: str, pad: str = "<pad>", **rest):
    """What `make` makes as a tokenizer of transformers, with special tokens."""
    raw = make()
    raw.add_special_tokens([AddedToken(t, special=True, normalized=False)
                            for t in [*special, eos, pad]])
    return hf.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=eos, pad_token=pad, **rest)


def write(file: Path, **fields) -> None:
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    fields = {key: value for key, value in (known | fields).items() if value is not None}
    file.write_text(json.dumps(fields, indent=2), encoding="utf-8")


def random_model(stem: str, tokenizer, text: dict, vision: dict, **rest):
    """stem: of transformers' class names. rest: of its config, ids of tokens as the tokens."""
    rest = {key: tokenizer.convert_tokens_to_ids(value) if key.endswith("_token_id") else value
            for key, value in rest.items()}
    config = getattr(hf, f"{stem}Config")(
        text_config=TEXT | text | dict(vocab_size=len(tokenizer)), vision_config=VISION | vision,
        **rest)
    return getattr(hf, f"{stem}ForConditionalGeneration")(config)


def save(folder: Path, model, processor, template: str, layout: str, **generation) -> None:
    """layout: `new` (transformers 5: chat_template.jinja, all settings in processor_config.json) or
    old, the template in chat_template.json, processor_config.json or tokenizer_config.json."""
    folder, template = Path(folder), TEMPLATES[template]
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


def qwen(stem: str, layout: str, preprocessor: dict, tokenizers_template, folder, patch: int = 8):
    """stem: of transformers' class names. preprocessor: its file, but for the sizes of patches."""
    marks = ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = finished(byte_level, marks, "<|im_end|>", "<|endoftext|>")
    vision = dict(patch_size=patch, spatial_merge_size=2, temporal_patch_size=2, num_heads=2,
                  depth=2, out_hidden_size=32, intermediate_size=32)
    more = dict(Qwen2VL=dict(embed_dim=32, mlp_ratio=2),
                Qwen2_5_VL=dict(window_size=32, fullatt_block_indexes=[1]),
                Qwen3VL=dict(depth=3, num_position_embeddings=64, deepstack_visual_indexes=[0, 1]))
    rope = dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 2, 2])
    if stem == "Qwen3VL":
        rope["mrope_interleaved"] = True
    model = random_model(
        stem, tokenizer, dict(num_hidden_layers=3, rope_parameters=rope), vision | more[stem],
        image_token_id="<|image_pad|>", video_token_id="<|video_pad|>",
        vision_start_token_id="<|vision_start|>", vision_end_token_id="<|vision_end|>")
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    template = "QWEN_3" if stem == "Qwen3VL" else "QWEN_2"
    save(folder, model, tokenizer, template, layout, do_sample=True, temperature=1e-6,
         repetition_penalty=1.05, eos_token_id=ends)
    folder, common = Path(folder), dict(patch_size=patch, merge_size=2, temporal_patch_size=2)
    images = common | dict(image_mean=[0.5] * 3, image_std=[0.5] * 3) | preprocessor
    kind = "Qwen3VLVideoProcessor" if stem == "Qwen3VL" else "Qwen2VLVideoProcessor"
    video = common | dict(size=EDGES, video_processor_type=kind)
    if layout == "new":
        write(folder / "processor_config.json", image_processor=images, video_processor=video,
              processor_class=f"{stem}Processor")
    else:
        write(folder / "preprocessor_config.json", **images, processor_class=f"{stem}Processor")
        write(folder / "video_preprocessor_config.json", **video)
        write(folder / "tokenizer_config.json", chat_template=TEMPLATES[tokenizers_template],
              tokenizer_class="Qwen2Tokenizer")


SLOW = dict(image_processor_type="Qwen2VLImageProcessor")
FAST = dict(image_processor_type="Qwen2VLImageProcessorFast")
PIXELS = dict(min_pixels=1024, max_pixels=4096)
EDGES = dict(shortest_edge=1024, longest_edge=4096)
QWEN = dict(
    # the same template in both files
    qwen2_vl=partial(qwen, "Qwen2VL", OLD, SLOW | PIXELS, "QWEN_2"),
    # by an older transformers: `size` too has the old keys
    qwen2_vl_saved_again=partial(qwen, "Qwen2VL", OLD, SLOW | PIXELS | dict(size=PIXELS), "QWEN_2"),
    # the tokenizer's template is for text only
    qwen2_5_vl=partial(qwen, "Qwen2_5_VL", OLD, SLOW | PIXELS, "QWEN_TEXT_ONLY"),
    # `size` alone, with the old keys
    qwen2_5_vl_old_size=partial(
        qwen, "Qwen2_5_VL", OLD, FAST | dict(size=PIXELS), "QWEN_TEXT_ONLY"),
    qwen2_5_vl_new=partial(qwen, "Qwen2_5_VL", "new", FAST | dict(size=EDGES), None),
    qwen3_vl=partial(qwen, "Qwen3VL", OLD, FAST | dict(size=EDGES), "QWEN_3"),
    qwen3_vl_new=partial(qwen, "Qwen3VL", "new", FAST | dict(size=EDGES), None))

PINS = [[32, 64], [64, 32], [64, 64]]
SQUARE = dict(height=32, width=32)


def llava_like(stem, make, template, folder, layout=OLD, text="llama", kind=None) -> None:
    """stem: Llava (as many tokens for every image) or LlavaNext (tiles, unpadded by its sides)."""
    tokenizer = make()
    pins = dict(image_grid_pinpoints=PINS) if stem == "LlavaNext" else {}
    images = LlavaNextImageProcessorPil if pins else LlavaImageProcessorPil
    processor = getattr(hf, f"{stem}Processor")(
        images(size=dict(shortest_edge=32), crop_size=SQUARE, **pins), tokenizer, patch_size=8,
        vision_feature_select_strategy="default", num_additional_image_tokens=1)
    clip = dict(model_type="clip_vision_model", image_size=32, projection_dim=32)
    model = random_model(stem, tokenizer, dict(model_type=text), clip, image_token_id="<image>",
                         **pins)
    save(folder, model, processor, template, layout, bos_token_id=tokenizer.bos_token_id)
    if kind:
        write(Path(folder) / "tokenizer_config.json", tokenizer_class=kind)


def llama(make, *special: str, eos: str = "</s>"):
    return finished(make, ["<unk>", "<s>", "</s>", "<image>", *special], eos, bos_token="<s>",
                    unk_token="<unk>")


def llama3() -> Tokenizer:
    return opening(byte_level(), "<|begin_of_text|>")


def yi() -> Tokenizer:
    """Without bos in front, for here it is also what opens every turn."""
    raw = metaspace("never")
    raw.post_processor = processors.TemplateProcessing("$A", "$A $B", [])
    return raw


def llava_onevision(folder):  # turns and the generation prompt differ in a blank
    marks = ["<image>", "<video>", "<|im_start|>"]
    tokenizer = finished(byte_level, marks, "<|im_end|>", "<|endoftext|>")
    images = hf.LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=PINS)
    processor = hf.LlavaOnevisionProcessor(
        images, tokenizer, hf.LlavaOnevisionVideoProcessor(), num_image_tokens=16,
        vision_feature_select_strategy="full")
    siglip = dict(model_type="siglip_vision_model", image_size=32, vision_use_head=False)
    model = random_model("LlavaOnevision", tokenizer, dict(model_type="qwen2"), siglip,
                         image_grid_pinpoints=PINS, image_token_id="<image>",
                         video_token_id="<video>")
    save(folder, model, processor, "ONEVISION", OLD)


def mistral(stem: str, template: str, layout: str, folder) -> None:
    """Rows of an image end in tokens of their own; there is no generation prompt."""
    marks = ["<unk>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]",
             "[IMG_BREAK]", "[IMG_END]"]
    tokenizer = finished(partial(opening, byte_level(), "<s>"), marks, "</s>", bos_token="<s>")
    merge = dict(spatial_merge_size=2) if stem == "Mistral3" else {}
    model = random_model(stem, tokenizer, dict(model_type="mistral"),
                         dict(model_type="pixtral", image_size=64, head_dim=16), **merge,
                         vision_feature_layer=-1, vision_feature_select_strategy="full",
                         image_token_id="[IMG]")
    images = PixtralImageProcessorPil(size=dict(longest_edge=64),
                                      patch_size=dict(height=8, width=8))
    save(folder, model, hf.PixtralProcessor(images, tokenizer, patch_size=8, **merge), template,
         layout)


def idefics3(folder, bos: str = "<|begin_of_text|>", layout: str = IN_PROCESSOR):
    """Tiles and rows of tiles in the text; a blank between the generation prompt and the answer."""
    marks = [bos, "<image>", "<fake_token_around_image>", "<global-img>"]
    marks += [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    tokenizer = finished(byte_level, marks, "<end_of_utterance>", bos_token=bos)
    model = random_model("Idefics3", tokenizer, dict(model_type="llama"), dict(image_size=32),
                         scale_factor=2, image_token_id="<image>", pad_token_id="<pad>")
    images = Idefics3ImageProcessorPil(size=dict(longest_edge=64),
                                       max_image_size=dict(longest_edge=32))
    save(folder, model, hf.Idefics3Processor(images, tokenizer, image_seq_len=4), "IDEFICS", layout)


def gemma3(folder):
    """Image tokens see each other, most layers have a window, a placeholder unlike the features'
    token, and an image that stands between line breaks of its own."""
    roles = dict(image_token="<image_soft_token>", boi_token="<start_of_image>",
                 eoi_token="<end_of_image>")
    marks = ["<start_of_turn>", "<end_of_turn>", *roles.values()]
    tokenizer = finished(gemma, marks, "<eos>", bos_token="<bos>", unk_token="<unk>",
                         extra_special_tokens=roles)
    layers = dict(sliding_window=8, layer_types=["sliding_attention", "full_attention"])
    model = random_model("Gemma3", tokenizer, layers | dict(query_pre_attn_scalar=16),
                         dict(image_size=32), mm_tokens_per_image=4,
                         **{f"{key}_id": role for key, role in roles.items()})
    processor = hf.Gemma3Processor(Gemma3ImageProcessorPil(size=SQUARE), tokenizer,
                                   image_seq_length=4)
    save(folder, model, processor, "GEMMA", OLD, do_sample=True, top_k=64, top_p=0.95,
         eos_token_id=tokenizer.convert_tokens_to_ids(["<eos>", "<end_of_turn>"]))
    write(Path(folder) / "tokenizer_config.json", tokenizer_class="GemmaTokenizer")


def internvl(folder):
    roles = dict(start_image_token="<img>", end_image_token="</img>", video_token="<video>",
                 context_image_token="<IMG_CONTEXT>")
    tokenizer = finished(byte_level, ["<|im_start|>", *roles.values()], "<|im_end|>",
                         "<|endoftext|>", extra_special_tokens=roles)
    images = hf.GotOcr2ImageProcessor(size=SQUARE, crop_to_patches=True, min_patches=1,
                                      max_patches=4)
    model = random_model("InternVL", tokenizer, dict(model_type="qwen2"), dict(
        image_size=[32, 32], patch_size=[8, 8]), downsample_ratio=0.5, image_seq_length=4,
        image_token_id="<IMG_CONTEXT>")
    processor = hf.InternVLProcessor(images, tokenizer, hf.InternVLVideoProcessor(),
                                     image_seq_length=4)
    save(folder, model, processor, "INTERNVL", "new")


CHATML = ["<image>", "<|im_start|>"]
LLAMA_3 = ["<image>", "<|start_header_id|>", "<|end_header_id|>"]
PROCESSOR = dict(
    # LLaVA 1.5: no token ends a turn, a blank does
    llava=partial(llava_like, "Llava", partial(llama, prepend), "VICUNA", kind="LlamaTokenizer"),
    llava_template_in_processor_config=partial(
        llava_like, "Llava", partial(llama, partial(metaspace, "first")), "VICUNA",
        layout=IN_PROCESSOR),
    # no published family has its kind of tokenizer
    llava_template_in_tokenizer_config=partial(
        llava_like, "Llava", partial(llama, unigram, "<|im_start|>", eos="<|im_end|>"),
        "INTERLEAVE", layout="tokenizer_config.json"),
    llava_interleave=partial(
        llava_like, "Llava", partial(finished, byte_level, CHATML, "<|im_end|>", "<|endoftext|>"),
        "INTERLEAVE", layout="new", text="qwen2"),
    # LLaVA 1.6: Mistral, Vicuna, Llama 3, 34B
    llava_next=partial(llava_like, "LlavaNext", partial(llama, prepend), "INST", text="mistral",
                       kind="LlamaTokenizer"),
    llava_next_vicuna=partial(llava_like, "LlavaNext", partial(llama, partial(metaspace, "always")),
                              "VICUNA"),
    llava_next_llama3=partial(llava_like, "LlavaNext", partial(
        finished, llama3, LLAMA_3, "<|eot_id|>", bos_token="<|begin_of_text|>"), "LLAMA_3"),
    llava_next_yi=partial(llava_like, "LlavaNext", partial(
        finished, yi, ["<unk>", *CHATML], "<|im_end|>", bos_token="<|im_start|>",
        unk_token="<unk>"), "YI"),
    # SmolVLM's first release: an Idefics3, opened by what opens turns in ChatML
    idefics3=idefics3, smolvlm=partial(idefics3, bos="<|im_start|>", layout=OLD), gemma3=gemma3)
# their processors need it
TORCHVISION = dict(
    llava_onevision=llava_onevision, internvl=internvl,
    pixtral=partial(mistral, "Llava", "PIXTRAL", OLD),
    mistral3=partial(mistral, "Mistral3", "MISTRAL_3", "new"))
BUILDERS = QWEN | PROCESSOR | TORCHVISION


def build(name: str, folder: Path) -> Path:
    """The checkpoint `name` in `folder`: the same weights each time, in float64 to be compared."""
    torch.manual_seed(1)
    torch.set_default_dtype(torch.float64)
    try:
        BUILDERS[name](folder)
    finally:
        torch.set_default_dtype(torch.float32)
    return Path(folder)
