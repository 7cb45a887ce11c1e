"""Runs a plan on this machine. The only place that imports `transformer_lens`.

- `observers`: whether somebody looks into, or changes, what a model computes.
- `native`: the wrapped model's own attention and norms.
- `trial`: what a bridge's model takes, found by trying it.
- `installs`: nothing is installed while a model boots.
- `boot`: a transformers model turned into a TransformerLens model.
- `runners`: one pass of a plan, on either TransformerLens class.
- `pooling`: means over token masks, put together from the passes.
- `proof`: whether a shortcut is exact on this model.
- `decoding`: greedy generation, under whatever hooks are on the model.
- `backend`: a plan run with what is above.

Declined: loading weights, which is `models.checkpoints`' work.
"""
