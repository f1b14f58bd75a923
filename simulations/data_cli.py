"""``consilium data``: split a data set among sites, and look at one before anything is trained."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from simulations.look import CountTokens, Look

app = typer.Typer(help="Data: split them among sites, and look at them. For their owner alone.", no_args_is_help=True)
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class By(StrEnum):
    """``data.partition``."""

    IID = "iid"
    DIRICHLET = "dirichlet"
    PATHOLOGICAL = "pathological"
    LINEAR = "linear"
    SQUARE = "square"
    EXPONENTIAL = "exponential"


class Kind(StrEnum):
    """Formats of the files."""

    CSV = "csv"
    JSONL = "jsonl"
    PARQUET = "parquet"


PARTITION_HELP = "\n\n".join(
    (
        "Split a data set among sites: ordinary files, one folder a site.",
        "Each DIR/SITE can be the path of a data set in a hospital's site.toml. DIR/partition.json says how the rows "
        "were split. A run with the same data settings (sites, partition, alpha, classes_per_site, min_size), the same "
        "run.seed and the same training file has the same sites.",
        "The files hold raw rows: they are for the owner of the data alone.",
        "Examples:",
        "  consilium data partition --input notes.csv --out parts --sites 10",
        "  consilium data partition --input DATA --out parts --sites 10 --by dirichlet --alpha 0.3 --label label_name",
        "  consilium data partition --input DATA --out parts --sites 20 --by pathological --classes-per-site 2",
        "  consilium data partition --input DATA --out parts --sites 5 --by exponential --unit patient_id",
        "  consilium data partition --input DATA --out parts --column hospital --format jsonl",
    )
)


@app.command("partition", help=PARTITION_HELP)
def partition_command(
    source: Annotated[
        Path, typer.Option("--input", help="A file (csv, jsonl, parquet), or a folder with one file per split.")
    ],
    out: Annotated[Path, typer.Option("--out", help="New folder for the sites' folders.")],
    sites: Annotated[int | None, typer.Option("--sites", help="Number of sites.")] = None,
    by: Annotated[
        By | None,
        typer.Option("--by", help="How: at random (iid), by label, or in parts that grow as k, k² or eᵏ. Default: iid"),
    ] = None,
    column: Annotated[
        str | None, typer.Option("--column", help="Instead of --sites: the column that names each row's site.")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option("--alpha", help="dirichlet: small for labels far apart, large for iid.")
    ] = None,
    classes_per_site: Annotated[
        int | None, typer.Option("--classes-per-site", help="pathological: labels of each site.")
    ] = None,
    min_size: Annotated[
        int | None, typer.Option("--min-size", help="Rows (with --unit: units) of each of the --sites at least.")
    ] = None,
    label: Annotated[str | None, typer.Option("--label", help="The column of labels. Default: label")] = None,
    unit: Annotated[
        str | None, typer.Option("--unit", help="The column of privacy units (patients): each goes to one site whole.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="As run.seed.")] = 0,
    split: Annotated[str, typer.Option("--split", help="Which file of a folder; also the name of the new ones.")] = (
        "train"
    ),
    kind: Annotated[Kind | None, typer.Option("--format", help="Of the new files. Default: the input's own")] = None,
    as_json: AsJson = False,
) -> None:
    """Splits, writes and prints the sizes."""
    from common.sections import DataSection, Section
    from common.toml_settings import validate
    from simulations.data_tables import show_partition
    from simulations.site_files import write_sites

    class Settings(Section):
        """``[data]`` alone, so that messages name settings as a run's do."""

        data: DataSection

    given = {
        "site_column": column,
        "sites": sites,
        "partition": by and by.value,
        "alpha": alpha,
        "classes_per_site": classes_per_site,
        "min_size": min_size,
        "privacy_unit": unit,
    }
    tables = {"data": {name: value for name, value in given.items() if value is not None}}
    data = validate(Settings, tables, "consilium data partition").data
    record = write_sites(source, split, data, seed, label, kind and kind.value, out)
    if as_json:
        _print_json(record)
    else:
        show_partition(record, out)


LOOK_HELP = "\n\n".join(
    (
        "Look at a data set: labels by site, duplicates, leaks between splits, missing values, lengths.",
        "PATH is a file, a folder with one file per split (train, validation, test), or a folder with such a folder "
        "for each site, as 'consilium data partition' writes it. Texts that differ in case and blanks alone count as "
        "the same.",
        "This looks at raw rows, exactly and without any privacy. It is for the owner of the data alone: nothing of it "
        "leaves this machine, and its figures and pictures are not for passing on.",
        "Examples:",
        "  consilium data look notes.csv",
        "  consilium data look DATA --site-column hospital --label label_name --unit patient_id --out looked",
        "  consilium data look parts --model minilm",
        "  consilium data look parts --json > looked.json",
    )
)


@app.command("look", help=LOOK_HELP)
def look_command(
    path: Annotated[Path, typer.Argument(help="A file, a folder of splits, or a folder of sites.")],
    site_column: Annotated[str | None, typer.Option("--site-column", help="Names each row's site.")] = None,
    text: Annotated[str, typer.Option("--text", help="The column of texts.")] = "text",
    label: Annotated[str | None, typer.Option("--label", help="The column of labels. Default: label, if any")] = None,
    unit: Annotated[str | None, typer.Option("--unit", help="The column of privacy units (patients).")] = None,
    split: Annotated[str, typer.Option("--split", help="Which split the figures by site are of.")] = "train",
    model: Annotated[
        str | None, typer.Option("--model", help="Count tokens too: minilm, a model's folder or a hub id.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for look.png and look.json.")] = None,
    as_json: AsJson = False,
) -> None:
    """Looks, draws and prints."""
    from simulations.data_tables import show_look
    from simulations.look import Columns, look

    found = look(path, Columns(text, label, site_column, unit), split, _token_counter(model) if model else None)
    if out is not None:
        _save(found, out)
    if as_json:
        _print_json(found.as_json())
    else:
        show_look(found, out)


def _token_counter(model: str) -> CountTokens:
    """Counts with the model's own tokenizer, special tokens included, nothing cut.

    Raises:
        ModelError: there is no such model, or it has no tokenizer.
    """
    from transformers import AutoTokenizer

    from common.errors import ModelError
    from common.model import locate
    from common.tasks.token_ids import token_ids

    try:
        folder = locate(model)
    except ModelError as error:  # which names the setting of a run
        raise ModelError(f"--model {model}: {str(error).partition(': ')[2]}") from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever is wrong with the files: the library raises almost anything
        raise ModelError(f"--model {model}: its tokenizer cannot be loaded ({type(error).__name__})") from None
    return lambda texts: [len(ids) for ids in token_ids(texts, tokenizer)]


def _save(found: Look, out: Path) -> None:
    from common.errors import OutputError
    from simulations.look_chart import draw

    try:
        out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(found.as_json(), indent=2, ensure_ascii=False) + "\n"
        (out / "look.json").write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"--out {out}: cannot be written ({error.strerror}); choose another folder") from None
    draw(found, out / "look.png")


def _print_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=2)  # escaped: exact, whatever a terminal can show
    sys.stdout.write("\n")
