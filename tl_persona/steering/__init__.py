"""Acts while a model runs: edits activations, or reads projections off them.

- `hook_points`: functions put on a model's hooks, and taken off.
- `pass_watch`: which tokens a running pass has.
- `positions`: which of them are meant.
- `monitor`: projections read off.
- `interventions`: directions added, ablated, clamped.
- `text`: a text with its tokens shaded by their projection.

Declined: extracting directions, which is `caa`'s work, and saving them, which is `vectors`'.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
