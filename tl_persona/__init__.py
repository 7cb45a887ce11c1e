"""Persona vectors and steering vectors through TransformerLens hook names.

The flow, which is also the order of the modules:

    samples -> prompts + spans -> masks -> plan -> backend -> reducers -> vectors -> store

- `samples` and `contrast`: personas with their questions, and contrast pairs: plain records.
- `prompts`: chats rendered by the tokenizer's own template, with proven spans of persona, question and answer.
- `masks`: which tokens count, by strategy, as `Bool[Tensor, "batch pos"]`.
- `hooks`: layers chosen by hook name.
- `plan`: samples cut into batches; pure, no model.
- `backends`: a plan run on a hooked model; for each sample and mask the mean of every hook.
- `reducers`, `statistics`, `directions`: means over samples, and how far to trust them.
- `vectors`, `store`: what is kept, with its provenance, as safetensors.
- `extraction`, `caa`, `steering`, `generation`, `cli`: the recipes that join them.

Importing this package loads neither torch nor TransformerLens; names are fetched when first used.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
