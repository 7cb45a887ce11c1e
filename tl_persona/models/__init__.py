"""What a model is: its checkpoint, its sizes, and the names of its hooks.

- `hooks`: hook names, and layers chosen by them.
- `facts`: what the package needs to know of a loaded model.
- `offload`: weights that accelerate keeps elsewhere.
- `state`: what a model is at one moment, and whether it has changed.
- `caches`: the names by which a key-value cache is handed on.
- `gguf_header`: what stands before the tensors of a GGUF file.
- `fingerprint`: one short text for the files of a checkpoint.
- `checkpoints`: a name turned into weights and a tokenizer.
- `known_wrong`: classes of TransformerLens whose numbers are wrong for an architecture.
- `configs`: sizes and layers worth trying of well-known models, without their weights.

Declined: running a model, which is `backends`' work, and making a hooked one of a checkpoint, which is `loading`'s.
"""
