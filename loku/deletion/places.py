"""The models and data sets that a request names: what is local is there, and a path begins at the request."""

from __future__ import annotations

from pathlib import Path

from loku.data.files import check_may_be_on_hub
from loku.deletion.yaml_values import YamlValue


def path_of(value: YamlValue, folder: Path) -> Path:
    """Return the absolute path that a text stands for.

    Args:
        value: The value of the field.
        folder: The folder where relative paths begin.

    Raises:
        ValueError: It can be no path: it is too long, or begins at the home of nobody.
    """
    try:
        path = folder / Path(value.text()).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:
        raise value.error(f"it can be no path: {error!s:.200}") from error
    return path


def model_place(value: YamlValue, folder: Path) -> str:
    """Return the absolute path of a model's folder, or its name on the hub.

    Args:
        value: The value of the field.
        folder: The folder where relative paths begin.

    Raises:
        ValueError: It looks like a path, and no folder is there.
    """
    name, path = value.text(), path_of(value, folder)
    if path.is_dir():
        return str(path)
    if path.exists():
        raise value.error(f"{name} is a file; name the folder of the model")
    in_a_folder = "/" in name and path.parent.is_dir()
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or in_a_folder:
        raise value.error(f"there is no folder {path}{_where(name, folder)}")
    _refuse_elsewhere(value, name, folder)
    return name


def folder_place(value: YamlValue, folder: Path, wanted: str) -> str:
    """Return the absolute path of a folder that has a file.

    Args:
        value: The value of the field.
        folder: The folder where relative paths begin.
        wanted: The name of the file.

    Raises:
        ValueError: There is no such folder.
    """
    name, path = value.text(), path_of(value, folder)
    if not path.is_dir():
        raise value.error(f"there is no folder {path}{_where(name, folder)}")
    if not (path / wanted).is_file():
        raise value.error(f"the folder {path} has no {wanted}")
    return str(path)


def data_place(value: YamlValue, folder: Path) -> str:
    """Return the absolute path of a data set, or its name on the hub.

    Args:
        value: The value of the field.
        folder: The folder where relative paths begin.

    Raises:
        ValueError: It looks like a path, and nothing is there.
    """
    name, path = value.text(), path_of(value, folder)
    if path.exists():
        return str(path)
    try:
        check_may_be_on_hub(name, folder)
    except FileNotFoundError as error:
        raise value.error(f"{error}{_where(name, folder)}") from None
    _refuse_elsewhere(value, name.split(":")[0], folder)
    return name


def _where(name: str, folder: Path) -> str:
    relative = not Path(name).expanduser().is_absolute()
    return f"; a relative path begins at {folder}" if relative else ""


def _refuse_elsewhere(value: YamlValue, name: str, folder: Path) -> None:
    """Refuse a name that would mean a file of the current directory later, when it is read."""
    if Path(name).exists():
        raise value.error(
            f"{name} is in the current directory and not in {folder}, where relative paths begin; write "
            f"{Path(name).absolute()}"
        )
