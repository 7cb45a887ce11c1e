"""Runs a plan on an NDIF server. The only place that imports `nnsight`.

- `model`: a model on a server, and how it is reached.
- `sites`: hook names as places in a Hugging Face model.
- `tracing`: what a request carries, and the code that a server runs.
- `transport`: HTTP, with an end to every wait.
- `jobs`: one request brought to its result, and the journal of a run.
- `requests`: one payload in, its sums out.
- `groups`: how much goes to a server at once.
- `proof`: the most sharing that was shown to be exact there.
- `backend`: a plan run with all of them.

Declined: weights on this machine.
"""
