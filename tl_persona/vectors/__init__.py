"""Steering vectors and every format of theirs.

- `files`: the file of one vector, and what goes to other programs.
- `rotalabs`, `gguf`, `libraries`: rotalabs-steer, llama.cpp, steering-vectors and repeng.
- `set_files`: the folder of a set.
- `table`: what is known at each layer.
- `best`: which layer to take.
- `vector`: one direction at one hook.
- `vector_set`: one behaviour's vectors, one a layer.

Declined: extracting vectors, which is `caa`'s work, and measuring them, which is `statistics`'. The formats know no
class: they take and give what a vector says of itself, by name.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
