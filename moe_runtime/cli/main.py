"""The command line: `moe-runtime COMMAND`. Modules that a command needs are imported only when it runs."""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from moe_runtime.bench.options import BenchOptions
from moe_runtime.cli.bench import bench
from moe_runtime.cli.calibrate import CalibrateOptions, calibrate
from moe_runtime.cli.generate import engine_options, generate, sampling_options
from moe_runtime.cli.heatmap import heatmap
from moe_runtime.cli.inspect import InspectOptions, inspect, inspect_engine_options
from moe_runtime.cli.plan import PlanOptions, ProfileOptions, plan, profile
from moe_runtime.cli.quantize import QuantizeOptions, quantize, quantize_options
from moe_runtime.cli.tune import tune, tune_options
from moe_runtime.config.engine import EngineConfig
from moe_runtime.config.options import (
    MODEL,
    UserMistake,
    add_flags,
    integers,
    only_fields,
    option_values,
    options_of,
    user_mistakes,
)
from moe_runtime.config.server import ServerConfig
from moe_runtime.types.version import __version__
from moe_runtime.wire.executor import RankError

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 1, 2, 130, 141


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code.

    0 is success, 1 a failed rank, 2 a user's mistake (described in one line on stderr), 130 Ctrl-C.
    """
    try:
        options = _parser().parse_args(arguments)
        run: Callable[[argparse.Namespace], int] = options.run
        code = run(options)
        sys.stdout.flush()
        return code
    except UserMistake as error:
        _complain(str(error))
        return EXIT_USAGE
    except RankError as error:
        _complain(str(error))
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output has ended; exit must not flush anything to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE


class _Parser(argparse.ArgumentParser):
    """Reports an error in one line, and names options as Python and YAML do."""

    def error(self, message: str) -> NoReturn:
        raise UserMistake(
            re.sub(r"^argument (?:-\w/)?(?:--)?([\w-]+)[^:]*: ", lambda name: name[1].replace("-", "_") + ": ", message)
        )


def _complain(message: str) -> None:
    print(f"moe-runtime: error: {' '.join(message.split())}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="moe-runtime",
        description="Serve Mixture-of-Experts language models with expert parallelism.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"moe-runtime {__version__}")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher puts it before all others
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_generate(commands)
    _add_serve(commands)
    _add_bench(commands)
    _add_inspect(commands)
    _add_heatmap(commands)
    _add_calibrate(commands)
    _add_quantize(commands)
    _add_plan(commands)
    _add_profile(commands)
    _add_tune(commands)
    return parser


def _add_command(
    commands: argparse._SubParsersAction[_Parser], name: str, help_text: str, run: Callable[[argparse.Namespace], int]
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help_text, description=help_text, allow_abbrev=False)
    parser.set_defaults(run=run)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help=MODEL)
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file with options by name; flags override it")


def _add_generate(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = _add_command(commands, "generate", "Continue prompts on the command line.", _generate)
    _add_model(parser)
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a prompt; may be repeated")
    parser.add_argument(
        "--prompt-token-ids",
        type=integers,
        action="append",
        default=[],
        metavar="N,N,...",
        help="a prompt as token ids; may be repeated",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--chat", action="store_true", help="a prompt is a user's message (default, if there is a chat template)"
    )
    form.add_argument("--raw", action="store_true", help="continue the prompt as it is, without a chat template")
    parser.add_argument(
        "--heatmap", type=Path, metavar="FILE", help="write the experts' load: .png, .svg, .html, .csv, .json or .npz"
    )
    add_flags(parser.add_argument_group("sampling"), sampling_options())
    add_flags(parser.add_argument_group("engine"), engine_options("routing"))


def _add_serve(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = _add_command(commands, "serve", "Serve a model over HTTP. Under torchrun, each process is a rank.", _serve)
    _add_model(parser)
    add_flags(parser.add_argument_group("server"), options_of(ServerConfig))
    add_flags(parser.add_argument_group("engine"), options_of(EngineConfig, exclude=("model",)))


def _add_bench(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = _add_command(commands, "bench", "Measure throughput and latencies of a model or a running server.", _bench)
    _add_model(parser)
    measured = parser.add_argument_group("measurement")
    add_flags(measured, options_of(BenchOptions, exclude=("output",)))
    measured.add_argument(
        "-o",
        "--output",
        action="append",
        metavar="FILE",
        help="write the results: .json or .png; may be repeated",
    )
    add_flags(parser.add_argument_group("engine (without --url)"), engine_options())


def _add_inspect(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = _add_command(commands, "inspect", "Show the memory that a model needs, without loading it.", _inspect)
    _add_model(parser)
    add_flags(parser.add_argument_group("view"), options_of(InspectOptions))
    add_flags(parser.add_argument_group("engine"), inspect_engine_options())


def _add_heatmap(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = _add_command(commands, "heatmap", "Draw the experts' load of a server or a saved file.", heatmap)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--url", metavar="URL", help="address of a running server, such as http://127.0.0.1:8000")
    parser.add_argument("--api-key-file", metavar="FILE", help="file whose first key is sent to the server at --url")
    source.add_argument("--load", "--trace", type=Path, metavar="FILE", help="a saved load: .json, .npz or .csv")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        action="append",
        required=True,
        metavar="FILE",
        help="what to write: .png, .svg, .html, .csv, .json or .npz; may be repeated",
    )
    parser.add_argument("--phase", choices=("prefill", "decode"), help="only the tokens of this phase")
    parser.add_argument(
        "--before", type=Path, metavar="FILE", help="an earlier saved load, drawn above the other in one picture (.png)"
    )


def _add_plan(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = _add_command(commands, "plan", "Predict speed and memory for numbers of ranks and replicas.", plan)
    _add_model(parser)
    add_flags(parser, options_of(PlanOptions, exclude=("output",)))
    parser.add_argument(
        "-o", "--output", action="append", metavar="FILE", help="write the plan: .json or .png; may be repeated"
    )


def _add_profile(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = _add_command(commands, "profile", "Measure the hardware profile of this machine, for plan.", profile)
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file with options by name; flags override it")
    add_flags(parser, options_of(ProfileOptions, exclude=("output",)))
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="what to write: .yaml or .json")


def _add_tune(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = _add_command(commands, "tune", "Find the fastest kernel tiles for a model on this machine's GPU.", _tune)
    _add_model(parser)
    add_flags(parser, [option for option in tune_options() if option.name != "model"])


def _add_calibrate(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = _add_command(
        commands, "calibrate", "Find how to use fewer experts per token, and what it costs.", calibrate
    )
    _add_model(parser)
    searched = parser.add_argument_group("calibration")
    add_flags(searched, options_of(CalibrateOptions, exclude=("output",)))
    searched.add_argument(
        "-o", "--output", action="append", metavar="FILE", help="write the calibration (.json) or a plot (.png)"
    )
    add_flags(parser.add_argument_group("engine"), engine_options())


def _add_quantize(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = _add_command(commands, "quantize", "Write a checkpoint with quantised weights.", quantize)
    _add_model(parser)
    add_flags(parser, [*quantize_options(), *options_of(QuantizeOptions, exclude=("output",))])
    parser.add_argument("-o", "--output", required=True, metavar="FOLDER", help="folder to write; it must not exist")


def _generate(namespace: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    return generate(namespace)


def _serve(namespace: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("moe_runtime").setLevel(logging.INFO)
    from moe_runtime.cli.launch import Torchrun, serve_torchrun, under_torchrun

    with user_mistakes():
        values = option_values(namespace, [*options_of(ServerConfig), *options_of(EngineConfig)])
        server_config = ServerConfig(**only_fields(ServerConfig, values))
        if under_torchrun():
            values.setdefault("ep_size", Torchrun.from_environment().world_size)
        config = EngineConfig(**only_fields(EngineConfig, values))
    if under_torchrun():
        with user_mistakes():
            return serve_torchrun(config, server_config)
    from moe_runtime.build import build_engine
    from moe_runtime.serve.server import run_server

    return run_server(lambda: build_engine(config), server_config)


def _bench(namespace: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    from moe_runtime.bench.targets import RequestError

    try:
        return bench(namespace)
    except RequestError as error:
        _complain(str(error))
        return EXIT_FAILED


def _tune(namespace: argparse.Namespace) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("moe_runtime.kernels").setLevel(logging.INFO)
    return tune(namespace)


def _inspect(namespace: argparse.Namespace) -> int:
    return inspect(namespace)
