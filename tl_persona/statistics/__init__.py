"""Numbers about activations: means over samples, directions from pairs, and how far to trust them.

- `means`: activations folded into means, or kept for statistics.
- `directions`: one direction from the two sides of contrast pairs.
- `separation`: how well a direction tells held-out pairs apart.
- `outliers`: selected tokens of outlying norm.
- `layers`: all statistics of one layer.

Declined: choosing a layer, which is `vectors`' work, and running a model.
"""
