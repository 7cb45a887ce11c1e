"""Chats rendered by the tokenizer's own template, with proven spans of their contents, and tokens masked by strategy.

- `template`: what a chat template writes, and renderings read with it.
- `reasoning`: answers that begin with a block of reasoning.
- `prompt`: a rendered chat, its spans, and how they were found.
- `alignment`: the tokens that cover a range of characters.
- `prepare`: chats rendered and tokenized.
- `masks`: which tokens count, by strategy.
- `inputs`: prompts with their masks, texts with a token position.
- `verify`: a prepared prompt checked again.
- `preview`: prompts and masks shown in colour.

Declined: the texts themselves, which are `data`'s, and running a model. What cannot be proven raises a `PromptError`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
