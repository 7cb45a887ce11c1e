"""What runs together: samples cut into passes of rows. Pure, no model.

- `prefixes`: what token sequences share at their beginning.
- `rows`: texts laid out in rows and passes.
- `plan`: the plan of some samples, under a token budget.
- `passes`: the tensors of one pass.

Declined: running a plan, which is `backends`' work, and what the samples mean.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
