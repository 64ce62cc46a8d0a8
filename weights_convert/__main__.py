"""The command line of the converter: parse, call, print."""

import argparse
import sys
from pathlib import Path

from minidit.errors import Parser, printable

EPILOG = """\
SOURCE is a downloaded release (the original files or the diffusers layout, sharded or not) or one file of it.
What each file holds is recognised from the names and shapes of its tensors. OUT is a model folder:

  python -m weights_convert Wan2.1-T2V-1.3B wan-1.3b --dtype bf16
  python -m minidit generate "a red fox in the snow" --model wan-1.3b

--config FILE is JSON merged over what was found, for what no file says:

  {"components": {"transformer": {"config": {"text_len": 32}}},
   "schedule": {"shift": 3.0}, "defaults": {"width": 64, "height": 64}}
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        "python -m weights_convert",
        description="Turn a downloaded checkpoint into a minidit model folder.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source", metavar="SOURCE", nargs="?", type=Path, help="a downloaded folder, or one file"
    )
    parser.add_argument("out", metavar="OUT", nargs="?", type=Path, help="the model folder to make")
    parser.add_argument(
        "--dtype", choices=("keep", "bf16", "fp16", "fp32"), default="keep", help="default: keep"
    )
    parser.add_argument(
        "--config", metavar="FILE", type=Path, help="JSON with what the checkpoint does not say"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the model folder OUT, its profiles too"
    )
    parser.add_argument(
        "--check-layout",
        metavar="FILE",
        nargs="+",
        type=Path,
        help="compare recorded layouts (JSON, name: shape) with the name tables; no weights needed",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    if args.check_layout and (args.source or args.config or args.overwrite):
        parser.error("--check-layout takes layout files and nothing else")
    if not args.check_layout and args.out is None:
        parser.error("SOURCE and OUT are needed (or --check-layout FILE...)")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the converter; returns the exit status: 1 for a layout that does not fit, 2 for an error."""
    args = parse(argv)
    try:
        from weights_convert import convert, layouts  # here: torch takes seconds to import, --help should not

        if args.check_layout:
            return layouts.check(args.check_layout)
        convert.convert(args.source, args.out, dtype=args.dtype, config=args.config, overwrite=args.overwrite)
        return 0
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, RuntimeError, MemoryError) as e:
        if args.debug:
            raise
        text = " ".join(str(e).split()) or type(e).__name__
        print(f"weights_convert: {printable(text)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
