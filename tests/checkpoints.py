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

from support.files import read_json, write_json

HEADS = dict(num_hidden_layers=2, num_attention_heads=2, hidden_size=32, intermediate_size=48)
TEXT = HEADS | dict(num_key_value_heads=1, head_dim=16, max_position_embeddings=4096)
VISION = HEADS | dict(patch_size=8)

SENTENCES = ["Which digit is on the red disc? Zoom in on the red disc. The digit is seven. five",
             "Which dotted bar is the tallest? The second one. Answer: blue", "model answer: two\n",
             "USER: Which colour is the square? ASSISTANT: It is red. Answer: red", "user\n\n"]
JINJA = Path(__file__).with_name("templates.jinja").read_text(encoding="utf-8")
# name -> template, its lines joined
TEMPLATES = {name: "".join(line.strip() for line in text.splitlines())
             for name, text in re.findall(r"\{# ([A-Z_0-9]+): .*#\}\n((?:.+\n)+)", JINJA)}
TEMPLATES["INTERLEAVE"] = TEMPLATES["YI"].replace("<|im_end|>'", "<|im_end|>\\n'")
TEMPLATES["INTERNVL"] = TEMPLATES["QWEN_3"].replace(
    "<|vision_start|><|image_pad|><|vision_end|>", "<IMG_CONTEXT>\\n")


def fit_bpe(model, pre_tokenizer, **options) -> Tokenizer:
    raw = Tokenizer(model)
    raw.pre_tokenizer = pre_tokenizer
    raw.train_from_iterator(SENTENCES * 3, trainers.BpeTrainer(show_progress=False, **options))
    return raw


def byte_level(*special: str, eos: str = "<|im_end|>", opens: str = "", **rest):
    """As Qwen's, Llama 3's, SmolLM's and the newer ones of Mistral."""
    raw = fit_bpe(models.BPE(), pre_tokenizers.ByteLevel(add_prefix_space=False), vocab_size=340,
                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    raw.normalizer, raw.decoder = normalizers.NFC(), decoders.ByteLevel()
    return complete(raw, special, eos, opens, **rest)


def sentencepiece(*special: str, mark: str, eos: str = "</s>", words=(), **rest):
    """<unk>, <s>, </s>, 256 bytes for what no word covers, words. mark: how a text gets a word mark
    in front: "prepend", by a normaliser; Llama's without `legacy`: "first", and with it: "always";
    Yi's and Gemma's: "never". words: more of them, added and not special."""
    raw = fit_bpe(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True),
                  pre_tokenizers.Metaspace(), vocab_size=516,
                  special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256))],
                  initial_alphabet=["▁", *(chr(c) for c in range(33, 127))])
    plain = dict(added_tokens=[], pre_tokenizer=None)  # now the bytes are ordinary tokens
    raw = Tokenizer.from_str(json.dumps(json.loads(raw.to_str()) | plain))
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                     decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    if mark == "prepend":
        raw.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=mark, split=False)
    raw.add_tokens([AddedToken(word, special=False, normalized=False) for word in words])
    return complete(raw, special, eos, unk_token="<unk>", **rest)


def complete(raw: Tokenizer, special, eos: str, opens: str = "", **rest):
    """A tokenizer of transformers. opens: its bos, in front of every text."""
    if opens:
        raw.add_special_tokens([opens])
        raw.post_processor = processors.TemplateProcessing(
            f"{opens} $A", f"{opens} $A {opens} $B", [(opens, raw.token_to_id(opens))])
        rest["bos_token"] = opens
    raw.add_special_tokens([*special, eos, "<pad>"])
    return hf.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=eos, pad_token="<pad>",
                                      **rest)


CHATML = partial(byte_level, "<|im_start|>", "<image>")
LLAMA = partial(sentencepiece, "<unk>", "<s>", "<image>", opens="<s>")
LLAMA_2 = partial(LLAMA, mark="prepend")  # as published, and so the first Mistral's
LLAMA_3 = partial(byte_level, "<image>", "<|start_header_id|>", "<|end_header_id|>",
                  eos="<|eot_id|>", opens="<|begin_of_text|>")
# without bos in front, for here it is also what opens every turn
YI = partial(sentencepiece, "<unk>", "<image>", "<|im_start|>", mark="never", eos="<|im_end|>",
             bos_token="<|im_start|>")

# files that hold the template; NEW: also all settings in processor_config.json (transformers 5)
NEW, OLD = "chat_template.jinja", "chat_template.json"
IMAGES, BOTH = "preprocessor_config.json", "processor_config.json"
TOKENS, PLAIN = "tokenizer_config.json", "PreTrainedTokenizerFast"


def write(file: Path, **fields) -> None:
    """Sets fields of a JSON file."""
    write_json(file, (read_json(file) if file.is_file() else {}) | fields)


def checkpoint(folder: Path, stem: str, processor, template: str, layout: str, text: dict,
               vision: dict, roles: dict, kind: str = PLAIN, settings=(), **config) -> None:
    """stem: of transformers' class names. roles: tokens whose ids config.json has. kind: class of
    the tokenizer. settings: more of processor_config.json."""
    tokenizer = getattr(processor, "tokenizer", processor)
    config |= {f"{role}_id": tokenizer.vocab[token] for role, token in roles.items()}
    config = getattr(hf, f"{stem}Config")(
        text_config=TEXT | text | dict(vocab_size=len(tokenizer)), vision_config=VISION | vision,
        **config)
    torch.manual_seed(1)  # the same weights each time, in float64 to be compared
    getattr(hf, f"{stem}ForConditionalGeneration")(config).double().save_pretrained(folder)
    processor.save_pretrained(folder)
    write(folder / TOKENS, tokenizer_class=kind)
    write(folder / BOTH, **dict(settings))
    if layout == NEW:
        (folder / NEW).write_text(TEMPLATES[template], encoding="utf-8")
        return
    settings = read_json(folder / BOTH)
    (folder / BOTH).unlink()
    parts = dict(image_processor=IMAGES, video_processor=f"video_{IMAGES}")
    for name, value in settings.items():
        write(folder / parts.get(name, BOTH), **value if name in parts else {name: value})
    write(folder / layout, chat_template=TEMPLATES[template])


PIXELS = dict(min_pixels=1024, max_pixels=4096)  # sizes of images by the old and the new keys
EDGES = dict(shortest_edge=1024, longest_edge=4096)
QWEN_2 = dict(image_processor_type="Qwen2VLImageProcessor", **PIXELS)
FAST = dict(image_processor_type="Qwen2VLImageProcessorFast", size=EDGES)
PINS = [[32, 64], [64, 32], [64, 64]]
SQUARE = dict(height=32, width=32)


def qwen(folder, stem: str, layout: str, preprocessor: dict, tokenizers_template=None) -> None:
    """preprocessor: its file, but for the sizes of patches."""
    roles = dict(image_token="<|image_pad|>", video_token="<|video_pad|>",
                 vision_start_token="<|vision_start|>", vision_end_token="<|vision_end|>")
    tokenizer = byte_level("<|im_start|>", *roles.values())
    # each of the three takes what it knows
    vision = dict(spatial_merge_size=2, temporal_patch_size=2, num_heads=2, depth=3, mlp_ratio=2,
                  out_hidden_size=32, embed_dim=32, window_size=32, fullatt_block_indexes=[1],
                  num_position_embeddings=64, deepstack_visual_indexes=[0, 1])
    third = dict(mrope_interleaved=True) if stem == "Qwen3VL" else {}
    rope = dict(rope_type="default", rope_theta=1e4, mrope_section=[4, 2, 2]) | third
    # its processor would need torchvision, so that only its files are here
    patches = dict(patch_size=8, merge_size=2, temporal_patch_size=2)
    videos = "Qwen3VLVideoProcessor" if third else "Qwen2VLVideoProcessor"
    settings = dict(image_processor=patches | preprocessor,
                    video_processor=patches | dict(size=EDGES, video_processor_type=videos))
    checkpoint(folder, stem, tokenizer, "QWEN_3" if third else "QWEN_2", layout,
               dict(num_hidden_layers=3, rope_parameters=rope), vision, roles, "Qwen2Tokenizer",
               settings)
    if tokenizers_template:
        write(folder / TOKENS, chat_template=TEMPLATES[tokenizers_template])


def llava_like(folder, stem, tokenizer, template, layout, text="llama", kind=PLAIN) -> None:
    """stem: Llava (as many tokens for every image) or LlavaNext (tiles, unpadded by its sides)."""
    pins = dict(image_grid_pinpoints=PINS) if stem == "LlavaNext" else {}
    images = hf.LlavaNextImageProcessorPil if pins else hf.LlavaImageProcessorPil
    processor = getattr(hf, f"{stem}Processor")(
        images(size=dict(shortest_edge=32), crop_size=SQUARE, **pins), tokenizer(), patch_size=8,
        vision_feature_select_strategy="default", num_additional_image_tokens=1)
    clip = dict(model_type="clip_vision_model", image_size=32, projection_dim=32)
    checkpoint(folder, stem, processor, template, layout, dict(model_type=text), clip,
               dict(image_token="<image>"), kind, **pins)


def llava_onevision(folder):
    """Turns and the generation prompt differ in a blank."""
    images = hf.LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=PINS)
    processor = hf.LlavaOnevisionProcessor(
        images, CHATML("<video>"), hf.LlavaOnevisionVideoProcessor(),
        num_image_tokens=16, vision_feature_select_strategy="full")
    checkpoint(folder, "LlavaOnevision", processor, "ONEVISION", OLD, dict(model_type="qwen2"),
               dict(model_type="siglip_vision_model", image_size=32, vision_use_head=False),
               dict(image_token="<image>", video_token="<video>"), image_grid_pinpoints=PINS)


def mistral(folder, stem: str, template: str, layout: str) -> None:
    """Rows of an image end in tokens of their own; there is no generation prompt."""
    tokenizer = byte_level("<unk>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]",
                           "[IMG]", "[IMG_BREAK]", "[IMG_END]", eos="</s>", opens="<s>")
    merge = dict(spatial_merge_size=2) if stem == "Mistral3" else {}
    images = hf.PixtralImageProcessorPil(size=dict(longest_edge=64),
                                         patch_size=dict(height=8, width=8))
    checkpoint(folder, stem, hf.PixtralProcessor(images, tokenizer, patch_size=8, **merge),
               template, layout, dict(model_type="mistral"),
               dict(model_type="pixtral", image_size=64, head_dim=16), dict(image_token="[IMG]"),
               vision_feature_layer=-1, vision_feature_select_strategy="full", **merge)


def idefics3(folder, bos: str, layout: str) -> None:
    """Tiles and rows of tiles in the text; a blank between the generation prompt and the answer."""
    places = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    tokenizer = byte_level(bos, "<image>", "<fake_token_around_image>", "<global-img>", *places,
                           eos="<end_of_utterance>", bos_token=bos)
    images = hf.Idefics3ImageProcessorPil(size=dict(longest_edge=64),
                                          max_image_size=dict(longest_edge=32))
    checkpoint(folder, "Idefics3", hf.Idefics3Processor(images, tokenizer, image_seq_len=4),
               "IDEFICS", layout, dict(model_type="llama"), dict(image_size=32),
               dict(image_token="<image>", pad_token="<pad>"), scale_factor=2)


def gemma3(folder):
    """Image tokens see each other, most layers have a window, a placeholder unlike the features'
    token, an image between line breaks of its own, which are added words, as runs of blanks are."""
    roles = dict(image_token="<image_soft_token>", boi_token="<start_of_image>",
                 eoi_token="<end_of_image>")
    words = ["\n" * n for n in range(1, 32)] + ["▁" * n for n in range(2, 32)]
    tokenizer = sentencepiece(
        "<start_of_turn>", "<end_of_turn>", *roles.values(), mark="never", eos="<eos>",
        opens="<bos>", words=[*words, "<table>", "</table>"], extra_special_tokens=roles)
    processor = hf.Gemma3Processor(hf.Gemma3ImageProcessorPil(size=SQUARE), tokenizer,
                                   image_seq_length=4)
    layers = dict(sliding_window=8, layer_types=["sliding_attention", "full_attention"])
    checkpoint(folder, "Gemma3", processor, "GEMMA", OLD, layers | dict(query_pre_attn_scalar=16),
               dict(image_size=32), roles, "GemmaTokenizer", mm_tokens_per_image=4)


def internvl(folder):
    roles = dict(start_image_token="<img>", end_image_token="</img>", video_token="<video>",
                 context_image_token="<IMG_CONTEXT>")
    tokenizer = byte_level("<|im_start|>", *roles.values(), extra_special_tokens=roles)
    images = hf.GotOcr2ImageProcessor(size=SQUARE, crop_to_patches=True, min_patches=1,
                                      max_patches=4)
    processor = hf.InternVLProcessor(images, tokenizer, hf.InternVLVideoProcessor(),
                                     image_seq_length=4)
    checkpoint(folder, "InternVL", processor, "INTERNVL", NEW, dict(model_type="qwen2"),
               dict(image_size=[32, 32], patch_size=[8, 8]), dict(image_token="<IMG_CONTEXT>"),
               downsample_ratio=0.5, image_seq_length=4)


BUILDERS = dict(  # name -> builder and its arguments
    qwen2_vl=(qwen, "Qwen2VL", OLD, QWEN_2, "QWEN_2"),
    qwen2_5_vl=(qwen, "Qwen2_5_VL", OLD, QWEN_2, "QWEN_TEXT_ONLY"),
    # by an older transformers: `size` too has the old keys, or it alone
    qwen2_vl_saved_again=(qwen, "Qwen2VL", OLD, QWEN_2 | dict(size=PIXELS), "QWEN_2"),
    qwen2_5_vl_old_size=(qwen, "Qwen2_5_VL", OLD, FAST | dict(size=PIXELS), "QWEN_TEXT_ONLY"),
    qwen2_5_vl_new=(qwen, "Qwen2_5_VL", NEW, FAST),
    qwen3_vl=(qwen, "Qwen3VL", OLD, FAST, "QWEN_3"), qwen3_vl_new=(qwen, "Qwen3VL", NEW, FAST),
    llava=(llava_like, "Llava", LLAMA_2, "VICUNA", OLD, "llama", "LlamaTokenizer"),
    llava_in_processor_config=(llava_like, "Llava", partial(LLAMA, mark="first"), "VICUNA", BOTH),
    llava_in_tokenizer_config=(llava_like, "Llava", CHATML, "INTERLEAVE", TOKENS),
    llava_interleave=(llava_like, "Llava", CHATML, "INTERLEAVE", NEW, "qwen2"),
    # LLaVA 1.6: Mistral, Vicuna, Llama 3, 34B
    llava_next=(llava_like, "LlavaNext", LLAMA_2, "INST", OLD, "mistral", "LlamaTokenizer"),
    llava_next_vicuna=(llava_like, "LlavaNext", partial(LLAMA, mark="always"), "VICUNA", OLD),
    llava_next_llama3=(llava_like, "LlavaNext", LLAMA_3, "LLAMA_3", OLD),
    llava_next_yi=(llava_like, "LlavaNext", YI, "YI", OLD),
    # SmolVLM's first release: an Idefics3, opened by what opens turns in ChatML
    idefics3=(idefics3, "<|begin_of_text|>", BOTH), smolvlm=(idefics3, "<|im_start|>", OLD),
    gemma3=(gemma3,), llava_onevision=(llava_onevision,), internvl=(internvl,),
    pixtral=(mistral, "Llava", "PIXTRAL", OLD), mistral3=(mistral, "Mistral3", "MISTRAL_3", NEW))
TORCHVISION = ("llava_onevision", "internvl", "pixtral", "mistral3")  # for their processors


def build(name: str, folder: Path) -> Path:
    """The checkpoint `name` in `folder`."""
    builder, *arguments = BUILDERS[name]
    builder(folder, *arguments)
    return folder
