"""``fastprompt train | eval | generate | compile | serve | inspect | doctor``."""

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

import fastprompt

# Nothing that needs torch is imported up here: `--help` answers at once, and `doctor` has to run without it.


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 2 for an argument that cannot be used."""
    options = vars(_parser().parse_args(argv))
    command, run = options.pop("command"), options.pop("run")
    if command == "doctor":
        return run()

    from fastprompt.training import InputError

    try:
        run(**options)
    except InputError as error:
        option = "--" + error.argument.replace("_", "-")
        message = " ".join(error.message.split())
        print(f"fastprompt {command}: error: argument {option}: {message}", file=sys.stderr)
        return 2
    return 0


def train(**options: Any) -> None:
    """Train a soft prompt and print the last entry of the log; or train several and print what became of them."""
    from fastprompt.training import InputError, TrainingConfig, train

    if "verbaliser" in options:
        pairs = options["verbaliser"]
        options["verbaliser"] = dict(pairs)
        if len(options["verbaliser"]) < len(pairs):
            raise InputError("verbaliser", f"a label has two words among {[label for label, _ in pairs]}")
    lrs, seeds, halve_at = options.pop("lr", []), options.pop("seeds", 1), options.pop("halve_at", None)
    if len(lrs) == 1:
        options["lr"] = lrs[0]
    config = TrainingConfig(**options)
    if len(lrs) > 1 or seeds != 1:
        result = _sweep(config, lrs or [config.learning_rate], seeds, halve_at)
    elif halve_at is not None:
        raise InputError("halve_at", "only a sweep drops candidates; expected several --lr or --seeds")
    elif config.method != "multitask" and config.task_column is not None and config.only_task is None:
        result = _train_tasks(config)
    else:
        result = train(config)[-1]
    print(json.dumps(result, allow_nan=False))


def _train_tasks(config: Any) -> dict[str, Any]:
    """Train a prompt for each task, show them, and sum them up."""
    from fastprompt.training import show_table, train_tasks

    prompts = [prompt.record() for prompt in train_tasks(config)]
    show_table(f"adapters of {config.output}", prompts)
    means = {}
    for name in ("eval_loss", "eval_accuracy"):
        values = [prompt[name] for prompt in prompts if prompt[name] is not None]
        if values:
            means[name] = sum(values) / len(values)
    return {"prompts": len(prompts), **means}


def _sweep(config: Any, lrs: list[float], seeds: int, halve_at: list[int] | None) -> dict[str, Any]:
    """Train the candidates, show them, and return the best."""
    from fastprompt.training import show_table, sweep

    candidates = [candidate.record() for candidate in sweep(config, lrs, seeds, halve_at)]
    show_table(f"candidates of {config.output}", candidates)
    return candidates[0]


def evaluate(data: str | None = None, task: str | None = None, **options: Any) -> None:
    """Print loss and accuracy of a trained soft prompt."""
    from fastprompt.training import TrainedAdapter

    print(json.dumps(TrainedAdapter(**options).evaluate(data, task), allow_nan=False))


def generate(
    prompt: list[str] | None = None,
    text: list[str] | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    task: str | None = None,
    **options: Any,
) -> None:
    """Print what follows each text."""
    from fastprompt.training import TrainedAdapter

    adapter = TrainedAdapter(**options)
    for start in prompt or [adapter.task.prompt(one) for one in text or ()]:
        print(adapter.generate(start, max_new_tokens, temperature, seed, task))


def compile(**options: Any) -> None:
    """Write each prompt as what it leaves in its model; print what was written, a line each."""
    from fastprompt.compiling import compile_adapters

    for written in compile_adapters(**options):
        print(json.dumps(written))


def serve(**options: Any) -> None:
    """Answer requests to the prompts of one model until SIGTERM."""
    from fastprompt.serve import serve

    serve(**options)


def inspect(output: str | None = None, as_json: bool = False, **options: Any) -> None:
    """Print what a soft prompt looks like, and write pictures of it into ``output``."""
    from pathlib import Path

    from fastprompt.inspect import check_output, inspect_prompt

    if output is not None:
        check_output(Path(output))
    report = inspect_prompt(**options)
    pictures = [str(path) for path in report.save_pictures(Path(output))] if output is not None else []
    if as_json:
        print(json.dumps({**report.to_dict(), "pictures": pictures}))
        return
    report.show()
    for picture in pictures:
        print(picture)


def doctor() -> int:
    """Print what is installed."""
    from fastprompt.doctor import main

    return main()


def _parser() -> argparse.ArgumentParser:
    # Defaults stand in `TrainingConfig` and the functions above: an option that is not given is not passed on.
    def command(name: str, run: Callable, help: str) -> argparse.ArgumentParser:
        parser = commands.add_parser(name, help=help, description=help, argument_default=argparse.SUPPRESS)
        parser.set_defaults(run=run)
        return parser

    parser = argparse.ArgumentParser(prog="fastprompt", description="Soft prompts for frozen language models.")
    parser.add_argument("--version", action="version", version=f"fastprompt {fastprompt.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    _add_train(command("train", train, "train a soft prompt"))
    _add_eval(command("eval", evaluate, "loss, and accuracy on labelled data, of a trained soft prompt"))
    _add_generate(command("generate", generate, "complete text with a trained soft prompt"))
    _add_compile(command("compile", compile, "run soft prompts through their model once, for serving"))
    _add_serve(command("serve", serve, "prompts of one model behind OpenAI's interface, on one machine"))
    _add_inspect(command("inspect", inspect, "what a soft prompt looks like: nearest tokens, norms, similarity"))
    command("doctor", doctor, "what is installed, and which backend each operator uses")
    return parser


def _add_train(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    add("--model", required=True, metavar="PATH", help="folder of a causal language model, or its name on the hub")
    add("--gguf-file", metavar="NAME", help="a GGUF file in that folder")
    add("--precision", help="of the frozen weights: fp32 (default), bf16, fp16; the prompt is always fp32")
    add("--gradient-checkpointing", action="store_true", help="less memory, more time")

    add = parser.add_argument_group("data").add_argument
    add("--data", required=True, metavar="FILE", help=".csv or .tsv with a header, or .jsonl")
    add("--text-column", metavar="NAME", help="with --label-column: text to classify")
    add("--label-column", metavar="NAME", help="its class; the loss stands on the label's word")
    add("--prompt-column", metavar="NAME", help="with --completion-column: a prompt")
    add("--completion-column", metavar="NAME", help="the text to follow it; the loss stands on all of it")
    add("--template", help="prompt of a text: {text} or any {column} is filled in; \\n is a line break", type=_unescape)
    add("--verbaliser", nargs="+", type=_label_word, metavar="LABEL=WORD", help="word of each label (default: itself)")
    add("--max-length", type=int, metavar="TOKENS", help="cut longer rows at the start of their prompt")
    add("--eval-data", metavar="FILE", help="rows to evaluate on")
    add("--eval-fraction", type=float, metavar="F", help="or: the part of --data to hold out for it")
    add("--data-seed", type=int, help="of the held-out rows and the order of the others (default: --seed)")

    add = parser.add_argument_group("soft prompt").add_argument
    add("--method", help="prompt-tuning (default), prefix-tuning, p-tuning or multitask")
    add("--num-virtual-tokens", type=int, metavar="P", help="length of the prompt (default 20)")
    inits = "prompt-tuning and multitask: vocab (embeddings of random tokens), text (those of --init-text)"
    add("--init", help=f"random (default); {inits}; prefix-tuning: zero or text (keys and values of --init-text)")
    add("--init-text", metavar="TEXT", help="cut or repeated to P tokens")

    add = parser.add_argument_group("prefix-tuning and p-tuning").add_argument
    add("--projection", action="store_true", help="prefix-tuning: train an MLP in front of the keys and values")
    add("--encoder", help="p-tuning: lstm (default) or mlp")
    add("--encoder-hidden-size", type=int, metavar="N", help="width of either (default: as the keys; p-tuning: 128)")

    add = parser.add_argument_group("many prompts at once, side by side in the same batches").add_argument
    add("--task-column", metavar="NAME", help="a prompt for each value of this column; multitask: the task of each row")
    add("--only-task", metavar="VALUE", help="or: one prompt, for the rows with this value")
    add("--seeds", type=int, metavar="N", help="with several --lr or this a sweep: so many seeds, from --seed on")
    halve = "drop the worse half of a sweep after these steps (default: until one is left; without STEP: never)"
    add("--halve-at", type=int, nargs="*", metavar="STEP", help=halve)
    add("--prompts-per-step", type=int, metavar="N", help="how many meet in a batch (default: as few as fill it)")

    add = parser.add_argument_group("multitask").add_argument
    add("--num-ranks", type=int, metavar="R", help="rank of a task's factors (default 1)")
    add("--source", metavar="DIR", help="start from the prompt of this multitask run")
    add("--source-init", help="with the average of its tasks (default), the exact factors of one, or its shared prompt")
    add("--source-task", metavar="NAME", help="which one, for exact")

    add = parser.add_argument_group("optimisation (AdamW)").add_argument
    rates = "default 0.02; prefix-tuning 0.01, with --projection 0.001; p-tuning 0.001; several: the best is kept"
    add("--lr", type=float, nargs="+", help=rates)
    add("--schedule", help="linear (default), cosine or constant")
    add("--warmup", type=int, metavar="STEPS", help="steps of linear warm-up (default 0)")
    add("--weight-decay", type=float, help="default 0")
    add("--max-grad-norm", type=float, help="clip the gradient to this norm (default 1; 0: never)")
    add("--steps", type=int, help="how long to train: this or --epochs")
    add("--epochs", type=float)
    add("--batch-size", type=int, metavar="ROWS", help="rows a batch (default 16)")
    add("--tokens-per-batch", type=int, metavar="TOKENS", help="or: as many rows as fit into this many real tokens")
    add("--seed", type=int, help="the same seed gives the same prompt (default 0)")

    add = parser.add_argument_group("output").add_argument
    add("--output", required=True, metavar="DIR", help="for the adapter (PEFT's format), log.json and checkpoints")
    add("--save-steps", type=int, metavar="STEPS", help="a checkpoint each so many steps (default 100)")
    add("--keep-checkpoints", type=int, metavar="N", help="how many of the newest to keep (default 2)")
    add("--eval-steps", type=int, metavar="STEPS", help="evaluate each so many steps (default: at the end)")
    add("--eval-rows", type=int, metavar="ROWS", help="on so many held-out rows (default: all, as at the end)")
    add("--keep-best", action="store_true", help="keep the prompt of the best evaluation in place of the last one")
    add("--patience", type=int, metavar="N", help="and stop after so many evaluations without a better one")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --output, if there is one")


def _add_adapter(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--adapter", required=True, metavar="DIR", help="the --output of `fastprompt train`")
    _add_model(parser)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="PATH", help="where the model is now (default: where the run found it)")
    parser.add_argument("--gguf-file", metavar="NAME", help="likewise")
    parser.add_argument("--precision", help="of the weights: fp32, bf16 or fp16 (default: as in training)")


def _add_eval(parser: argparse.ArgumentParser) -> None:
    _add_adapter(parser)
    parser.add_argument(
        "--data", metavar="FILE", help="with the run's columns (default: the rows that the run held out)"
    )
    parser.add_argument("--task", metavar="NAME", help="of a multitask run: only the rows of this task")


def _add_generate(parser: argparse.ArgumentParser) -> None:
    _add_adapter(parser)
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("--prompt", nargs="+", metavar="TEXT", help="texts to complete as they stand")
    start.add_argument("--text", nargs="+", help="texts to put into the run's template first")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="default 64")
    parser.add_argument("--temperature", type=float, help="0 (default): the most probable token each time")
    parser.add_argument("--seed", type=int, help="for sampling (default 0)")
    parser.add_argument("--task", metavar="NAME", help="of a multitask run: whose prompt to use")


def _add_compile(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--adapter", required=True, nargs="+", metavar="DIR", help="outputs of runs, or any prompt adapters of PEFT")
    add("--output", required=True, metavar="PATH", help="a .safetensors file, or a folder with one for each prompt")
    add("--task", metavar="NAME", help="of a multitask adapter: only the prompt of this task (default: one file each)")
    formats = "compiled (default), embeds (for vLLM's prompt embeddings) or peft (a Prefix-Tuning adapter)"
    add("--format", choices=("compiled", "embeds", "peft"), help=formats)
    _add_model(parser)


def _add_serve(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Prompts of one frozen model behind OpenAI's interface: one process on one machine. For more load than that, "
        "give the prompts to vLLM: docs/vllm.md."
    )
    add = parser.add_argument
    where = "folder of the frozen model, or its name on the hub (default: as the prompts say)"
    add("--base", metavar="MODEL", help=where)
    sources = "compiled prompts, adapters' folders, folders of these, or NAME=PATH; a request's `model` is the name"
    add("--prompts", nargs="+", metavar="PATH", help=sources)
    add("--base-name", metavar="NAME", help="what requests without a prompt call the model (default: as its folder)")
    add("--gguf-file", metavar="NAME", help="a GGUF file in the model's folder")
    add("--precision", help="of the weights: fp32 (default), bf16 or fp16")
    add("--host", help="default 127.0.0.1")
    add("--port", type=int, help="default 8000")
    add("--max-batch", type=int, metavar="ROWS", help="that are generated together (default 32)")
    add("--max-wait-ms", type=float, metavar="MS", help="how long the first row waits for others (default 5)")
    add("--max-tokens", type=int, metavar="N", help="of prompt, text and answer together (default: as the model has)")
    add("--max-body", type=int, metavar="BYTES", help="of a request (default 1 MiB)")
    add("--max-queue", type=int, metavar="ROWS", help="that wait (default 256)")
    add("--max-prompt-bytes", type=int, metavar="BYTES", help="memory of the prompts; others wait on disk")
    admin = "from where PUT /admin/prompts/NAME may add prompts, with the token of FASTPROMPT_ADMIN_TOKEN"
    add("--admin-folder", metavar="DIR", help=admin)


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adapter", required=True, metavar="DIR", help="output of a run, or any prompt adapter of PEFT"
    )
    _add_model(parser)
    parser.add_argument("--top", type=int, metavar="K", help="how many of the nearest tokens to name (default 5)")
    parser.add_argument("--output", metavar="DIR", help="write similarity.png and norms.png into this folder")
    parser.add_argument("--json", action="store_true", dest="as_json", help="print JSON in place of a table")


def _unescape(template: str) -> str:
    return template.replace("\\n", "\n")


def _label_word(pair: str) -> tuple[str, str]:
    label, separator, word = pair.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"expected LABEL=WORD, got {pair!r}")
    return label, word


if __name__ == "__main__":
    sys.exit(main())
