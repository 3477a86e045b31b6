"""The models shipped with the package, and where they lie; `tools/bundled_models.py` has built them.

``base`` is a small Llama trained on the whole mixture of `genarm.world`; ``helpful`` and ``polite`` are autoregressive
reward models (ARMs) for its two attributes, with the same tokenizer. Each is a folder that transformers loads:

>>> from transformers import AutoModelForCausalLM
>>> AutoModelForCausalLM.from_pretrained(path("helpful")).num_parameters() < 400_000
True
"""

from pathlib import Path

from . import world

NAMES = ("base", *world.ATTRIBUTES)
FOLDER = Path(__file__).with_name("bundled-models")
SHIPPED = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
"""The files of each folder."""


def path(name: str) -> Path:
    """The folder of the shipped model ``name``: "base", "helpful" or "polite" (ValueError otherwise)."""
    if name not in NAMES:
        raise ValueError(f"unknown bundled model {name!r}; the bundled models are {', '.join(NAMES)}")
    return FOLDER / name
