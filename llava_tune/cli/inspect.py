"""llava-tune inspect DIR|CFG"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llava_tune.cli.options import FlatRun, parse
from llava_tune.errors import InputError

if TYPE_CHECKING:
    from llava_tune.data.review.samples import Samples

DESCRIPTION = (
    "Show samples as the model will see them: supervised text in colour, images, token counts, where they are cut."
)


@dataclass
class StoreOptions:
    rows: int | None = None
    """Samples to show, drawn at random; unset: 5, or 500 with --html."""
    html: str | None = None
    """Write a page to this file instead, with thumbnails, histograms, filter and paging."""
    image_folder: str | None = None
    """Where the images of a prepared folder are."""
    tokenizer: str | None = None
    """The tokenizer of a prepared folder; unset: where it was when the folder was made."""
    seed: int = 0
    """Of the draw."""


@dataclass
class RunOptions(StoreOptions):
    run: FlatRun = None  # type: ignore[assignment]


def main(arguments: list[str]) -> None:
    """Show samples in the terminal, or write the page."""
    target = arguments[0] if arguments else ""
    if target and Path(target).is_dir():
        import tyro

        options = tyro.cli(
            StoreOptions, args=arguments[1:], prog=f"llava-tune inspect {target}", description=DESCRIPTION
        )
        samples = _of_store(Path(target), options)
    else:
        if target and not target.startswith("-") and not target.endswith(".py") and "/" in target:
            raise InputError(f"{target}: neither a prepared folder nor a config file")
        _, run_options = parse(RunOptions, arguments, "inspect", DESCRIPTION)
        options = run_options
        from llava_tune.data.review.samples import samples_of_run

        samples = samples_of_run(run_options.run, _rows(options), options.seed)
    if options.html:
        from llava_tune.data.review.page import write_page

        write_page(samples, Path(options.html))
        print(f"{len(samples.chosen):,} of {samples.total:,} samples: {options.html}")
    else:
        _print(samples)


def _rows(options: StoreOptions) -> int:
    return options.rows if options.rows is not None else 500 if options.html else 5


def _of_store(folder: Path, options: StoreOptions) -> Samples:
    from llava_tune.data.review.samples import samples_of_store

    images = Path(options.image_folder) if options.image_folder else None
    return samples_of_store(folder, _rows(options), tokenizer=options.tokenizer, image_folder=images, seed=options.seed)


def _print(samples: Samples) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for sample in samples.chosen:
        cut = f", cut to max_length {samples.max_length}" if sample.cut else ""
        console.rule(Text(f"{sample.id}  row {sample.row:,} of {sample.data_set}", style="bold"), align="left")
        console.print(f"{sample.tokens:,} tokens, {sample.supervised:,} supervised{cut}", style="dim")
        for k, picture in enumerate(sample.pictures):
            size = f"{picture.size[0]} x {picture.size[1]}" if picture.size else picture.problem
            console.print(Text(f"image {k + 1}: {picture.reference}, {size}", style="dim" if picture.size else "red"))
        text = Text()
        for piece in sample.pieces:
            if piece.image is not None:
                text.append(f"[image {piece.image + 1}: {samples.image_tokens} tokens]", style="magenta")
            else:
                text.append(piece.text, style="green" if piece.supervised else "dim" if piece.control else "")
        if sample.cut:
            text.append(" ✂", style="bold red")
        console.print(text)
    if samples.partial:
        console.print("of the first records of each data set (a prepared folder shows all):", style="dim")
    for name, sums in samples.sums.items():
        share = sums["supervised"] / max(sums["tokens"], 1)
        lengths = samples.lengths[name]
        longest = int(lengths.max()) if len(lengths) else 0
        console.print(
            f"{name}: {sums['samples']:,} samples, {sums['images']:,} images, {sums['tokens']:,} tokens ({share:.1%} supervised), "
            f"{sums['tokens'] / max(sums['samples'], 1):,.0f} a sample, at most {longest:,}"
        )
