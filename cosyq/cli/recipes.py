"""cosyq recipes: the shipped ones."""

from __future__ import annotations

import typer

from cosyq.cli.console import Json, emit, print_table

app = typer.Typer(help="The recipes that come with cosyq.", no_args_is_help=True)


@app.command("list")
def list_recipes(as_json: Json = False) -> None:
    """Name the shipped recipes and what each is for."""
    from cosyq.recipe import shipped_folder, shipped_recipes

    rows = []
    for name in shipped_recipes():
        first = (shipped_folder() / f"{name}.yaml").read_text("utf-8").splitlines()[0]
        rows.append([name, first.lstrip("# ")])
    if as_json:
        emit({"recipes": dict(rows)})
    else:
        print_table("recipes", ["name", "what for"], rows)


@app.command("show")
def show(name: str, as_json: Json = False) -> None:
    """Print a recipe, as YAML or resolved as JSON."""
    from cosyq.recipe import find_recipe, load_recipe

    path = find_recipe(name)
    if as_json:
        emit(load_recipe(path).model_dump())
    else:
        print(path.read_text("utf-8"), end="")
