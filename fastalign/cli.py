"""The command line: parse, call, print. Heavy imports happen inside the commands, so that help is instant.

Exit codes: 0 done; 2 the user's input is wrong (one line on stderr, under a launcher once on each host); 1 anything
else, an interruption and running out of memory included.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from fastalign.config import NESTED, SECTIONS, TRAINING_DEFAULTS, Config, describe, load_config
from fastalign.errors import FastalignError, RunError, mask_secrets

Summary = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    arguments = _parse(argv)
    first_rank = os.environ.get("RANK", "0") == "0"
    # Threads that spin while they wait slow a CPU run down tenfold as soon as the machine does anything else.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # five retries of a hub that is away are told in one line
    for library in ("bitsandbytes", "kernels"):  # they warn of optional kernels that they did not find
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        with _quiet_stdout(arguments.json), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            result = arguments.run(arguments)
    except FastalignError as error:
        says = first_rank or (isinstance(error, RunError) and not error.on_all_ranks)
        code = 1 if isinstance(error, RunError) else 2
        return _fail(str(error), code, says if error.said_here is None else error.said_here)
    except KeyboardInterrupt:
        return _fail("interrupted; training.resume_from_checkpoint=true goes on where there is one", 1, first_rank)
    except BrokenPipeError:  # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (MemoryError, RuntimeError) as error:
        from fastalign.training.memory import first_line, is_out_of_memory

        if not is_out_of_memory(error):
            raise
        return _fail(f"out of memory: {first_line(error)}", 1, True)
    if first_rank:
        print(json.dumps(result, indent=2) if arguments.json else arguments.table(result))
    if result.get("refused"):  # by `train`, as a dry run has found
        return 2
    return 1 if result.get("interrupted") or result.get("problems") else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """As `parse_args`, but overrides may also stand behind an option, where argparse does not look for them."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    behind = [word for word in rest if "=" in word and not word.startswith("-")]
    if hasattr(arguments, "overrides"):
        arguments.overrides = [*arguments.overrides, *behind]
        rest = [word for word in rest if word not in behind]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return arguments


def _fail(message: str, code: int, say: bool) -> int:
    if say:
        print(f"fastalign: {message}", file=sys.stderr)
    return code


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"fastalign: {mask_secrets(message)} (see {self.prog} --help)", file=sys.stderr)
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fastalign",
        description="Fine-tune a decoder LLM on a task while pulling translations together at a middle layer.",
    )
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # launchers pass it before the command
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    train = commands.add_parser(
        "train",
        help="train an adapter from a YAML config",
        description="Train an adapter as a YAML config says. Values given as section.key=value win over the file.",
        epilog=_keys(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_config(train)
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="read config, data and tokenizer, show what would be trained on and what it needs, and stop",
    )
    train.add_argument("--overwrite", action="store_true", help="replace results that the output folder holds")
    _add_json(train)
    train.set_defaults(run=_train, table=lambda result: "\n".join(result.get("lines", ())) or _train_table(result))

    memory = commands.add_parser(
        "memory",
        help="the peak memory of a run, item by item, and the batches that fit a GPU",
        description="Predict the peak memory on each GPU; no weights are loaded. Shows "
        "what holds it, a table over batch sizes, and the largest micro-batch of each stream that fits. The rows' "
        "widths are those of the data where they can be read, else max_length.",
        epilog="examples:\n"
        "  fastalign memory config.yaml\n"
        "  fastalign memory config.yaml --gpu-memory 8GB model.quantization=nf4\n"
        "  fastalign memory config.yaml --gpus 4 training.gradient_checkpointing=true --json\n\n"
        "The peak is what tensors hold. What the driver takes is shown beside it, and 5% of a GPU is kept free.\n"
        "Exit code 2: the GPU cannot hold the model with one row a forward; the line says what would fit.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_config(memory)
    memory.add_argument("--gpu-memory", metavar="SIZE", help="e.g. 8GB, 24G; default: the GPU here, if there is one")
    memory.add_argument("--gpus", type=_count, metavar="N", help="of the run; default: those of the launch")
    _add_json(memory)
    memory.set_defaults(run=_memory, table=lambda result: "\n".join(result["lines"]))

    init = commands.add_parser(
        "init",
        help="write a starter config for your model and data",
        description="Write a commented config that runs as it is: looks at the rows for the template and the lengths, "
        "and at the model for what fits into the memory. Asks nothing; what it does not know says FILL IN.",
    )
    init.add_argument("--model", default="", help="folder or hub id of a decoder")
    init.add_argument("--task-data", nargs="+", default=[], metavar="FILE", help="rows of the task")
    init.add_argument("--parallel", nargs="+", default=[], metavar="FILE", help="sentence pairs")
    init.add_argument("--gpu-memory", metavar="SIZE", help="e.g. 8GB, of another GPU than the one here, if any")
    init.add_argument("--out", default="config.yaml", help="file to write (default: %(default)s)")
    init.add_argument("--overwrite", action="store_true", help="replace that file")
    _add_json(init)
    init.set_defaults(run=_init, table=_init_table)

    demo = commands.add_parser(
        "demo",
        help="see it work: a small model and corpus made on the spot, no network, a few minutes on a CPU",
        description="Make a small multilingual corpus and a tiny model, then fine-tune it on English commands "
        "without and with alignment, with equal task updates, and compare.",
    )
    demo.add_argument("--out", default="demo-output", help="folder for the results (default: %(default)s)")
    demo.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[2],
        metavar="N",
        help="of the corpus, the model and the order, each a run of its own, e.g. 2 3 4 for a spread (default: 2)",
    )
    demo.add_argument("--control", action="store_true", help="train once more with pairs that are no translations")
    demo.add_argument("--overwrite", action="store_true", help="replace results that the folder holds")
    _add_json(demo)
    demo.set_defaults(run=_demo, table=_demo_table)

    doctor = commands.add_parser(
        "doctor",
        help="what this machine can run, what will be used, and why",
        description="Try every library that a run may need, each in a process of its own, and say what will be used, "
        "why, and how to mend what is missing or broken. Nothing is fetched or sent. The exit code is 1 if a run "
        "cannot work here.",
    )
    doctor.add_argument(
        "--timeout",
        type=_seconds,
        default=60.0,
        metavar="SECONDS",
        help="that each part may take before it counts as hanging (default: %(default)g)",
    )
    _add_json(doctor)
    doctor.set_defaults(run=_doctor, table=_doctor_table)
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.yaml", help="the configuration; examples/ has commented ones")
    parser.add_argument(
        "overrides", metavar="section.key=value", nargs="*", default=[], help="e.g. training.max_steps=100"
    )


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON, and only that, on stdout")


def _keys() -> str:
    """Every key of the config with type, default and meaning, from the one place they are written down."""
    lines = ["keys (type, default):"]
    for section, cls in {**SECTIONS, **NESTED}.items():
        lines += ["", f"{section}:  {' '.join((cls.__doc__ or '').split())}"]
        for name, kind, default, text in describe(section):
            lines.append(f"  {name}  ({kind}; {default})")
            lines += textwrap.wrap(text, width=96, initial_indent=" " * 6, subsequent_indent=" " * 6)
    lines += ["", "training:  any key of transformers.TrainingArguments; fastalign's own defaults:"]
    lines += [f"  {name}: {value}" for name, value in TRAINING_DEFAULTS.items()]
    lines += [
        "  bf16: true on a GPU that has it",
        "  resume_from_checkpoint: true (the last one in output_dir), or its folder",
    ]
    return "\n".join(lines)


def _quiet_stdout(active: bool) -> contextlib.AbstractContextManager:
    return contextlib.redirect_stdout(sys.stderr) if active else contextlib.nullcontext()


def _config(arguments: argparse.Namespace) -> Config:
    """What is asked for. A mistake that only one host makes ends the ranks of the others, too."""
    try:
        return load_config(arguments.config, arguments.overrides)
    except FastalignError as error:
        if os.environ.get("WORLD_SIZE", "1") == "1":
            raise
        from fastalign.training.joining import told_to_all

        raise told_to_all(error) from None


def _train(arguments: argparse.Namespace) -> Summary:
    config = _config(arguments)

    if arguments.dry_run:
        from fastalign.training.preview import dry_run

        return dry_run(config, overwrite=arguments.overwrite)

    from fastalign.training.run import train

    return train(config, overwrite=arguments.overwrite)


def _train_table(summary: Summary) -> str:
    lines = [f"{'stream':<12}{'steps':>8}{'loss first':>12}{'loss last':>12}{'tokens':>12}{'seconds':>10}"]
    for name, row in summary["streams"].items():
        lines.append(
            f"{name:<12}{row['steps']:>8}{row['loss_first']:>12.4f}{row['loss_last']:>12.4f}"
            f"{row['tokens']:>12,}{row['seconds']:>10.1f}"
        )
    if "retrieval" in summary:
        after = summary["retrieval"]["after"]
        before = summary["retrieval"].get("before", {"mean": None, "languages": {}})
        lines += ["", f"retrieval at layer {summary['layer']}, %", f"{'language':<12}{'before':>8}{'after':>12}"]
        rows = {**after["languages"], "mean": after["mean"]}
        scores = {**before["languages"], "mean": before["mean"]}
        for language, score in rows.items():
            start = scores.get(language)
            lines.append(f"{language:<12}{'-' if start is None else f'{100 * start:.1f}':>8}{100 * score:>12.1f}")
    lines += [
        "",
        f"{summary['steps']} steps in {summary['seconds']:.0f} s, "
        f"peak memory {summary['peak_memory_bytes'] / 1e9:.2f} GB",
        f"results in {summary['output_dir']}",
    ]
    if summary["interrupted"]:
        from fastalign.training.checkpoint import how_to_continue

        lines.append(f"interrupted; {how_to_continue(Path(summary['output_dir']))}")
    return "\n".join(lines)


def _memory(arguments: argparse.Namespace) -> Summary:
    from fastalign.training.capacity import memory_report

    config = _config(arguments)
    return memory_report(config, gpu_memory=arguments.gpu_memory, gpus=arguments.gpus)


def _init(arguments: argparse.Namespace) -> Summary:
    from fastalign.starter import write_starter

    return write_starter(
        arguments.out,
        overwrite=arguments.overwrite,
        model=arguments.model,
        task_data=arguments.task_data,
        parallel=arguments.parallel,
        gpu_memory=arguments.gpu_memory,
    )


def _init_table(result: Summary) -> str:
    return "\n".join([*result["lines"], f"wrote {result['out']}; next:", *(f"  {line}" for line in result["next"])])


def _demo(arguments: argparse.Namespace) -> Summary:
    from fastalign.demo import demo

    result = demo(arguments.out, seeds=arguments.seeds, control=arguments.control, overwrite=arguments.overwrite)
    return {"out": arguments.out, **result}


def _demo_table(result: Summary) -> str:
    from fastalign.demo.page import table

    return "\n".join([table(result), "", f"{result['seconds']:.0f} s; {result['out']}/report.html shows all of it"])


def _doctor(arguments: argparse.Namespace) -> Summary:
    from fastalign.doctor import doctor

    return doctor(limit=arguments.timeout)


def _doctor_table(found: Summary) -> str:
    from fastalign.doctor import table

    return table(found)


def _count(text: str) -> int:
    """Of an option: a whole number from 1 on."""
    if not text.isdecimal() or not 1 <= int(text) < 10**6:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, not {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    """Of an option: a number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, not {text!r}")
    return value
