"""The command line: `fedpipe run STUDY` in one process, and every step, whose options are its `run`'s own signature."""

import argparse
import importlib
import inspect
import sys
import types
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin

from fedpipe.errors import FedpipeError
from fedpipe.failures import where
from fedpipe.paths import KEEP
from fedpipe.steps import STEPS


def _step_options(parser: argparse.ArgumentParser, run: Any) -> None:
    for name, p in inspect.signature(run).parameters.items():
        kind, several = p.annotation, get_origin(p.annotation) is list
        if get_origin(kind) in (list, types.UnionType):
            kind = get_args(kind)[0]
        needed = p.default is inspect.Parameter.empty
        parser.add_argument(f"--{name.replace('_', '-')}", dest=name, type=kind, required=needed,
                            nargs="*" if several else None, default=None if needed else p.default)  # fmt: skip


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise FedpipeError(f"{message}; see {self.prog} --help")


def _study(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The options that say which study."""
    parser.add_argument("study", type=Path)
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="key=value", help="local.epochs=2 ...")
    parser.add_argument(
        "--methods", type=lambda t: t.split(","), default=None, metavar="a,b", help="instead of the study's"
    )
    parser.add_argument("--out", type=Path, default=None, help="results folder; default results/<name>")
    return parser


def _parser(argv: list[str]) -> argparse.ArgumentParser:
    parser = _Parser(prog="fedpipe", description=__doc__)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True)
    study = _study(commands.add_parser("run", help="run a study in this process"))
    study.add_argument("--segment", type=int, default=20, help="rounds between files (changes no bit)")
    study.add_argument("--keep", choices=KEEP, default=KEEP[0], help="states that stay on disk: the last one, "
                       "those of every segment, or all")  # fmt: skip
    _study(commands.add_parser("explain", help="show who would train what in how many bytes; train nothing"))
    digest = commands.add_parser("digest", help="one digest over all results of a study's folder")
    digest.add_argument("out", type=Path)
    use = commands.add_parser("du", help="bytes of a study's folder, by run and kind of file")
    use.add_argument("out", type=Path)
    gc = commands.add_parser("gc", help="list what nothing in a study's folder needs any more; --yes removes it")
    gc.add_argument("out", type=Path)
    gc.add_argument("--yes", action="store_true")
    commands.add_parser("schema", help="print the JSON schema of study files")
    show = commands.add_parser("show", help="print the final table")
    show.add_argument("out", type=Path)
    for name in [n for n in argv[:1] if n in STEPS] or STEPS:
        # only the chosen step is imported: torch costs seconds that `fedpipe table` need not pay
        step = commands.add_parser(name, help=f"step {name}: a function of files")
        if name in argv:
            _step_options(step, importlib.import_module(f"fedpipe.steps.{name}").run)
    return parser


def _dispatch(args: argparse.Namespace) -> None:
    options = {k: v for k, v in vars(args).items() if k not in ("command", "debug")}
    if args.command in STEPS:
        importlib.import_module(f"fedpipe.steps.{args.command}").run(**options)
    elif args.command == "run":
        from fedpipe.local import run_study

        run_study(args.study, args.set, args.methods, args.out, args.segment, args.keep)
    elif args.command == "explain":
        from fedpipe.explain import explain

        explain(args.study, args.set, args.methods, args.out)
    elif args.command == "digest":
        from fedpipe.fingerprint import fingerprint

        print(fingerprint(args.out))
    elif args.command in ("du", "gc"):
        from fedpipe import disk

        disk.show(**options) if args.command == "du" else disk.collect(**options)
    elif args.command == "schema":
        from fedpipe.schema import schema_text

        print(schema_text(), end="")
    else:
        from fedpipe.report.terminal import print_table

        print_table(args.out / "table.parquet")


def main(argv: list[str] | None = None) -> int:
    """Run a command. Every error is one line on standard error: exit status 2 for bad input, 1 for a fault in code."""
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    argv = [a for a in argv if a != "--debug"]
    try:
        _dispatch(_parser(argv).parse_args(argv))
    except FedpipeError as e:
        if debug:
            raise
        print(f"fedpipe: error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fedpipe: interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    except OSError as e:
        if debug:
            raise
        print(f"fedpipe: error: {e.filename or 'file system'}: {e.strerror or e}", file=sys.stderr)
        return 2
    except Exception as e:  # in a user's own file, or ours: where it happened is what can be said in one line
        if debug:
            raise
        text = " ".join(str(e).split())
        print(f"fedpipe: error: {where(e)}: {type(e).__name__}: {text} (--debug shows all)", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
