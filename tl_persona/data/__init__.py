"""Who is asked what: personas with their questions, and contrast pairs.

- `personas`: plain records, and their words in a chat.
- `jsonl`: JSON Lines files, small and very large.
- `dataset`: a data set of personas and questions, and its split.
- `shards`: which personas a process takes when several share a run.
- `contrast`: contrast pairs, and data sets of them.
- `behaviors`: the behaviours that come with this package, in `bundled`.

Declined: chat templates and tokens, which are `prompts`' work, and models. Nothing here loads torch.
"""
