"""Two commits, sets of releases or kinds of model, in turn: CPU seconds of the same persona extraction.

    git worktree add /tmp/before COMMIT
    pip install --no-deps --target /tmp/older transformers==5.23.0
    python benchmarks/before_and_after.py --before /tmp/before:/tmp/older --pairs 20

    python benchmarks/before_and_after.py --before-kind bridge --kind transformers

Each side loads the model once in a process of its own; then they take turns, so that a machine that slows down slows
both. `--load` counts loading and the first run together, from a fresh model each time, and `--first` the first run
alone. Nothing is asserted on times; vectors are compared first.
"""

import argparse
import os
import statistics
import tempfile

import torch
from peer import Worker
from persona_samples import long_persona_inputs

from tl_persona.models.checkpoints import find_checkpoint, load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--before", default="", help="folders that come first on the path of the one side")
    parser.add_argument("--after", default="", help="the same of the other; the default is this checkout")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--kind", default="bridge")
    parser.add_argument("--before-kind", help="of the side before, where it is another")
    parser.add_argument("--load", action="store_true", help="count loading and the first run together")
    parser.add_argument("--first", action="store_true", help="count the first run of a model that is opened anew")
    parser.add_argument("--unshared", action="store_true", help="begin each text with another token: nothing is shared")
    chosen = parser.parse_args()
    inputs = long_persona_inputs(load_tokenizer(find_checkpoint("smollm2")), chosen.questions)
    if chosen.unshared:
        for token, ids in enumerate(inputs.ids, start=1000):
            ids[0] = token
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"ids": inputs.ids, "masks": inputs.masks}, f"{folder}/inputs.pt")

        def ask(worker: Worker, name: str, **more: bool) -> dict[str, float]:
            kind = (chosen.before_kind or chosen.kind) if name == "before" else chosen.kind
            return worker.ask(inputs=f"{folder}/inputs.pt", output=f"{folder}/{name}.pt", kind=kind, **more)

        paths = {"before": chosen.before, "after": chosen.after}
        workers = {}
        for name, path in paths.items():
            workers[name] = Worker("ours_worker.py")
            workers[name]._path[:0] = [part for part in path.split(os.pathsep) if part]
        with workers["before"], workers["after"]:
            first = {name: ask(worker, name) for name, worker in workers.items()}
            one, other = (torch.load(f"{folder}/{name}.pt", weights_only=True) for name in workers)
            error = float(((one - other).norm(dim=-1) / other.norm(dim=-1)).max())
            assert error < 1e-5, f"the two sides give other vectors: {error:.1e}"
            way = {"load": True} if chosen.load else {"first": True} if chosen.first else {}
            rounds = [{name: ask(worker, name, **way) for name, worker in workers.items()} for _ in range(chosen.pairs)]
    kinds = " and ".join(dict.fromkeys([chosen.before_kind or chosen.kind, chosen.kind]))
    print(f"{kinds}, {len(inputs.ids)} questions, {chosen.pairs} pairs, vectors within {error:.1e}")
    for what in ("cpu", "seconds"):
        sides = {name: [each[name][what] for each in rounds] for name in workers}
        ratio = statistics.median(each["after"][what] / each["before"][what] for each in rounds)
        medians = ", ".join(f"{name} {statistics.median(values):.2f}" for name, values in sides.items())
        starts = ", ".join(f"{name} {first[name][what]:.2f}" for name in workers)
        print(f"  {what:8} {medians}, after / before {ratio:.3f} (first call: {starts})")


if __name__ == "__main__":
    main()
