"""`make server`: MLflow's tracking server with PostgreSQL. No command of `qexp`, since nothing is measured."""

from pathlib import Path
from typing import Annotated

import typer

from .ending import finish
from .options import given_or_none
from .program import run_app

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def server(
    more: typer.Context,
    port: Annotated[int, typer.Option(help="of 127.0.0.1", min=1, max=65535)] = 5000,
    backend_store_uri: Annotated[
        str, typer.Option(help="database that is there; auto: a PostgreSQL of its own", envvar="BACKEND_STORE_URI")
    ] = "auto",
    postgres_dir: Annotated[
        Path, typer.Option(help="folder of that PostgreSQL, made if need be", envvar="POSTGRES_DIR")
    ] = Path("postgres"),
    artifacts_destination: Annotated[
        str, typer.Option(help="folder or s3:// address of the artifacts", envvar="ARTIFACTS_DESTINATION")
    ] = "mlartifacts",
) -> None:
    """Serve MLflow on 127.0.0.1 until Ctrl-C. Other options go to `mlflow server` as they are."""
    from qexp.server import serve

    finish(lambda: serve(port, given_or_none(backend_store_uri), postgres_dir, artifacts_destination, more.args))


if __name__ == "__main__":
    run_app(app)
