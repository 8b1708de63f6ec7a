"""Values of command line options that several programs take."""

import argparse
from typing import Callable, Iterable, List, Union


def number(lowest: Union[int, float]) -> Callable[[str], Union[int, float]]:
    """An argparse type: an integer from `lowest` on or, where that is a float, a number greater than it."""

    def parse(given: str) -> Union[int, float]:
        value = type(lowest)(given)
        if isinstance(lowest, int) and value < lowest:
            raise argparse.ArgumentTypeError(f"must be {lowest} or more, not {given}")
        if isinstance(lowest, float) and not value > lowest:
            raise argparse.ArgumentTypeError(f"must be greater than {lowest:g}, not {given}")
        return value

    return parse


def split_list(items: Iterable[str]) -> List[str]:
    """["a,b", "c"] -> [a, b, c], each once."""
    return list(dict.fromkeys(name.strip() for item in items for name in item.split(",") if name.strip()))


def check_epoch(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the program where --epoch -1 is to be averaged with --avg or --use-averaged-model."""
    if args.epoch == -1 and (args.avg > 1 or args.use_averaged_model):
        parser.error(
            "--epoch -1 is best-valid.pt, which has no average: leave --avg, --use-averaged-model out"
        )
