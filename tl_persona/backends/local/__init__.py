"""Runs a plan on this machine. The only place that imports `transformer_lens`.

- `observers`: whether somebody looks into, or changes, what a model computes.
- `native`: the wrapped model's own attention and norms.
- `trial`: what a bridge's model takes, found by trying it.
- `quantized`: weights in fewer bits, and whether activations are rounded too.
- `inspection`: what a booted model is.
- `reference`: the transformers model that a hooked model was made from.
- `parts`: what the parts of a transformers model's blocks add to the stream.
- `plain`: a transformers model as it is, with forward hooks under TransformerLens's hook names.
- `runners`: one pass of a plan, on either TransformerLens class or the model itself.
- `verdicts`: what came of comparing, kept for other processes.
- `differences`: how far a hooked model is from the transformers model.
- `check`: whether a hooked model is the transformers model.
- `sums`: whether hooks inside a block show what is added.
- `installs`: nothing is installed while a model boots.
- `pooling`: means over token masks, put together from the passes.
- `proof`: whether a shortcut is exact on this model.
- `watch`: whether a model is still what it was.
- `boot`: a transformers model turned into a TransformerLens model.
- `opening`: one that was loaded, in the form that equals it.
- `decoding`: greedy generation, under whatever hooks are on the model.
- `backend`: a plan run with what is above.

Declined: loading weights, which is `models.checkpoints`' work.
"""
