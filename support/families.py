"""Model families: the one place that knows them.

Families differ in how a conversation and an image stand in the text, in how an image becomes
features, and in positions and attention. The rest of the project sees only the methods below; a
family that needs something else is one more class here. docs/families.md has what was tried.
"""

import hashlib
import inspect
import json
import math
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from PIL import Image
from torch import Tensor
from transformers import (AutoConfig, AutoImageProcessor, AutoModelForImageTextToText,
                          AutoProcessor, AutoTokenizer, GenerationConfig, PreTrainedModel,
                          ProcessorMixin)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (Qwen2VLImageProcessorPil,
                                                                        smart_resize)

from support.adapters import load_adapter, resolve
from support.files import check_finite, read_json

# ---- the text of a conversation ------------------------------------------------------------------


class Family:
    """What all families share: a conversation as text and as token ids.

    tokenizer and processor (of images, or of both); template and template_source, the chat template
    in use and the file that it is from; placeholder, what the template writes for an image;
    reserved, what no text of an example may hold; end_token and end_id, what ends a turn of the
    assistant; path, the checkpoint that lm, the model, is from.
    """

    markup: str | None = None  # an image in a template that takes strings only; None: unknown
    alone_only = False  # True: an image has other tokens when others are shown with it

    def __init__(self, path: str, lm: PreTrainedModel, processor, tokenizer, placeholder: str):
        self.path, self.lm, self.processor, self.tokenizer = path, lm, processor, tokenizer
        self.placeholder = placeholder
        check_tokenizer(path, lm, tokenizer, placeholder)
        self.template, self.template_source = chat_template(path, tokenizer)
        tokenizer.chat_template = self.template
        self.reserved: set[str] = reserved_tokens(tokenizer, lm.config, processor)
        self.form, self.closing = "parts", ""
        self._settle()
        if self.encode("x")[0][-1] != tokenizer("x", add_special_tokens=False)["input_ids"][-1]:
            raise ValueError(f"{path}: its tokenizer puts a token of its own after every text; "
                             "set add_eos_token to false in tokenizer_config.json")

    def render(self, messages: list[dict], add_generation_prompt: bool = False) -> str:
        """The conversation as the model reads it, a placeholder for every image.

        messages: [{"role": "user" | "assistant", "content": [{"type": "text", "text": str} or
        {"type": "image"}, ...]}, ...]. Raises ValueError with the template's own reason.
        """
        shown = sum(part["type"] == "image" for m in messages for part in m["content"])
        if shown > 1 and self.alone_only:
            raise ValueError(f"a {self.lm.config.model_type} model is shown an image otherwise "
                             "when others are with it (one tile, not several): an example's views "
                             "would not show it alike; train on bare answers (--method direct), or "
                             "take another model")
        try:
            return self.tokenizer.apply_chat_template(
                [self._formed(message) for message in messages], chat_template=self.template,
                tokenize=False, add_generation_prompt=add_generation_prompt)
        except Exception as error:  # what the template itself raises, or a fault in it
            raise ValueError(f"the model's chat template ({self.template_source}) refuses the "
                             f"conversation: {error}") from None

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of a whole rendered conversation, its images expanded, and their characters.

        As processors do it, what the tokenizer adds in front of a text (bos) is added unless the
        template has written it; a token that is added so has the empty span (0, 0).
        """
        bos = self.tokenizer.bos_token
        out = self.tokenizer(text, add_special_tokens=not (bos and text.startswith(bos)),
                             return_offsets_mapping=True)
        return out["input_ids"], out["offset_mapping"]

    def _formed(self, message: dict) -> dict:
        """The message as this template wants it: parts, or a string; closed if need be."""
        parts, role = message["content"], message["role"]
        if role == "assistant" and self.closing:
            parts = [*parts[:-1], dict(parts[-1], text=parts[-1]["text"] + self.closing)]
        if self.form == "strings" or (self.form == "assistant's strings" and role == "assistant"):
            parts = "".join(p["text"] if p["type"] == "text" else self.markup for p in parts)
        return dict(role=role, content=parts)

    def _settle(self) -> None:
        """Find out what the template takes and what ends a turn; ValueError if it is of no use.

        Where it ends a turn by no token (LLaVA 1.5: a blank; LLaVA 1.6 Mistral: four characters),
        the tokenizer's eos goes after the text, as those models were trained.
        """
        said, asked = "Aq7", "Qz4"
        turns = [dict(role="user", content=[dict(type="image"), dict(type="text", text=asked)]),
                 dict(role="assistant", content=[dict(type="text", text=said)])]
        refused = None
        for form in ("parts", "assistant's strings", *["strings"] * bool(self.markup)):
            self.form = form
            try:
                text = self.render(turns)
            except ValueError as error:
                refused = refused or error
                continue
            if text.count(self.placeholder) == text.count(asked) == text.count(said) == 1:
                break
        else:
            raise refused or ValueError(
                f"the chat template of {self.path} ({self.template_source}) does not write images "
                "into the text; put the chat_template.json of the original checkpoint beside it")
        self.end_token = self._end_of(text, said)
        if not self.end_token:
            self.closing = self.end_token = self.tokenizer.eos_token
            if not self.closing or self._end_of(self.render(turns), said) != self.closing:
                raise ValueError(f"the chat template of {self.path} ({self.template_source}) ends "
                                 "a turn by no token: nothing would tell where an answer stops")
        self.end_id: int = self.tokenizer.convert_tokens_to_ids(self.end_token)

    def _end_of(self, text: str, said: str) -> str | None:
        """The first special token after `said`, which ends `text`."""
        tail = text[text.rindex(said):]
        found = [token for token in self.reserved if token in tail]
        return min(found, key=lambda token: (tail.index(token), -len(token)), default=None)

    # ---- checks and settings ----

    def own_ids(self, messages: list[dict], images: list[Image.Image],
                add_generation_prompt: bool = False) -> list[int]:
        """What the family's own processor makes of a conversation and its images."""
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Hash of what features depend on beside the image: the kind and settings of the image
        processor, and every weight outside the language model."""
        images = getattr(self.processor, "image_processor", self.processor)
        kinds = f"{type(self.processor).__name__} {type(images).__name__} "
        settings = json.dumps(self.processor.to_dict(), sort_keys=True, default=str)
        digest = hashlib.sha256((kinds + settings).encode())
        inner = {id(p) for p in self.lm.get_decoder().parameters()}
        for name, p in self.lm.named_parameters():
            if id(p) not in inner and not name.startswith("lm_head"):
                digest.update(f"{name} {p.dtype}".encode())
                digest.update(p.detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()


def chat_template(path: str, tokenizer) -> tuple[str, str]:
    """(template, the file that it is from): the processor's where it has one, else the tokenizer's.

    Which of several files wins is transformers' choice; of named templates "default" is taken. The
    processor itself is not built, since Qwen's would need torchvision.
    """
    found = ProcessorMixin.get_processor_dict(path)[0].get("chat_template")
    config = stored(path, "processor_config.json")
    if found is None:
        found, files = tokenizer.chat_template, ("chat_template.jinja", "tokenizer_config.json")
    elif config and read_json(config).get("chat_template"):
        files = ("processor_config.json",)
    else:
        files = ("chat_template.json", "chat_template.jinja")
    if isinstance(found, dict):
        if "default" not in found and len(found) != 1:
            raise ValueError(f"{path} has the chat templates {', '.join(sorted(found))}: name one "
                             "of them default")
        found = found.get("default") or next(iter(found.values()))
    if not found:
        raise ValueError(f"{path} has no chat template: choose a checkpoint that was tuned to "
                         "follow instructions")
    return found, next((name for name in files if stored(path, name)), files[-1])


def check_tokenizer(path: str, lm: PreTrainedModel, tokenizer, placeholder: str | None) -> None:
    """Raises ValueError where a text could hold tokens that the model has no embedding for."""
    rows, image = lm.get_input_embeddings().weight.shape[0], lm.config.image_token_id
    special = set(tokenizer.all_special_tokens)
    most = max((i for t, i in tokenizer.get_vocab().items() if t not in special), default=0)
    if not placeholder or not tokenizer.convert_ids_to_tokens(image) or most >= rows:
        raise ValueError(f"the tokenizer in {path} is not the model's: it has {len(tokenizer)} "
                         f"tokens, the model {rows}, of which number {image} stands for images; "
                         "restore its files")
    if not tokenizer.is_fast:
        raise ValueError(f"{path}: its tokenizer does not say which characters a token is of; save "
                         "it with a tokenizer.json")
    if (tokenizer.pad_token_id or 0) >= rows:  # added without a row of its own; any will do
        tokenizer.pad_token = tokenizer.eos_token


def built(kind, path: str):
    """kind: one of transformers' Auto classes. Raises ValueError, one sentence, where it cannot."""
    try:
        return kind.from_pretrained(path)
    except (ImportError, OSError, ValueError) as error:
        said = str(error).strip()
        if isinstance(error, ImportError):
            needed = "torchvision" if "torchvision" in said.lower() else said.splitlines()[0]
            raise ValueError(f"the processor of {path} needs a package that is not installed: "
                             f"{needed}") from None
        part = kind.__name__.removeprefix("Auto")
        said = said.splitlines()[0].rstrip(": ")
        raise ValueError(f"the {part} of {path} cannot be built: {said}") from None


def stored(path: str, name: str) -> Path | None:
    """A file of a checkpoint: in its folder, or in the hub's cache on this machine."""
    if Path(path).is_dir():
        return Path(path, name) if Path(path, name).is_file() else None
    found = try_to_load_from_cache(path, name)
    return Path(found) if isinstance(found, str) else None


def reserved_tokens(tokenizer, config, processor) -> set[str]:
    """Special tokens, and what stands for images and videos; not words that were merely added to a
    vocabulary (Gemma's line breaks and HTML tags)."""
    names = ("image", "video", "vision", "boi", "eoi")
    found = set(tokenizer.all_special_tokens)
    found |= {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    found |= {str(value) for key, value in vars(processor).items()
              if key.endswith("_token") and any(name in key for name in names)}
    ids = {value for key, value in config.to_dict().items() if isinstance(value, int)
           and key.endswith(("_token_id", "_token_index")) and any(name in key for name in names)}
    found |= {tokenizer.convert_ids_to_tokens(i) for i in ids if 0 <= i < len(tokenizer)}
    return found - {"", "None"}


# ---- the families --------------------------------------------------------------------------------


class QwenFamily(Family):
    """Qwen2-VL, Qwen2.5-VL and Qwen3-VL: positions of three rows, images as lists of patches,
    several encoded at once.

    Tokenizer and image processor are loaded by themselves: the combined processor would need
    torchvision for videos.
    """

    packs = True  # its attention is causal and may be given as a mask, so two views share a pass
    markup = "<|vision_start|><|image_pad|><|vision_end|>"

    def __init__(self, path: str, lm: PreTrainedModel):
        try:
            processor = built(AutoImageProcessor, path)
        except ValueError as error:
            if "torchvision" not in str(error):
                raise
            # transformers before 5.23 wants it for the automatic choice, though not for this kind
            processor = built(Qwen2VLImageProcessorPil, path)
        tokenizer = built(AutoTokenizer, path)
        placeholder = tokenizer.convert_ids_to_tokens(lm.config.image_token_id)
        super().__init__(path, lm, processor, tokenizer, placeholder)
        size = {key: value for key, value in dict(processor.size).items() if value is not None}
        edges = {"shortest_edge", "longest_edge"}
        if not size.keys() >= edges and size.keys() >= {"min_pixels", "max_pixels"}:  # older files
            size = dict(shortest_edge=size["min_pixels"], longest_edge=size["max_pixels"])
            processor.size = type(processor.size)(**size)
        if not size.keys() >= edges:
            raise ValueError(f"{path}: the image processor's size must say shortest_edge and "
                             f"longest_edge (in px of area); found {size}")

    def image_text(self, width: int, height: int) -> tuple[str, tuple[int, int, int]]:
        """(what the placeholder of an image of that size in px becomes before the text is
        tokenised, its patches (t, h, w)); ValueError if it is too thin."""
        patch, merge = self.processor.patch_size, self.processor.merge_size
        least, most = (self.processor.size[key] for key in ("shortest_edge", "longest_edge"))
        h, w = smart_resize(height, width, patch * merge, least, most)
        grid = (1, h // patch, w // patch)
        return self.placeholder * (math.prod(grid) // merge ** 2), grid

    def inputs(self, image: Image.Image) -> dict[str, Tensor]:
        return dict(self.processor(images=[image], return_tensors="pt"))

    def own_ids(self, messages: list[dict], images: list[Image.Image],
                add_generation_prompt: bool = False) -> list[int]:
        head, *rest = self.render(messages, add_generation_prompt).split(self.placeholder)
        for image, text in zip(images, rest):
            grid = self.processor(images=[image], return_tensors="pt")["image_grid_thw"]
            head += self.placeholder * (int(grid.prod()) // self.processor.merge_size ** 2) + text
        return self.encode(head)[0]

    def features(self, images: list[dict[str, Tensor]]) -> list[Tensor]:
        joined = self._joined(images)
        pixels, grid = joined["pixel_values"], joined["image_grid_thw"]
        out = self.lm.model.get_image_features(pixels, grid, return_dict=True)
        levels = [out.pooler_output, *(getattr(out, "deepstack_features", None) or [])]
        levels = [torch.cat(list(level)) if isinstance(level, (list, tuple)) else level
                  for level in levels]
        tokens = (grid.prod(dim=1) // self.processor.merge_size ** 2).tolist()
        return list(torch.stack(levels).split(tokens, dim=1))

    def positions(self, ids: Tensor, mask: Tensor, grids: list) -> Tensor:
        """(3, B, T). Always passed: without mm_token_type_ids the model would fall back to one row
        of them, silently.

        Counted on the CPU: hundreds of small steps a batch, each a kernel of its own on a GPU.
        """
        device, ids, grid = ids.device, ids.cpu(), torch.tensor(grids) if grids else None
        is_image = (ids == self.lm.config.image_token_id).int()
        return self.lm.model.get_rope_index(ids, mm_token_type_ids=is_image, image_grid_thw=grid,
                                            attention_mask=mask.cpu().long())[0].to(device)

    def states(self, inputs_embeds: Tensor, position_ids: Tensor, is_image: Tensor, levels: Tensor,
               **rest):
        """The language model's output on given inputs; levels (S - 1, all P, D) are what Qwen3-VL
        adds inside its first layers."""
        deep = {}
        if len(levels):
            deep = dict(visual_pos_masks=is_image, deepstack_visual_embeds=list(levels))
        return self.lm.get_decoder()(inputs_embeds=inputs_embeds, position_ids=position_ids,
                                     **deep, **rest)

    def prompt(self, batch, pixels, embed) -> dict:
        """What `generate` is given: ids and pixels, as anyone would."""
        is_image = (batch.ids == self.lm.config.image_token_id).int()
        return dict(input_ids=batch.ids, attention_mask=batch.mask.long(),
                    mm_token_type_ids=is_image,
                    **self._joined(pixels))

    def _joined(self, images: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """All patches one after another (patches, values), and the grids (images, 3)."""
        return {key: torch.cat([image[key] for image in images]).to(self.lm.device)
                for key in ("pixel_values", "image_grid_thw")}


class ProcessorFamily(Family):
    """Any other family whose processor transformers can build.

    The tokens of an image are what the processor writes for it alone, positions count 0, 1, 2, ...,
    and the whole model runs on given input embeddings, so that what it does around its language
    model (Gemma lets the tokens of one image see each other) it goes on doing. Raises ValueError,
    one sentence, where the family cannot be served.
    """

    def __init__(self, path: str, lm: PreTrainedModel):
        kind, processor = lm.config.model_type, built(AutoProcessor, path)
        tokenizer = getattr(processor, "tokenizer", None)
        placeholder = getattr(processor, "image_token", None)
        if hasattr(lm.model, "get_rope_index"):
            raise ValueError(f"{path} is a {kind} model, which counts positions in several rows: "
                             f"of these only {', '.join(FAMILIES)} are supported")
        if tokenizer is None or placeholder is None or not hasattr(lm.model, "get_image_features"):
            raise ValueError(f"{path} is a {kind} model, which does not put its images among the "
                             "words: not supported")
        super().__init__(path, lm, processor, tokenizer, placeholder)
        image = Image.new("RGB", (64, 48))
        self.alone_only = self._replacements([image] * 2) != self._replacements([image]) * 2
        known = inspect.signature(lm.model.forward).parameters
        self.bidirectional = "token_type_ids" in known
        layers = set(getattr(lm.config.text_config, "layer_types", None) or ["full_attention"])
        self.packs = not self.bidirectional and layers == {"full_attention"}

    def image_text(self, width: int, height: int) -> tuple[str, None]:
        """(what the placeholder of an image of that size in px becomes before the text is
        tokenised, None: there is no grid)."""
        return self._replacements([Image.new("RGB", (width, height))])[0], None

    def _replacements(self, images: list[Image.Image]) -> list[str]:
        out = self.processor(text=[self.placeholder * len(images)], images=[images],
                             return_text_replacement_offsets=True)
        return [found["replacement"] for found in out["text_replacement_offsets"][0]]

    def inputs(self, image: Image.Image) -> dict[str, Tensor]:
        wanted = inspect.signature(self.lm.model.get_image_features).parameters
        out = self.processor(text=[self.placeholder], images=[image], return_tensors="pt")
        return {key: value for key, value in out.items() if key in wanted}

    def own_ids(self, messages: list[dict], images: list[Image.Image],
                add_generation_prompt: bool = False) -> list[int]:
        text, bos = self.render(messages, add_generation_prompt), self.tokenizer.bos_token
        out = self.processor(text=[text], images=[images] if images else None,
                             add_special_tokens=not (bos and text.startswith(bos)))
        return list(out["input_ids"][0])

    def features(self, images: list[dict[str, Tensor]]) -> list[Tensor]:
        """One image at a time: sizes and numbers of tiles differ."""
        found = []
        for image in images:
            image = {key: value.to(self.lm.device, self._dtype(value))
                     for key, value in image.items()}
            out = self.lm.model.get_image_features(**image, return_dict=True).pooler_output
            out = torch.cat(list(out)) if isinstance(out, (list, tuple)) else out
            found.append(out.reshape(1, -1, out.shape[-1]))
        return found

    def _dtype(self, value: Tensor) -> torch.dtype | None:
        return self.lm.dtype if value.is_floating_point() else None

    def positions(self, ids: Tensor, mask: Tensor, grids: list) -> Tensor:
        return (mask.long().cumsum(dim=1) - 1).clamp_min(0)[None]  # (1, B, T)

    def states(self, inputs_embeds: Tensor, position_ids: Tensor, is_image: Tensor, levels: Tensor,
               **rest):
        seen = dict(token_type_ids=is_image.long()) if self.bidirectional else {}
        return self.lm.model(inputs_embeds=inputs_embeds, position_ids=position_ids[0], **seen,
                             **rest)

    def prompt(self, batch, pixels, embed) -> dict:
        """What `generate` is given: embeddings, because families differ in how they want the pixels
        of several images.

        Gemma's takes no embeddings, but its images are all of one shape: ids and pixels.
        """
        images = pixels
        is_image = batch.ids == self.lm.config.image_token_id
        seen = dict(token_type_ids=is_image.long()) if self.bidirectional else {}
        takes = inspect.signature(self.lm.prepare_inputs_for_generation).parameters
        if "inputs_embeds" in takes:
            inputs = embed()
            return dict(inputs_embeds=inputs["inputs_embeds"],
                        attention_mask=inputs["attention_mask"], **seen)
        pixels = {key: torch.cat([image[key] for image in images]).to(self.lm.device, self.lm.dtype)
                  for key in images[0]}
        return dict(input_ids=batch.ids, attention_mask=batch.mask.long(), **pixels, **seen)


# model types that need a class of their own; all others are served by their processor alone
FAMILIES = dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), QwenFamily)


# ---- loading -------------------------------------------------------------------------------------


def load_checkpoint(path: str, dtype: torch.dtype, min_pixels=None, max_pixels=None) -> tuple[PreTrainedModel, Family]:
    """The model and its family. path: a checkpoint folder, a hub id, or a run or adapter folder,
    whose adapter is then merged into its base.

    Raises ValueError, one sentence, for what is not such a checkpoint or cannot be served.
    """
    base, adapters = resolve(path)
    kind = kind_of(base, path)
    try:  # safetensors only, and no code from the checkpoint: what is downloaded is data
        lm, report = AutoModelForImageTextToText.from_pretrained(
            base, dtype=dtype, use_safetensors=True, trust_remote_code=False,
            output_loading_info=True, ignore_mismatched_sizes=True)  # refused below, by name
    except (OSError, ValueError):
        raise
    except Exception as error:  # a file cut short
        raise ValueError(f"the weights in {base} cannot be loaded: "
                         f"{str(error).strip().splitlines()[0]}") from None
    check_complete(report, base)
    check_finite(dict(lm.named_parameters()), base)
    family = FAMILIES.get(kind, ProcessorFamily)(base, lm)
    lm.generation_config = greedy(lm.generation_config, family)
    for folder in adapters:
        load_adapter(lm, base, folder)
    return lm, family


def load_family(path: str) -> Family:
    """The family alone, for tokens and positions: its model has its config's shape, no weights.

    path, errors: as of `load_checkpoint`.
    """
    base, _ = resolve(path)
    kind = kind_of(base, path)
    config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    with torch.device("meta"):  # a device of shapes alone
        lm = AutoModelForImageTextToText.from_config(config)
    return FAMILIES.get(kind, ProcessorFamily)(base, lm)


def kind_of(base: str, path: str) -> str:
    """The model type that a checkpoint's config.json names. path: what the user gave."""
    named = base if base == path else f"{base} (the base of {path})"
    try:
        kind = AutoConfig.from_pretrained(base, trust_remote_code=False).model_type
    except ValueError as error:
        if not str(error).startswith(("Unrecognized model", "The checkpoint you are trying")):
            raise
        why = "is of no model type that the installed transformers knows"
    except OSError as error:
        if Path(base).is_dir():
            raise
        why = ("is kept behind terms of use on the hub: accept them there, then hf auth login"
               if "gated repo" in str(error) else
               f"is no checkpoint: there is no such folder, seen from {Path.cwd()}, and the hub, "
               "or its copy on this machine, has none of that name")
    else:
        if kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
            return kind
        why = (f"is a {kind} model, none that transformers offers for images and text (as "
               "Qwen2.5-VL is)")
    raise ValueError(f"{named} {why}")


def check_complete(report: dict, path: str) -> None:
    """Raises ValueError naming tensors that the weights lack (they would be random), that have
    another shape, or that the model has no place for: transformers would only warn."""
    shapes = [f"{name} ({tuple(there)}, not {tuple(wanted)})"
              for name, there, wanted in report["mismatched_keys"]]
    derived = ("position_ids", "inv_freq")  # computed from the config, and saved by older versions
    extra = [name for name in report["unexpected_keys"] if not name.endswith(derived)]
    for wrong, names in (("lack", report["missing_keys"]), ("have another shape of", shapes),
                         ("hold what config.json has no place for:", extra)):
        if names:
            first, more = sorted(names)[:3], len(names) - 3
            raise ValueError(f"the weights in {path} {wrong} {', '.join(first)}"
                             f"{f' and {more} more' if more > 0 else ''}; restore the checkpoint's "
                             "files, or the config.json that belongs to them")


def greedy(given: GenerationConfig, family: Family) -> GenerationConfig:
    """How questions are answered, in this one place: the likeliest token each time, up to what ends
    a turn. Of the checkpoint's generation_config.json only the eos ids count: sampling, penalties
    and least lengths would change answers unseen."""
    ends = given.eos_token_id
    ends = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
    pad = family.tokenizer.pad_token_id
    return GenerationConfig(do_sample=False, eos_token_id=sorted(ends | {family.end_id}),
                            pad_token_id=family.end_id if pad is None else pad)
