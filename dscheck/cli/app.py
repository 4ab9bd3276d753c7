"""The command line's commands and exit codes: 0 all well, 1 damaged or not there, 2 wrong usage."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from dscheck.errors import ConfigError, DscheckError

if TYPE_CHECKING:
    from dscheck.storage import Storage

app = typer.Typer(
    name="dscheck",
    help="Look at checkpoints, prove that every byte is what it should be, and delete what is not needed any more.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Root = Annotated[str, typer.Argument(help="A directory or URL that a Checkpointer saves to.", show_default=False)]
Options = Annotated[
    str | None,
    typer.Option(
        "--storage-options",
        envvar="DSCHECK_STORAGE_OPTIONS",
        help="What opens the root's URL besides, as a JSON object. Other users of this host see it here, not in there.",
        show_default=False,
    ),
]
Step = Annotated[int | None, typer.Argument(help="The step; the newest committed one by default.", show_default=False)]
NAMED = "A step, such as 300; one that is abandoned with its term, such as 300-2."
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command()
def ls(root: Root, json: Json = False, options: Options = None) -> None:
    """List the steps: when each was committed, its size, its ranks and how long it took."""
    from dscheck.cli.ls import show

    show(_opened(root, options), json)


@app.command()
def inspect(
    root: Root,
    step: Step = None,
    tensor: Annotated[
        str | None, typer.Option(help="Show the fragments of this tensor: who holds and who wrote what.")
    ] = None,
    json: Json = False,
    options: Options = None,
) -> None:
    """Show the tensors of a step, or the fragments of one tensor."""
    from dscheck.cli.inspect import show

    show(_opened(root, options), step, tensor, json)


@app.command()
def verify(root: Root, step: Step = None, json: Json = False, options: Options = None) -> None:
    """Read every block of a step and list what is damaged. Exit code 1 when anything is."""
    from dscheck.cli.verify import show

    if not show(_opened(root, options), step, json):
        raise typer.Exit(1)


@app.command()
def plan(
    root: Root,
    step: Step = None,
    to: Annotated[str, typer.Option(help="Degrees of pp, dp, fsdp, ep and tp, such as tp=4,pp=2,dp=8.")] = "",
    cut: Annotated[
        list[str] | None, typer.Option(help="REGEX:AXIS=NUMBER or REGEX:AXIS=no: how tensors of a name are cut.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only tensors below this name, such as model.")] = None,
    gb_per_s: Annotated[float | None, typer.Option(help="What one rank reads a second: says how long.")] = None,
    json: Json = False,
    options: Options = None,
) -> None:
    """Say what each rank of another layout would read. Tensors are cut by the rule of docs/plan.md."""
    from dscheck.cli.plan import show

    show(_opened(root, options), step, to, cut or (), only or (), gb_per_s, json)


@app.command()
def cp(
    source: Root,
    destination: Annotated[str, typer.Argument(help="The root to copy to; it may be new.", show_default=False)],
    step: Annotated[list[int] | None, typer.Option(help="Only this step; may be given again. All by default.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Data files that are copied at a time.")] = 4,
    timeout: Annotated[float, typer.Option(min=0, help="Seconds without any progress after which to give up.")] = 600.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be copied.")] = False,
    commit: Annotated[
        str, typer.Option(help='"single-writer" for a store without put-if-absent (docs/commit.md).')
    ] = "put-if-absent",
    json: Json = False,
    options: Options = None,
    destination_options: Annotated[
        str | None, typer.Option(help="As --storage-options, of the destination.", show_default=False)
    ] = None,
) -> None:
    """Copy steps to another root, every byte verified. Run it again to do what is missing."""
    from dscheck.cli.cp import show

    roots = _opened(source, options), _opened(destination, destination_options)
    show(*roots, step, threads, timeout, dry_run, commit, json)


@app.command()
def probe(
    root: Root,
    size: Annotated[int, typer.Option(min=1, help="Megabytes of each file that is written and read.")] = 256,
    seconds: Annotated[float, typer.Option(min=0, help="About how long to measure.")] = 10.0,
    keep: Annotated[bool, typer.Option(help="Store the best settings there, for later jobs.")] = True,
    json: Json = False,
) -> None:
    """Measure the storage of a root and what dscheck reaches of it, and store the settings that suit it."""
    from dscheck.cli.probe import show

    show(root, size, seconds, keep, json)


def _opened(root: str, options: str | None) -> Storage:
    """The storage of a root. Raises ConfigError; what was given as options is not repeated."""
    from json import loads

    from dscheck.storage import open_storage

    try:
        parsed = loads(options) if options else None
    except ValueError:
        raise ConfigError("--storage-options, or DSCHECK_STORAGE_OPTIONS: expected a JSON object") from None
    return open_storage(root, parsed)


@app.command()
def gc(
    root: Root,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    abandoned: Annotated[
        bool, typer.Option("--abandoned", help="Also delete steps outside the live history that are not pinned.")
    ] = False,
    safe_age_h: Annotated[
        float, typer.Option(min=0, help="Hours after which an unfinished upload or temporary file has no writer.")
    ] = 24.0,
    json: Json = False,
    options: Options = None,
) -> None:
    """Delete what no step needs: attempts that failed, remains of deleted steps, plans that no step names."""
    from dscheck.cli.gc import show

    show(_opened(root, options), dry_run, abandoned, safe_age_h, json)


@app.command()
def rm(
    root: Root,
    steps: Annotated[list[str], typer.Argument(metavar="STEP...", help=NAMED, show_default=False)],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Also pinned steps, and the newest one.")] = False,
    json: Json = False,
    options: Options = None,
) -> None:
    """Delete steps."""
    from dscheck.cli.rm import show

    show(_opened(root, options), steps, yes, force, json)


@app.command()
def pin(
    root: Root,
    step: Annotated[str, typer.Argument(help=NAMED, show_default=False)],
    remove: Annotated[bool, typer.Option("--remove", help="Remove the pin.")] = False,
    note: Annotated[str, typer.Option(help="Why the step is kept.")] = "",
    options: Options = None,
) -> None:
    """Keep a step whatever `keep`, `gc` and `rm` say."""
    from dscheck.cli.pin import show

    show(_opened(root, options), step, remove, note)


def main() -> None:
    """The console script. Errors of dscheck are one line on stderr; anything else is a bug and shows its trace."""
    try:
        app()
    except DscheckError as error:
        print(f"dscheck: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
