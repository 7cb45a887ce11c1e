"""Persona vectors and steering vectors through TransformerLens hook names.

The flow, which is also the order of the rooms:

    data -> prompts -> plan -> backends -> statistics -> vectors, store

- `data`: personas with their questions, and contrast pairs: plain records.
- `prompts`: chats rendered by the tokenizer's own template, with proven spans of persona, question and answer, and
  masks by strategy: which tokens count, as `Bool[Tensor, "batch pos"]`.
- `plan`: samples cut into passes; pure, no model.
- `models`: what a model is, and layers chosen by hook name.
- `backends`: a plan run on a hooked model; for each sample and mask the mean of every hook.
- `statistics`: means over samples, directions, and how far to trust them.
- `steering`: activations edited, and projections read, while a model runs.
- `vectors`, `store`: what is kept, with its provenance, as safetensors.
- `loading`, `extraction`, `caa`, `generation`, `checking`: the recipes that join them.
- `report`, `cli`: what is kept shown on a page, and all of it from the command line.

Below them lie `errors`, `display`, `provenance`, `files`, `tensors` and `hub`, which most of the others use.

Importing this package loads neither torch nor TransformerLens; names are fetched when first used. The names that it
offers are those of its stub, `__init__.pyi`.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
