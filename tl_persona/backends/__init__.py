"""Running a plan: for each sample and mask the mean of every hook.

- `base`: what every backend offers.
- `shortcuts`: where a plan computes something otherwise, which text stands for which, how far two may lie apart.
- `probes`: the texts that are compared, and what is known once they were.
- `local`: this machine, through TransformerLens.
- `remote`: an NDIF server, through nnsight.
- `choice`: which of them runs a model.

Declined: what the samples mean. Personas and contrast pairs look the same from here.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
