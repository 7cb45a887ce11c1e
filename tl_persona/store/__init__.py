"""Persona vectors on disk, with their provenance: safetensors files in folders with an index.

- `header`: what a file says and holds, without torch.
- `manifest_files`: the index of a folder, as bytes.
- `folder`: the files of a folder, their names, and what they share.
- `manifest`: the index of a folder, kept and checked.
- `file`: one persona's vectors as bytes, and back.
- `core`: where a vector lies, and whether it is still the right one.
- `merge`: several stores into one.
- `store`: the store as tables and on the hub.

Declined: steering vectors, which are `vectors`' work, and computing anything.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
