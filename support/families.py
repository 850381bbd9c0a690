"""Model families: the one place that knows them.

Families differ in how an image stands in the text, how it becomes features, and in positions and
attention. The rest of the project sees only the methods below; a family that needs something else
is one more class here.
"""

import hashlib
import inspect
import json
import math
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers import (AutoConfig, AutoImageProcessor, AutoModelForImageTextToText,
                          AutoProcessor, AutoTokenizer, PreTrainedModel)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from support.files import check_finite


class QwenFamily:
    """Qwen2-VL, Qwen2.5-VL and Qwen3-VL: positions of three rows, images as lists of patches, several encoded at once.

    Tokenizer and image processor are loaded by themselves: the combined processor would need torchvision for videos.
    """

    KINDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
    packs = True  # its attention is causal and may be given as a mask, so two views can share a pass

    def __init__(self, path: str, lm: PreTrainedModel):
        self.lm, self.processor = lm, AutoImageProcessor.from_pretrained(path)
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.saved_with = [self.tokenizer, self.processor]
        # what the chat template writes for an image
        self.placeholder = self.tokenizer.convert_ids_to_tokens(lm.config.image_token_id)
        self.reserved = reserved(self.tokenizer, self.placeholder)

    def image_text(self, width: int, height: int) -> tuple[str, tuple[int, int, int]]:
        """(what stands for an image of that size in px, its patches (t, h, w)); ValueError if it is too thin."""
        patch, merge, size = self.processor.patch_size, self.processor.merge_size, self.processor.size
        h, w = smart_resize(height, width, patch * merge, size["shortest_edge"], size["longest_edge"])
        grid = (1, h // patch, w // patch)
        return self.placeholder * (math.prod(grid) // merge ** 2), grid

    def render(self, messages: list[dict], add_generation_prompt: bool = False) -> str:
        return render(self.tokenizer, messages, add_generation_prompt)

    def inputs(self, image: Image.Image) -> dict[str, Tensor]:
        return dict(self.processor(images=[image], return_tensors="pt"))

    def features(self, images: list[dict[str, Tensor]]) -> list[Tensor]:
        joined = self._joined(images)
        pixels, grid = joined["pixel_values"], joined["image_grid_thw"]
        out = self.lm.model.get_image_features(pixels, grid, return_dict=True)
        levels = [out.pooler_output, *(getattr(out, "deepstack_features", None) or [])]
        levels = [torch.cat(list(level)) if isinstance(level, (list, tuple)) else level for level in levels]
        return list(torch.stack(levels).split((grid.prod(dim=1) // self.processor.merge_size ** 2).tolist(), dim=1))

    def fingerprint(self) -> str:
        return fingerprint(self)

    def positions(self, ids: Tensor, mask: Tensor, grids: list) -> Tensor:
        """(3, B, T). Always passed: without mm_token_type_ids the model would fall back to one row of them, silently.

        Counted on the CPU: hundreds of small steps a batch, each of which would be a kernel of its own on a GPU.
        """
        device, ids, grid = ids.device, ids.cpu(), torch.tensor(grids) if grids else None
        is_image = (ids == self.lm.config.image_token_id).int()
        return self.lm.model.get_rope_index(ids, mm_token_type_ids=is_image, image_grid_thw=grid,
                                            attention_mask=mask.cpu().long())[0].to(device)

    def states(self, inputs_embeds: Tensor, position_ids: Tensor, is_image: Tensor, levels: Tensor, **rest):
        """The language model's output on given inputs; levels (S - 1, all P, D) are what Qwen3-VL adds inside its first layers."""
        deep = dict(visual_pos_masks=is_image, deepstack_visual_embeds=list(levels)) if len(levels) else {}
        return self.lm.get_decoder()(inputs_embeds=inputs_embeds, position_ids=position_ids, **deep, **rest)

    def prompt(self, batch, store, embed) -> dict:
        """What `generate` is given: ids and pixels, as anyone would."""
        is_image = (batch.ids == self.lm.config.image_token_id).int()
        return dict(input_ids=batch.ids, attention_mask=batch.mask.long(), mm_token_type_ids=is_image,
                    **self._joined([store.inputs(i) for i in batch.images]))

    def _joined(self, images: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """All patches one after another (patches, values), and the grids (images, 3)."""
        return {key: torch.cat([image[key] for image in images]).to(self.lm.device) for key in ("pixel_values", "image_grid_thw")}


class ProcessorFamily:
    """Any other family whose processor transformers can build. Tried: Idefics3 (SmolVLM), Gemma 3, LLaVA, LLaVA-NeXT, and, where
    torchvision is installed, which their processors need, LLaVA-OneVision, InternVL and Mistral 3.

    The tokens of an image are what the processor writes for it alone, positions count 0, 1, 2, ..., and the whole model runs on
    given input embeddings, so that what it does around its language model (Gemma lets the tokens of one image see each
    other) it goes on doing. Raises ValueError, one sentence, where the family cannot be served.
    """

    def __init__(self, path: str, lm: PreTrainedModel):
        kind = lm.config.model_type
        try:
            self.processor = AutoProcessor.from_pretrained(path)
        except ImportError as error:
            needed = "torchvision" if "torchvision" in str(error).lower() else str(error).strip().splitlines()[0]
            raise ValueError(f"the processor of a {kind} model needs a package that is not installed: {needed}") from None
        self.lm, self.tokenizer, self.saved_with = lm, getattr(self.processor, "tokenizer", None), [self.processor]
        placeholder = getattr(self.processor, "image_token", None)
        if self.tokenizer is None or placeholder is None or not hasattr(lm.model, "get_image_features"):
            raise ValueError(f"{path} is a {kind} model, which does not put its images among the words: not supported")
        self.tokenizer.chat_template = self.processor.chat_template or self.tokenizer.chat_template
        if self.tokenizer.chat_template is None:
            raise ValueError(f"{path} has no chat template: choose a checkpoint that was tuned to follow instructions")
        self.placeholder = placeholder
        self.reserved = reserved(self.tokenizer, placeholder)
        known = inspect.signature(lm.model.forward).parameters
        self.bidirectional = "token_type_ids" in known
        layers = set(getattr(lm.config.text_config, "layer_types", None) or ["full_attention"])
        self.packs = not self.bidirectional and layers == {"full_attention"}

    def image_text(self, width: int, height: int) -> tuple[str, None]:
        """What the processor writes for an image of that size, as text."""
        out = self.processor(text=[self.placeholder], images=[Image.new("RGB", (width, height))], add_special_tokens=False)
        return self.tokenizer.decode(out["input_ids"][0], clean_up_tokenization_spaces=False), None

    def render(self, messages: list[dict], add_generation_prompt: bool = False) -> str:
        return render(self.tokenizer, messages, add_generation_prompt)

    def inputs(self, image: Image.Image) -> dict[str, Tensor]:
        wanted = inspect.signature(self.lm.model.get_image_features).parameters
        out = self.processor(text=[self.placeholder], images=[image], return_tensors="pt")
        return {key: value for key, value in out.items() if key in wanted}

    def features(self, images: list[dict[str, Tensor]]) -> list[Tensor]:
        """One image at a time: sizes and numbers of tiles differ."""
        found = []
        for image in images:
            image = {k: v.to(self.lm.device, self.lm.dtype if v.is_floating_point() else None) for k, v in image.items()}
            out = self.lm.model.get_image_features(**image, return_dict=True).pooler_output
            out = torch.cat(list(out)) if isinstance(out, (list, tuple)) else out
            found.append(out.reshape(1, -1, out.shape[-1]))
        return found

    def fingerprint(self) -> str:
        return fingerprint(self)

    def positions(self, ids: Tensor, mask: Tensor, grids: list) -> Tensor:
        return (mask.long().cumsum(dim=1) - 1).clamp_min(0)[None]  # (1, B, T)

    def states(self, inputs_embeds: Tensor, position_ids: Tensor, is_image: Tensor, levels: Tensor, **rest):
        seen = dict(token_type_ids=is_image.long()) if self.bidirectional else {}
        return self.lm.model(inputs_embeds=inputs_embeds, position_ids=position_ids[0], **seen, **rest)

    def prompt(self, batch, store, embed) -> dict:
        """What `generate` is given: embeddings, because families differ in how they want the pixels of several images.

        Gemma's takes no embeddings, but its images are all of one shape: ids and pixels.
        """
        images = [store.inputs(i) for i in batch.images]
        seen = dict(token_type_ids=(batch.ids == self.lm.config.image_token_id).long()) if self.bidirectional else {}
        if "inputs_embeds" in inspect.signature(self.lm.prepare_inputs_for_generation).parameters:
            inputs = embed(batch, store.encoded(batch.images))
            return dict(inputs_embeds=inputs["inputs_embeds"], attention_mask=inputs["attention_mask"], **seen)
        pixels = {key: torch.cat([image[key] for image in images]).to(self.lm.device, self.lm.dtype) for key in images[0]}
        return dict(input_ids=batch.ids, attention_mask=batch.mask.long(), **pixels, **seen)


def render(tokenizer, messages: list[dict], add_generation_prompt: bool) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # what the template itself raises, or a fault in it
        raise ValueError(f"the model's chat template refuses the conversation: {error}") from None


def reserved(tokenizer, placeholder: str) -> set[str]:
    """What no text of the data may hold: it would be read as a token of the template's own."""
    return {*tokenizer.all_special_tokens, placeholder}


def fingerprint(family) -> str:
    """Hash of what features depend on beside the image: processor settings, and every weight outside the language model."""
    settings = json.dumps(family.processor.to_dict(), sort_keys=True, default=str)
    digest, inner = hashlib.sha256(settings.encode()), {id(p) for p in family.lm.get_decoder().parameters()}
    for name, p in family.lm.named_parameters():
        if id(p) not in inner and not name.startswith("lm_head"):
            digest.update(f"{name} {p.dtype}".encode() + p.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def load_checkpoint(path: str, dtype: torch.dtype) -> tuple[PreTrainedModel, "QwenFamily | ProcessorFamily"]:
    """The model and its family. Raises ValueError, one sentence, for what is not such a checkpoint or cannot be served."""
    looks_local = path.startswith((".", "/", "~")) or Path(path).exists()
    if looks_local and not (Path(path) / "config.json").is_file():
        raise ValueError(f"{path} is not a checkpoint folder: it has no config.json")
    kind = AutoConfig.from_pretrained(path, trust_remote_code=False).model_type
    if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise ValueError(f"{path} is a {kind} model, none that transformers offers for images and text (as Qwen2.5-VL is)")
    try:  # safetensors only, and no code from the checkpoint: what is downloaded is data
        lm = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, use_safetensors=True, trust_remote_code=False)
    except (OSError, ValueError):
        raise
    except Exception as error:  # a file cut short, tensors of other shapes
        raise ValueError(f"the weights in {path} cannot be loaded: {str(error).strip().splitlines()[0]}") from None
    check_finite(dict(lm.named_parameters()), path)
    return lm, (QwenFamily if kind in QwenFamily.KINDS else ProcessorFamily)(path, lm)
