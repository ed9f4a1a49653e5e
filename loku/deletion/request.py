"""A deletion request: the file that says what is asked, and how it is judged."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loku.deletion.places import data_place, folder_place, model_place, path_of
from loku.deletion.template import write_template
from loku.deletion.texts import expression
from loku.deletion.yaml_values import YamlValue, read_yaml_values

if TYPE_CHECKING:
    from loku.data import QuestionTemplate

__all__ = [
    "ATTACKS",
    "HOLDOUT",
    "TARGETS",
    "VERSION",
    "Request",
    "RetainSource",
    "RowSelection",
    "read_forget",
    "read_request",
    "request_facts",
    "write_template",
]

VERSION = 1  # of the schema of a request
ATTACKS = ("extract", "mia", "relearn", "quantise")
TARGETS = ("peft", "vllm", "gguf", "merged")
HOLDOUT = "holdout"  # the limit of a measure: that of the hold-out set under the original model
# The measures of the forget rows that a limit bounds from above. Perplexity is none: it grows by forgetting.
MEASURES = ("probability", "memorization_accuracy", "extraction_strength", "extracted")
_LIKELIHOOD = re.compile(r"extraction_likelihood_([1-9][0-9]{0,3})")

# The fields of a request file. docs/deletion.md has a table of them.
FIELDS = (
    *("version", "reference", "requester", "model", "trained_adapter", "forget", "retain", "holdout"),
    *("control", "limits", "utility_floor", "minutes", "near_duplicates", "training", "attacks", "serving"),
    "ledger",
)
SELECTION_FIELDS = ("data", "ids", "id_column", "contains", "matches", "columns")
RETAIN_FIELDS = (*SELECTION_FIELDS, "corpus", "neighbours", "sampled")
MODEL_FIELDS = ("name", "revision", "tokenizer", "arguments")
# The fields of loku.UnlearnConfig that ``loku.deletion.training`` sets itself.
OWN_FIELDS = (
    *("output_dir", "resume_from_checkpoint", "model_init_kwargs", "disable_tqdm"),
    *("eval_strategy", "eval_delay", "eval_on_start", "eval_limits", "eval_floors", "prediction_loss_only"),
    *("save_strategy", "save_steps", "save_total_limit", "save_only_model"),
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
)
# The fields that a request does not set, with the reason.
_STAGES, _SECRET = "the procedure sets it", "a secret is no part of a request, which the record keeps"
NO_TRAINING = {
    **dict.fromkeys(OWN_FIELDS, _STAGES),
    "output_dir": "the procedure keeps its checkpoints in its own folder",
    "resume_from_checkpoint": "the procedure goes on by itself when it is started again",
    "model_init_kwargs": "write the arguments of from_pretrained to model.arguments",
    **dict.fromkeys(("eval_steps", "do_eval", "do_train", "do_predict", "save_on_each_node"), _STAGES),
    **dict.fromkeys(("push_to_hub", "hub_model_id", "hub_strategy"), "upload the result after it is judged"),
    "hub_token": _SECRET,
}


@dataclass(frozen=True)
class RowSelection:
    """Rows of a data set: all, or those that a query finds.

    Attributes:
        data: A file, a folder or a hub name, as for ``loku.data.read_rows``. A path is absolute.
        ids: The values of ``id_column`` of the rows; empty for no such condition.
        id_column: The column of the ids.
        contains: A string that a column of the row must contain, in any case; None for no such condition.
        matches: A regular expression that must be found in a column of the row; None for no such condition.
        columns: The columns that are searched; empty for all columns of text.
    """

    data: str
    ids: tuple[str | int, ...] = ()
    id_column: str = "id"
    contains: str | None = None
    matches: str | None = None
    columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class RetainSource:
    """Where the rows to keep come from. The parts add up.

    Attributes:
        given: The user's own retain rows; None for none.
        corpus: Rows of which the neighbours of the forget rows are taken; None for none.
        neighbours: The number of rows that are taken from the corpus, at most.
        sampled: The number of texts that the model itself writes, with the entities of the forget rows
            masked. They stand for its general ability.
    """

    given: RowSelection | None = None
    corpus: RowSelection | None = None
    neighbours: int = 200
    sampled: int = 32


@dataclass(frozen=True)
class Request:
    """A validated request; ``read_request`` makes it of a file.

    Attributes:
        path: The file of the request.
        model: A path or hub name. A path is absolute.
        forget: The rows to forget.
        retain: Where the rows to keep come from.
        holdout: Texts of the same kind that the model was never trained on; None for none.
        revision: The revision of a model on the hub; None for the newest.
        tokenizer: A path or hub name; None for the model's own.
        model_arguments: Arguments of ``from_pretrained``.
        trained_adapter: The folder of an adapter of the user's, if the rows trained it alone; else None.
        control: The path or hub name of a model that was retrained without the rows; None for none.
        limits: The greatest value of each measure of the forget rows, ``HOLDOUT`` or a number.
        utility_floor: The share of the utility of the original model that must be kept, in (0, 1].
        minutes: The greatest wall-clock time of training, in minutes; None for no limit.
        near_duplicate_similarity: The Jaccard similarity from which two rows are near duplicates, in (0, 1].
        include_near_duplicates: Whether the near duplicates are forgotten, too.
        training: Fields of ``loku.UnlearnConfig``.
        attacks: The attacks on the result, of ``ATTACKS``.
        target: What serves the result, of ``TARGETS``.
        rank: The rank of the served adapter; None for the exact one.
        ledger: The folder of the ledger, absolute; None for none.
        reference: The reference number of the request; "" for none.
        requester: Who asks; "" if it is not said.
        lines: The line of each field of the file, by its path such as "retain.corpus.data".
    """

    path: Path
    model: str
    forget: RowSelection
    retain: RetainSource = field(default_factory=RetainSource)
    holdout: RowSelection | None = None
    revision: str | None = None
    tokenizer: str | None = None
    model_arguments: Mapping[str, Any] = field(default_factory=dict)
    trained_adapter: str | None = None
    control: str | None = None
    limits: Mapping[str, float | str] = field(default_factory=dict)
    utility_floor: float = 0.9
    minutes: float | None = None
    near_duplicate_similarity: float = 0.7
    include_near_duplicates: bool = False
    training: Mapping[str, Any] = field(default_factory=dict)
    attacks: tuple[str, ...] = ATTACKS
    target: str = "peft"
    rank: int | None = None
    ledger: str | None = None
    reference: str = ""
    requester: str = ""
    lines: Mapping[str, int] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"the rank of the served adapter must be at least 1, got {self.rank}")
        if self.rank is not None and self.target == "merged":
            raise ValueError("a merged model has no adapter, and so no rank: leave the rank out")

    @property
    def template(self) -> QuestionTemplate:
        """The template of questions and answers, in training, in all measures and in the attacks."""
        from loku.data.question_templates import QuestionTemplate  # the package imports torch

        return QuestionTemplate(*map(self.training.get, ("question_template", "answer_template")))


def read_request(path: str | os.PathLike) -> Request:
    """Read the file of a request, and check it.

    A path in it that is relative begins at the folder of the file. What is named as a path must be there.

    Args:
        path: The YAML file; docs/deletion.md has its fields.

    Raises:
        ValueError: The file is missing or no YAML, or a field is unknown, missing or wrong. The message names
            the file, the line and what to do.
        OSError: The file cannot be read.
    """
    path = Path(path).expanduser().absolute()
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name the file of the request, such as {path / 'request.yaml'}")
    root = read_yaml_values(path)
    given = root.fields(FIELDS)
    _check_version(given.get("version"))
    for name in ("model", "forget"):
        if name not in given:
            raise ValueError(f"{path} has no {name}; `loku forget --init DIR` writes an example")
    folder = path.parent
    settings: dict[str, Any] = {"path": path, **_model(given["model"], folder)}
    settings["forget"] = _selection(given["forget"], folder)
    for name, read in _READERS.items():
        value = given.get(name)
        if value is not None and not (value.is_null and name in _MAY_BE_NULL):
            settings.update(read(value, folder))
    request = Request(**settings, lines=dict(_lines(root)))
    return _consistent(request, given)


def read_forget(path: str | os.PathLike, folder: str | os.PathLike) -> RowSelection:
    """Read which rows the copy of a request forgets. Its other fields are not read.

    Args:
        path: The copy.
        folder: The folder of the original, where relative paths begin.

    Raises:
        ValueError: The file is missing or no YAML, has no such field, or its data is not there any more.
        OSError: The file cannot be read.
    """
    given = read_yaml_values(Path(path)).fields(FIELDS)
    if "forget" not in given:
        raise ValueError(f"{path} has no forget")
    return _selection(given["forget"], Path(folder))


def request_facts(request: Request) -> dict[str, Any]:
    """Return the fields of a request for its record.

    The conditions of a query may hold what is to be forgotten, so the facts say which conditions there are,
    and not their texts.

    Args:
        request: The request.

    Returns:
        The fields by their names, as JSON has them, the ``version`` of the schema, and the ``digest`` of all,
        the SHA-256 in which the texts of the conditions count.
    """
    facts = dataclasses.asdict(dataclasses.replace(request, lines={}))
    del facts["lines"]
    facts["path"] = str(request.path)
    facts["attacks"] = list(request.attacks)
    facts["version"] = VERSION
    whole = json.dumps(facts, sort_keys=True)  # with the texts of the queries
    facts["digest"] = hashlib.sha256(whole.encode("utf-8", "surrogatepass")).hexdigest()
    facts["forget"] = _selection_facts(request.forget)
    facts["holdout"] = _selection_facts(request.holdout)
    for name in ("given", "corpus"):
        facts["retain"][name] = _selection_facts(getattr(request.retain, name))
    return facts


def _selection_facts(selection: RowSelection | None) -> dict[str, Any] | None:
    if selection is None:
        return None
    return {
        "data": selection.data,
        "ids": len(selection.ids),
        "id_column": selection.id_column,
        "contains": selection.contains is not None,
        "matches": selection.matches is not None,
        "columns": list(selection.columns),
    }


def _lines(value: YamlValue) -> Iterator[tuple[str, int]]:
    if value.is_mapping:
        for name, inner in value.fields().items():
            yield inner.name, inner.line
            if name not in ("training", "arguments"):
                yield from _lines(inner)


def _check_version(value: YamlValue | None) -> None:
    if value is not None and value.text() != str(VERSION):
        raise value.error(f"is {value.text()[:80]!r}; this loku reads version {VERSION} of a request")


def _model(value: YamlValue, folder: Path) -> dict[str, Any]:
    if not value.is_mapping:
        return {"model": model_place(value, folder)}
    given = value.fields(MODEL_FIELDS)
    if "name" not in given:
        raise value.error("has no name; write the path or the hub name of the model")
    found: dict[str, Any] = {"model": model_place(given["name"], folder)}
    if (revision := given.get("revision")) and not revision.is_null:
        if Path(found["model"]).is_absolute():
            raise revision.error("a model in a folder has no revision; take the line out")
        found["revision"] = revision.text()
    if (tokenizer := given.get("tokenizer")) and not tokenizer.is_null:
        found["tokenizer"] = model_place(tokenizer, folder)
    if arguments := given.get("arguments"):
        for name, inner in arguments.fields().items():
            if name in ("token", "use_auth_token"):
                raise inner.error(f"{_SECRET}; log in with `hf auth login`")
            if name == "revision":
                raise inner.error("write it to model.revision")
        found["model_arguments"] = arguments.plain()
    return found


def _selection(value: YamlValue, folder: Path) -> RowSelection:
    if not value.is_mapping:
        return RowSelection(data_place(value, folder))
    return _selection_of(value, value.fields(SELECTION_FIELDS), folder)


def _selection_of(value: YamlValue, given: Mapping[str, YamlValue], folder: Path) -> RowSelection:
    if "data" not in given:
        raise value.error("has no data; name the file, the folder or the hub name of its rows")
    found: dict[str, Any] = {"data": data_place(given["data"], folder)}
    for name, read in (
        ("ids", YamlValue.texts),
        ("id_column", YamlValue.text),
        ("contains", _searched),
        ("matches", _expression),
        ("columns", YamlValue.texts),
    ):
        if name in given:
            found[name] = read(given[name])
    if "id_column" in found and "ids" not in found:
        raise given["id_column"].error("there are no ids to look for; give ids, or take the line out")
    if "columns" in found and not found.keys() & {"contains", "matches"}:
        raise given["columns"].error(
            "they are searched by contains or matches; give one, or take the line out"
        )
    return RowSelection(**found)


def _searched(value: YamlValue) -> str:
    if value.is_null:  # a name, or no condition
        raise value.error(f"write '{value.node.value}' in quotes for the word, or take the line out")
    return value.text()


def _expression(value: YamlValue) -> str:
    text = _searched(value)
    try:
        expression(text)
    except ValueError as error:
        raise value.error(error) from error
    return text


def _retain(value: YamlValue, folder: Path) -> dict[str, Any]:
    if not value.is_mapping:
        return {"retain": RetainSource(given=_selection(value, folder))}
    given = value.fields(RETAIN_FIELDS)
    found: dict[str, Any] = {}
    if "data" in given:
        own = {name: inner for name, inner in given.items() if name in SELECTION_FIELDS}
        found["given"] = _selection_of(value, own, folder)
    for name in SELECTION_FIELDS:
        if name in given and "given" not in found:
            raise given[name].error("there is no data that it selects from; add data to retain")
    if (corpus := given.get("corpus")) and not corpus.is_null:
        found["corpus"] = _selection(corpus, folder)
    if "neighbours" in given:
        if "corpus" not in found:
            raise given["neighbours"].error("they are taken from a corpus; add corpus to retain")
        found["neighbours"] = given["neighbours"].whole(1)
    if "sampled" in given:
        found["sampled"] = given["sampled"].whole(0)
    source = RetainSource(**found)
    if source.given is None and source.corpus is None and source.sampled == 0:
        raise value.error("there is nothing to keep: give data, a corpus, or sampled > 0")
    return {"retain": source}


def _limits(value: YamlValue, folder: Path) -> dict[str, Any]:
    given = value.fields()
    if "perplexity" in given:
        problem = "it grows by forgetting, so it has no greatest value; bound probability"
        raise given["perplexity"].error(problem)
    likelihoods = [name for name in given if _LIKELIHOOD.fullmatch(name)]
    limits: dict[str, float | str] = {}
    for name, inner in value.fields((*MEASURES, *(likelihoods or ("extraction_likelihood_10",)))).items():
        limits[name] = HOLDOUT if inner.text() == HOLDOUT else inner.number(least=0, most=1)
    if len(likelihoods) > 1:
        raise value.error(f"has {' and '.join(likelihoods)}; one run measures one of them")
    return {"limits": limits}


def _near_duplicates(value: YamlValue, folder: Path) -> dict[str, Any]:
    given = value.fields(("similarity", "include"))
    found: dict[str, Any] = {}
    if "similarity" in given:
        found["near_duplicate_similarity"] = given["similarity"].number(above=0, most=1)
    if "include" in given:
        found["include_near_duplicates"] = given["include"].boolean()
    return found


def _training(value: YamlValue, folder: Path) -> dict[str, Any]:
    import argparse

    from loku.commands.settings import read_fields  # the config imports torch and transformers
    from loku.config import UnlearnConfig

    fields = read_fields(UnlearnConfig)
    given = value.fields()
    for name, inner in given.items():
        if name in NO_TRAINING:
            raise inner.error(f"a request does not set it: {NO_TRAINING[name]}")
    value.fields([name for name in fields if name not in NO_TRAINING])
    settings = {}
    for name, inner in given.items():
        try:
            settings[name] = fields[name].from_yaml(inner.plain())
        except argparse.ArgumentTypeError as error:
            raise inner.error(error) from None
    try:
        UnlearnConfig(output_dir="unused", **settings)
    except (ValueError, TypeError, ImportError) as error:
        found = {name: re.search(rf"\b{name}\b", str(error)) for name in given}
        places = {name: match.start() for name, match in found.items() if match is not None}
        first = min(places, key=places.__getitem__, default=None)  # the field that the error is about
        raise (value if first is None else given[first]).error(error) from error
    return {"training": settings}


def _attacks(value: YamlValue, folder: Path) -> dict[str, Any]:
    if value.is_list and not value.node.value:
        return {"attacks": ()}
    value.texts()  # refuses one that is there twice
    chosen = {item.choice(ATTACKS) for item in value.items()}
    return {"attacks": tuple(name for name in ATTACKS if name in chosen)}


def _serving(value: YamlValue, folder: Path) -> dict[str, Any]:
    if not value.is_mapping:
        return {"target": value.choice(TARGETS)}
    given = value.fields(("target", "rank"))
    found: dict[str, Any] = {}
    if "target" in given:
        found["target"] = given["target"].choice(TARGETS)
    if (rank := given.get("rank")) and not rank.is_null:
        found["rank"] = rank.whole(1)
        if found.get("target") == "merged":
            raise rank.error("a merged model has no adapter, and so no rank; take the line out")
    return found


def _ledger(value: YamlValue, folder: Path) -> dict[str, Any]:
    path = path_of(value, folder)
    if path.exists() and not path.is_dir():
        raise value.error(f"{path} is a file; name the folder of the ledger")
    return {"ledger": str(path)}


# How the optional fields of the file become fields of the request.
_READERS = {
    "reference": lambda value, folder: {"reference": value.text()},
    "requester": lambda value, folder: {"requester": value.text()},
    "trained_adapter": lambda value, folder: {
        "trained_adapter": folder_place(value, folder, "adapter_config.json")
    },
    "retain": _retain,
    "holdout": lambda value, folder: {"holdout": _selection(value, folder)},
    "control": lambda value, folder: {"control": model_place(value, folder)},
    "limits": _limits,
    "utility_floor": lambda value, folder: {"utility_floor": value.number(above=0, most=1)},
    "minutes": lambda value, folder: {"minutes": value.number(above=0)},
    "near_duplicates": _near_duplicates,
    "attacks": _attacks,
    "serving": _serving,
    "ledger": _ledger,
    "training": _training,  # the last: it imports torch, and the mistakes of the others are told at once
}
_MAY_BE_NULL = ("trained_adapter", "holdout", "control", "minutes", "ledger")


def _consistent(request: Request, given: Mapping[str, YamlValue]) -> Request:
    """Refuse fields that do not go together."""
    numbers = [limit for limit in request.limits.values() if limit != HOLDOUT]
    if request.holdout is None:
        if len(numbers) < len(request.limits) or not numbers:
            place = given.get("limits", given["forget"])
            raise place.error(
                "there is no holdout, so nothing says when the rows are forgotten: add holdout, texts of the "
                "same kind that the model was never trained on, or give limits that are numbers"
            )
        if "attacks" not in given:
            without = tuple(name for name in request.attacks if name != "mia")
            request = dataclasses.replace(request, attacks=without)
        elif "mia" in request.attacks:
            raise given["attacks"].error("mia compares with the holdout, and there is none: add holdout")
    if request.training.get("tuning") == "full" and request.target != "merged":
        place = given["training"]
        raise place.error(f"tuning full leaves no adapter for {request.target}; write `serving: merged`")
    return request
