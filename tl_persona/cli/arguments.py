"""The arguments of `tl-persona` and its commands, and nothing heavy."""

import argparse

from tl_persona import __version__


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands."""
    parser = argparse.ArgumentParser(
        prog="tl-persona", description="Persona vectors and steering vectors out of a language model."
    )
    parser.add_argument("--version", action="version", version=f"tl-persona {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_extract(commands)
    _add_merge(commands)
    _add_caa(commands)
    _add_steer(commands)
    _add_preview(commands)
    _add_export(commands)
    _add_show(commands)
    _add_verify(commands)
    _add_report(commands)
    return parser


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", required=True, help="a hub id, a local model folder, a .gguf file, or smollm2 (the demo model)"
    )
    model.add_argument(
        "--kind",
        choices=("auto", "hooked", "bridge", "transformers"),
        default="auto",
        help="TransformerLens class, or the transformers model itself",
    )
    model.add_argument("--dtype", help="such as bfloat16; default: the checkpoint's own")
    model.add_argument("--device", help="such as cuda:0; default: cuda where there is one, else cpu")
    model.add_argument("--revision", help="hub revision")
    model.add_argument("--trust-remote-code", action="store_true", help="let the model's own code run")


def _add_backend_arguments(running: "argparse._ArgumentGroup") -> None:
    running.add_argument(
        "--backend",
        choices=("local", "remote"),
        default="local",
        help="remote runs on an NDIF server: its address in NDIF_HOST, the key in NDIF_API_KEY",
    )
    running.add_argument(
        "--timeout", type=float, metavar="SECONDS", help="of a remote request, retries included; default: 1800"
    )
    running.add_argument(
        "--allow-http", action="store_true", help="let key and texts go unencrypted to a server on another machine"
    )


def _add_extract(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "extract",
        help="extract persona vectors and save them",
        description="Extract one vector a persona, prompt variant and mask strategy. What is stored and would come "
        "out the same is skipped, so a run that was stopped goes on where it was.",
    )
    _add_model_arguments(parser)
    data = parser.add_argument_group("personas and questions")
    data.add_argument("--dataset", metavar="REPO", help="a hub data set or a folder; default: the bundled personas")
    data.add_argument("--personas", metavar="JSONL", help="a personas file (with --qa)")
    data.add_argument("--qa", metavar="JSONL", help="a questions file (with --personas)")
    chosen = data.add_mutually_exclusive_group()
    chosen.add_argument("--persona-id", nargs="+", metavar="ID", help="only these personas")
    chosen.add_argument("--sample-size", type=_positive, metavar="N", help="only the first N personas")
    data.add_argument(
        "--shard",
        metavar="I/N",
        help="only every Nth of these personas, from the one numbered I (0 is the first); auto asks SLURM or torchrun",
    )
    data.add_argument(
        "--n-train", type=_positive, metavar="N", help="at most N questions of the leakage-filtered train split"
    )
    data.add_argument("--qa-type", choices=("all", "explicit", "implicit"), default="all")
    data.add_argument("--seed", type=int, default=0, help="of the train split's shuffle")
    what = parser.add_argument_group("what to extract")
    what.add_argument("--variants", nargs="+", default=["templated", "biography"], metavar="VARIANT")
    what.add_argument(
        "--mask-strategy",
        nargs="+",
        default=["answer_mean"],
        metavar="STRATEGY",
        help="one or several, or all: they share the forward passes",
    )
    what.add_argument(
        "--layers", nargs="+", metavar="LAYER", help="ints, ranges 10:20, hook names or globs; default: every block"
    )
    _add_template_argument(what)
    _add_reasoning_argument(what)
    running = parser.add_argument_group("running")
    _add_backend_arguments(running)
    running.add_argument("--activations-dir", metavar="DIR", help="default: artifacts/activations")
    running.add_argument("--batch-tokens", type=_positive, metavar="N", help="padded tokens a forward pass may hold")
    running.add_argument("--verbose", action="store_true", help="show masks in colour and what a run will cost")
    running.add_argument(
        "--force", action="store_true", help="extract what is stored already again, also where it is of another model"
    )
    running.add_argument("--skip-failed", action="store_true", help="go on after a persona that fails; exit code 1")


def _add_merge(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "merge",
        help="join stores that were filled apart",
        description="Copy the vectors of one or several stores into another, and rebuild its manifests. Files of one "
        "folder that differ in shape, hooks, weights, model or interventions are refused before anything is written.",
    )
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="root of a store, as given to --activations-dir")
    parser.add_argument("--into", required=True, metavar="TARGET", help="root of the store to fill")
    parser.add_argument(
        "--on-conflict",
        choices=("error", "keep", "replace"),
        default="error",
        help="a persona stored twice and computed from something else: refuse, keep the first, or take the last",
    )


def _add_caa(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "caa",
        help="extract steering vectors from contrast pairs",
        description="Extract one steering vector a layer, all in one pass over the pairs, print how far each can be "
        "trusted, and save them as a set.",
    )
    _add_model_arguments(parser)
    pairs = parser.add_argument_group("contrast pairs").add_mutually_exclusive_group(required=True)
    pairs.add_argument("--behavior", help="a bundled behaviour, such as refusal or formality")
    pairs.add_argument("--pairs", metavar="FILE", help="a JSON file of contrast pairs")
    what = parser.add_argument_group("what to extract")
    what.add_argument(
        "--layers", nargs="+", metavar="LAYER", help="ints, ranges 10:20, hook names or globs; default: every block"
    )
    what.add_argument(
        "--token-position",
        default="last",
        metavar="POSITION",
        help="last, first, mean or an int, within the answer of a chat; or a mask strategy; default: last",
    )
    what.add_argument(
        "--include-first",
        action="store_true",
        help="let first and mean of a raw text take its token 0 in, whose norm is enormous in many models",
    )
    what.add_argument("--direction", choices=("mean_difference", "pca", "logistic"), default="mean_difference")
    what.add_argument("--seed", type=int, default=0, help="of the statistics' folds and resamples")
    _add_template_argument(what)
    running = parser.add_argument_group("running")
    _add_backend_arguments(running)
    running.add_argument("--batch-size", type=_positive, metavar="N", help="rows a forward pass may have")
    running.add_argument("--verbose", action="store_true", help="show how remote jobs are")
    running.add_argument("--output", required=True, metavar="DIR", help="folder for the set")


def _add_steer(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "steer",
        help="generate with a steering vector, and without",
        description="Answer prompts greedily, unsteered and steered, side by side.",
    )
    _add_model_arguments(parser)
    how = parser.add_argument_group("steering")
    how.add_argument("--vector", required=True, metavar="PATH", help="a saved vector, or the folder of a set")
    how.add_argument("--layer", type=int, metavar="N", help="of a set; default: the best by held-out separation")
    how.add_argument(
        "--coefficient",
        type=float,
        metavar="X",
        help="add: how many times the vector, whose length is that of one mean difference, negative for away from it; "
        "clamp: the projection to set, in the activations' units; default: 1",
    )
    how.add_argument("--mode", choices=("add", "ablate", "clamp"), default="add")
    text = parser.add_argument_group("text")
    text.add_argument("--prompt", nargs="+", action="extend", required=True, metavar="TEXT", help="a user's turn")
    text.add_argument("--max-new-tokens", type=_positive, default=40, metavar="N")


def _add_preview(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "preview",
        help="show a chat as a model's tokenizer sees it, with spans and masks",
        description="Show one chat with a model's tokenizer and chat template: what each mask strategy selects, where "
        "the texts lie, and what the template wrote and changed. The model itself is not loaded.",
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", required=True, help="a hub id, a folder with a tokenizer, a .gguf file, or smollm2 (the demo model)"
    )
    model.add_argument("--revision", help="hub revision")
    model.add_argument("--trust-remote-code", action="store_true", help="let the tokenizer's own code run")
    _add_template_argument(model)
    _add_reasoning_argument(model)
    data = parser.add_argument_group("a chat of a data set")
    data.add_argument("--dataset", metavar="REPO", help="a hub data set or a folder; default: the bundled personas")
    data.add_argument("--personas", metavar="JSONL", help="a personas file (with --qa)")
    data.add_argument("--qa", metavar="JSONL", help="a questions file (with --personas)")
    data.add_argument("--persona-id", metavar="ID", help="default: the first persona")
    data.add_argument("--variant", metavar="VARIANT", help="default: templated")
    data.add_argument("--question", type=_positive, metavar="N", help="the Nth question of the persona; default: 1")
    contrast = parser.add_argument_group("or a side of a contrast pair")
    pairs = contrast.add_mutually_exclusive_group()
    pairs.add_argument("--behavior", help="a bundled behaviour, such as refusal or formality")
    pairs.add_argument("--pairs", metavar="FILE", help="a JSON file of contrast pairs")
    contrast.add_argument("--pair", type=_positive, metavar="N", help="the Nth pair; default: 1")
    contrast.add_argument("--side", choices=("positive", "negative"), help="default: positive")
    typed = parser.add_argument_group("or a chat of your own")
    typed.add_argument("--system", metavar="TEXT", help="the system prompt; none: a chat without one")
    typed.add_argument("--user", metavar="TEXT", help="the question (with --answer)")
    typed.add_argument("--answer", metavar="TEXT", help="the answer (with --user)")
    typed.add_argument("--chat", metavar="JSON", help='a file {"messages": [...]} of any number of turns')
    shown = parser.add_argument_group("what to show")
    shown.add_argument(
        "--mask-strategy", nargs="+", default=["all"], metavar="STRATEGY", help="one or several; default: all"
    )
    shown.add_argument("--full", action="store_true", help="every token, where long stretches are left out otherwise")


def _add_template_argument(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--template-kwarg",
        action="append",
        metavar="NAME=VALUE",
        help="keyword for the chat template, such as enable_thinking=false; may be given several times",
    )


def _add_reasoning_argument(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--reasoning",
        choices=["include", "exclude"],
        default="include",
        help="whether a block of reasoning that an answer begins with counts as answer, where the template shows it",
    )


def _add_export(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "export",
        help="write steering vectors for other programs",
        description="Write saved steering vectors as a GGUF control vector for llama.cpp, as a folder of "
        "rotalabs-steer, or in the package's own format; the source may be any of these.",
    )
    parser.add_argument("source", help="the folder of a set, a saved vector, or a .gguf control vector")
    parser.add_argument("-o", "--output", required=True, metavar="PATH", help="a .gguf file, or a folder")
    parser.add_argument(
        "--format", choices=("gguf", "rotalabs", "tl_persona"), help="default: gguf where the output ends so"
    )
    parser.add_argument(
        "--layers", nargs="+", metavar="LAYER", help="ints, ranges 10:20, hook names or globs, or best; default: all"
    )
    parser.add_argument("--model-hint", metavar="TEXT", help="what a GGUF file says its model is; default: its name")


def _add_show(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("show", help="describe a saved vector", description="Describe a saved vector.")
    parser.add_argument("path", help="a file of persona vectors, a steering vector, or the folder of a set of them")


def _add_report(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "report",
        help="write one HTML page about vectors",
        description="Write one HTML page, which needs no network, about the persona vectors and the steering vectors "
        "under a path: what is there, who is like whom at each layer, norms, a map, the layers of each behaviour.",
    )
    parser.add_argument(
        "path", metavar="STORE_OR_SET", help="root of a store, as given to --activations-dir, or the folder of a set"
    )
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="the page, such as report.html")
    parser.add_argument("--dataset", metavar="REPO", help="whose persona attributes colour the map; default: bundled")
    parser.add_argument("--personas", metavar="JSONL", help="the same from a personas file")


def _add_verify(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "verify",
        help="check everything that is saved",
        description="Check every vector of a store, or a single file or set: checksums, shapes, finite numbers, "
        "provenance and index. The exit code is 1 if anything is wrong.",
    )
    parser.add_argument("path", help="a store, any folder of it, a file, or the folder of a set of steering vectors")
    parser.add_argument(
        "--repair",
        action="store_true",
        help="write manifests anew from the files, and move damaged vectors aside (as NAME.damaged; none is deleted)",
    )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a positive number")
    return number
