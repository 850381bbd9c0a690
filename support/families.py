"""Model families: how a conversation and an image become text, how an image becomes features,
positions and attention. The rest of the project only calls the methods of `Family`.

Most families need no code here, because transformers' own processor of the family gives the ids,
the image tokens and the pixels. docs/families.md lists the families that were tested.
"""

import inspect
import re
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers import (AutoConfig, AutoModelForImageTextToText, AutoProcessor, BatchFeature,
                          GenerationConfig, PreTrainedModel, Qwen2VLProcessor)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from support.adapters import merge, read_adapter, resolve
from support.files import check_finite, read_json

Turn = tuple[str, list]  # ("user" or "assistant", parts); a part is a text or a picture


@contextmanager
def one_sentence(start: str):
    """Turns any error inside into a ValueError: `start` and the first line of the error."""
    try:
        yield
    except Exception as error:  # foreign files and templates can fail in every way
        line = str(error).strip().split("\n")[0]
        raise ValueError(f"{start} ({type(error).__name__}: {line})") from None


class Family:
    """A checkpoint's conversations as token ids and its images as features. Raises ValueError, one
    sentence, for a checkpoint that cannot be served."""

    markup = ""  # an image as text, for a template that only takes strings

    def __init__(self, path: str, lm: PreTrainedModel, min_pixels=None, max_pixels=None):
        # texts: what stands for an image, by size; pixels: changed settings of the image processor
        self.path, self.lm, self.texts, self.pixels = path, lm, {}, {}
        with one_sentence(f"the processor files of {path} (preprocessor_config.json, "
                          "chat_template.json, ...) cannot be used"):
            self.processor = self._processor(min_pixels, max_pixels)
            # placeholder: what the template writes for an image
            self.tokenizer, self.placeholder = self.processor.tokenizer, self.processor.image_token
        # of several templates transformers takes the one called default
        self.processor.chat_template = self.processor.chat_template or self.tokenizer.chat_template
        # some models take a mask of the image tokens
        arguments = inspect.signature(lm.model.forward).parameters
        self.types = [key for key in ("token_type_ids", "mm_token_type_ids") if key in arguments]
        # packs: the attention takes any mask, so that two views can share a pass. Not in Gemma,
        # where the tokens of one image see each other, and not where layers have a window.
        layers = getattr(lm.config.text_config, "layer_types", None) or ["full_attention"]
        self.packs = "token_type_ids" not in self.types and set(layers) == {"full_attention"}
        # reserved: what no text of an example may contain: special tokens, and marks of images and
        # videos, which some tokenizers call plain; but not every added word (Gemma's line breaks)
        pattern = r".*(image|video|vision|boi|eoi).*_(token|id|index)"
        marks = [mark if isinstance(mark, str) else self.tokenizer.convert_ids_to_tokens(mark)
                 for key, mark in (vars(self.processor) | lm.config.to_dict()).items()
                 if mark and re.fullmatch(pattern, key)]
        special = [t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special]
        self.reserved = {*marks, *special, *self.tokenizer.all_special_tokens} - {None}
        self._fit_template()
        self._check_image()

    def _processor(self, min_pixels: int | None, max_pixels: int | None):
        kind, model = self.lm.config.model_type, self.lm.model
        if min_pixels or max_pixels:
            raise ValueError(f"{kind} models have no --min_pixels and --max_pixels")
        if hasattr(model, "get_rope_index") or not hasattr(model, "get_image_features"):
            raise ValueError(f"{kind} models do not put their images among the words, or count "
                             f"positions in several rows (of these only {', '.join(FAMILIES)})")
        return AutoProcessor.from_pretrained(self.path)

    def render(self, turns: list[Turn], prompt: bool = False) -> str:
        """The conversation as text, a placeholder for every image. prompt: the generation prompt
        follows. Raises ValueError."""
        messages, images = [], 0
        for role, parts in turns:
            content = [dict(type="text", text=part) if isinstance(part, str)
                       else dict(type="image") for part in parts]
            images += sum(part["type"] == "image" for part in content)
            if role == "assistant":
                content[0]["text"] += self.closing
            if role in self.string_roles:
                content = "".join(part.get("text", self.markup) for part in content)
            messages.append(dict(role=role, content=content))
        with one_sentence(f"the chat template of {self.path} refuses the conversation"):
            if self.single_image_only and images > 1:
                raise ValueError("this model sees an image in another way when others stand beside "
                                 "it: train on bare answers (--method direct), or choose another")
            return self.processor.apply_chat_template(messages, add_generation_prompt=prompt)

    def own_ids(self, turns: list[Turn], images: list, prompt: bool = False) -> list[int]:
        """The ids that the family's own processor makes of a conversation and its images."""
        text = self.render(turns, prompt)
        with one_sentence(f"the processor of {self.path} refuses the conversation"):
            out = self.processor(text=[text], images=[images], add_special_tokens=self.adds_bos)
        return list(out["input_ids"][0])

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of a text, and their spans in characters; (0, 0): the tokenizer adds it."""
        out = self.tokenizer(text, add_special_tokens=self.adds_bos, return_offsets_mapping=True)
        return out["input_ids"], out["offset_mapping"]

    def _fit_template(self) -> None:
        """Find out which roles the template wants as strings and which token ends a turn."""
        self.closing, self.single_image_only = "", False
        turns = [("user", [Image.new("RGB", (60, 44)), "Qz4"]), ("assistant", ["Aq7"])]
        for self.string_roles in ((), ("assistant",), ("assistant", "user")):
            with suppress(ValueError):
                text = self.render(turns)
                if all(text.count(part) == 1 for part in (self.placeholder, "Qz4", "Aq7")):
                    break
        else:
            raise ValueError(f"{self.path} has no chat template that writes a question, its image "
                             "and an answer, once each (of several, the one called default counts)"
                             "; restore the original's, or choose an instruction-tuned checkpoint")
        # as apply_chat_template decides: no second bos where the template writes one
        bos = self.tokenizer.bos_token
        self.adds_bos = not (bos and text.startswith(bos))
        # the longest first, because one token may begin another
        tokens = map(re.escape, sorted(self.reserved, key=len, reverse=True))
        end = re.search("|".join(tokens), text[text.rindex("Aq7"):])
        # LLaVA 1.5 and 1.6 Mistral write no token there, but were trained with the tokenizer's eos
        self.closing = "" if end else self.tokenizer.eos_token or ""
        self.end_token: str = end[0] if end else self.closing
        if not self.end_token:
            raise ValueError(f"{self.path} has no token that ends a turn, neither in its chat "
                             "template nor as its tokenizer's eos token: no answer would stop")
        self.end_id: int = self.tokenizer.convert_tokens_to_ids(self.end_token)

    @torch.no_grad()
    def _check_image(self) -> None:
        """One image on trial: the processor must make as many tokens as the vision tower."""
        image, token = Image.new("RGB", (60, 44)), self.lm.config.image_token_id
        with one_sentence(f"preprocessor_config.json or tokenizer.json of {self.path} does not fit "
                          "config.json"):
            # some families give an image other tokens when others stand beside it
            one, two = self._replacements([image]), self._replacements([image] * 2)
            self.single_image_only = two != one * 2
            ids, spans = self.encode(self.image_text(*image.size)[0] + "x")
            tokens = features = ids.count(token)
            words = set(self.tokenizer.get_vocab().values()) - set(self.tokenizer.all_special_ids)
            if max(words) >= self.lm.get_input_embeddings().num_embeddings:
                raise ValueError("the tokenizer has tokens for which there is no embedding")
            # a model without weights has no vision tower to compare with
            if self.lm.device.type != "meta":
                features = self.features([self.inputs(image)])[0].shape[1]
            if tokens != features or not tokens:
                raise ValueError(f"an image of 60 x 44 px becomes {tokens} tokens of number {token}"
                                 f", and {features} features")
            if not spans[-1][1]:
                raise ValueError("the tokenizer puts a token of its own after every text: set "
                                 "add_eos_token to false in tokenizer_config.json")

    def image_text(self, width: int, height: int) -> tuple[str, tuple[int, int, int] | None]:
        """(what replaces the placeholder of an image of that size in px, its patches (t, h, w)
        where positions need them). Raises ValueError for a size that the processor rejects."""
        if (width, height) not in self.texts:
            self.texts[width, height] = self._replacements([Image.new("RGB", (width, height))])[0]
        return self.texts[width, height], None

    def _replacements(self, images: list[Image.Image]) -> list[str]:
        out = self.processor(text=[self.placeholder * len(images)], images=[images],
                             return_text_replacement_offsets=True)
        return [part["replacement"] for part in out["text_replacement_offsets"][0]]

    def inputs(self, image: Image.Image) -> dict[str, Tensor]:
        """What the vision tower takes."""
        arguments = inspect.signature(self.lm.model.get_image_features).parameters
        out = self.processor(text=[self.placeholder], images=[image], return_tensors="pt")
        return {key: value for key, value in out.items() if key in arguments}

    def features(self, images: list[dict[str, Tensor]]) -> list[Tensor]:
        """Features (S, P, D) of each image from its `inputs`; S = 1 but in Qwen3-VL."""
        # one at a time, because sizes and numbers of tiles differ
        outputs = [self.lm.model.get_image_features(**self._batch([image]), return_dict=True)
                   for image in images]
        width = self.lm.config.text_config.hidden_size
        # a tensor, or a list with one for each tile
        return [torch.cat(list(out.pooler_output)).reshape(1, -1, width) for out in outputs]

    def _batch(self, images: list[dict[str, Tensor]]) -> BatchFeature:
        tensors = {key: torch.cat([image[key] for image in images]) for key in images[0]}
        # whole numbers keep their dtype
        return BatchFeature(tensors).to(self.lm.device, self.lm.dtype)

    def positions(self, ids: Tensor, mask: Tensor, grids: list) -> Tensor:
        """(A, B, T), on the CPU as ids and mask (B, T) are. grids: of the images in them."""
        return (mask.long().cumsum(dim=1) - 1).clamp_min(0)[None]  # (1, B, T)

    def states(self, inputs_embeds: Tensor, position_ids: Tensor, is_image: Tensor, levels: Tensor,
               **rest):
        """The language model's output for embeddings (B, T, D), positions (A, B, T) and levels
        (S - 1, all P, D), which Qwen3-VL adds in its first layers."""
        # the whole model, because some do more around their language model
        return self.lm.model(inputs_embeds=inputs_embeds, position_ids=position_ids[0],
                             **{key: is_image.long() for key in self.types}, **rest)

    def prompt(self, batch, pixels: list[dict[str, Tensor]], embed) -> dict:
        """Arguments of `generate`. pixels: the images' `inputs`; embed(): the `VLM.lm_inputs`."""
        if not self.types:
            # embeddings, because families take the pixels of several images in different ways
            return dict(inputs_embeds=embed()["inputs_embeds"], attention_mask=batch.mask.long())
        is_image = (batch.ids == self.lm.config.image_token_id).long()
        return dict(input_ids=batch.ids, attention_mask=batch.mask.long(),
                    **dict.fromkeys(self.types, is_image), **self._batch(pixels))


class QwenProcessor(Qwen2VLProcessor):
    """transformers' processor without the part for videos, which would need torchvision."""

    def __init__(self, image_processor, tokenizer, chat_template=None):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)


class QwenFamily(Family):
    """Qwen2-VL, Qwen2.5-VL, Qwen3-VL: three rows of positions, images of any number of patches."""

    markup = "<|vision_start|><|image_pad|><|vision_end|>"

    def inputs(self, image: Image.Image) -> dict[str, Tensor]:
        # without the text's part of the processor this takes half the time
        return dict(self.processor.image_processor(images=[image], return_tensors="pt"))

    def _processor(self, min_pixels: int | None, max_pixels: int | None):
        processor = QwenProcessor.from_pretrained(self.path)
        images, size = processor.image_processor, dict(processor.image_processor.size)
        # both are areas, in spite of their names; older files have other names
        least = min_pixels or size.get("shortest_edge") or size.get("min_pixels")
        most = max_pixels or size.get("longest_edge") or size.get("max_pixels")
        if not isinstance(least, int) or not isinstance(most, int) or not 0 < least <= most:
            raise ValueError(f"the size of images is from {least!r} to {most!r} pixels: correct "
                             "shortest_edge and longest_edge, or --min_pixels and --max_pixels")
        images.size = type(images.size)(shortest_edge=least, longest_edge=most)
        if min_pixels or max_pixels:
            self.pixels = dict(size=dict(shortest_edge=least, longest_edge=most),
                               min_pixels=least, max_pixels=most)
        return processor

    def image_text(self, width: int, height: int) -> tuple[str, tuple[int, int, int]]:
        # computed, because an image may have millions of pixels
        images = self.processor.image_processor
        height, width = smart_resize(height, width, images.patch_size * images.merge_size,
                                     images.size.shortest_edge, images.size.longest_edge)
        grid = 1, height // images.patch_size, width // images.patch_size
        return self.placeholder * (grid[1] * grid[2] // images.merge_size ** 2), grid

    def features(self, images: list[dict[str, Tensor]]) -> list[Tensor]:
        # all in one call; each level is a tuple with (P, D) of each image
        out = self.lm.model.get_image_features(**self._batch(images), return_dict=True)
        levels = [out.pooler_output, *(getattr(out, "deepstack_features", None) or ())]
        # transformers 5.17 splits the first level alone
        sizes = [len(image) for image in out.pooler_output]
        levels = [level.split(sizes) if isinstance(level, Tensor) else level for level in levels]
        return [torch.stack(image) for image in zip(*levels)]

    def positions(self, ids: Tensor, mask: Tensor, grids: list) -> Tensor:
        # on the CPU: these are hundreds of small steps, and on a GPU each would be a kernel
        grid = torch.tensor(grids) if grids else None
        # without the token types the model would silently count in one row
        is_image = (ids == self.lm.config.image_token_id).int()
        return self.lm.model.get_rope_index(ids, mm_token_type_ids=is_image, image_grid_thw=grid,
                                            attention_mask=mask.long())[0]

    def states(self, inputs_embeds: Tensor, position_ids: Tensor, is_image: Tensor, levels: Tensor,
               **rest):
        if len(levels):
            rest |= dict(visual_pos_masks=is_image, deepstack_visual_embeds=list(levels))
        return self.lm.get_decoder()(inputs_embeds=inputs_embeds, position_ids=position_ids, **rest)


# model types with a class of their own
FAMILIES = dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), QwenFamily)


def load_checkpoint(path: str, dtype: torch.dtype | str, min_pixels: int | None = None,
                    max_pixels: int | None = None) -> tuple[PreTrainedModel, Family]:
    """The model and its family. path: a checkpoint, a hub id, or a run or adapter folder, whose
    adapter is then merged. Raises ValueError, one sentence, if it cannot be loaded or served."""
    base, adapters = resolve(path)
    name = base if base == path else f"{base} (the base of {path})"
    # no pickle and no code of the checkpoint: what is downloaded is only data
    with one_sentence(f"{name}, seen from {Path.cwd()}, cannot be loaded"):
        lm, report = AutoModelForImageTextToText.from_pretrained(
            base, dtype=dtype, use_safetensors=True, trust_remote_code=False,
            output_loading_info=True, ignore_mismatched_sizes=True)
    # transformers would only warn of these. Older versions saved the two tensors that are computed.
    extra = [name for name in report["unexpected_keys"]
             if not name.endswith(("position_ids", "inv_freq"))]
    shapes = [name for name, *_ in report["mismatched_keys"]]
    for fault, names in (("lack", report["missing_keys"]), ("have another shape of", shapes),
                         ("hold what config.json has no place for:", extra)):
        if names:
            raise ValueError(f"the weights in {base} {fault} {', '.join(sorted(names)[:3])} "
                             f"({len(names)} in all); restore the checkpoint's files")
    check_finite(dict(lm.named_parameters()), base)
    family = load_family(path, min_pixels, max_pixels, lm)
    # of generation_config.json only the eos ids count: the rest would change answers silently
    ends = lm.generation_config.eos_token_id or []
    ends = {family.end_id, *([ends] if isinstance(ends, int) else ends)}
    lm.generation_config = GenerationConfig(do_sample=False, eos_token_id=sorted(ends),
                                            pad_token_id=family.end_id)
    for folder in adapters:
        merge(lm, *read_adapter(folder, lm, base))
    return lm, family


def load_family(path: str, min_pixels: int | None = None, max_pixels: int | None = None,
                lm: PreTrainedModel | None = None) -> Family:
    """The family alone. lm: its model; None: one without weights, enough for tokens, positions."""
    base, _ = resolve(path)
    if lm is None:
        with one_sentence(f"{base} cannot be loaded"), torch.device("meta"):
            config = AutoConfig.from_pretrained(base, trust_remote_code=False)
            lm = AutoModelForImageTextToText.from_config(config)
    # a run brings the size of images that it was trained with
    if (Path(path) / "best.json").is_file() and not (min_pixels or max_pixels):
        settings = read_json(Path(path) / "config.json")
        min_pixels, max_pixels = settings.get("min_pixels"), settings.get("max_pixels")
    return FAMILIES.get(lm.config.model_type, Family)(base, lm, min_pixels, max_pixels)
