"""What the loopback hub makes of a card's metadata: whether it is valid, and the tags that follow from it.

The public hub's own rules are not published; these are the ones its errors and its documentation name, in the form in
which it answers.
"""

import re
from collections.abc import Callable
from typing import Any

import yaml

FRONT_MATTER = re.compile(r"^\s*---[ \t]*\r?\n(.*?\r?\n)?---[ \t]*(?:\r?\n|$)", re.DOTALL)
REPO_ID = re.compile(r"^[\w.-]+(?:/[\w.-]+)?$")
DATASET_TYPE = re.compile(r"^(?:[\w-]+/)?[\w.-]+$")
ARXIV = re.compile(r"arxiv\.org/(?:abs|pdf)/(\d{4}\.\d{4,5})")
LICENSES = frozenset(
    [
        "apache-2.0",
        "mit",
        "openrail",
        "bigscience-openrail-m",
        "creativeml-openrail-m",
        "bigscience-bloom-rail-1.0",
        "bigcode-openrail-m",
        "afl-3.0",
        "artistic-2.0",
        "bsl-1.0",
        "bsd",
        "bsd-2-clause",
        "bsd-3-clause",
        "bsd-3-clause-clear",
        "c-uda",
        "cc",
        "cc0-1.0",
        "cc-by-2.0",
        "cc-by-2.5",
        "cc-by-3.0",
        "cc-by-4.0",
        "cc-by-sa-3.0",
        "cc-by-sa-4.0",
        "cc-by-nc-2.0",
        "cc-by-nc-3.0",
        "cc-by-nc-4.0",
        "cc-by-nd-4.0",
        "cc-by-nc-nd-3.0",
        "cc-by-nc-nd-4.0",
        "cc-by-nc-sa-2.0",
        "cc-by-nc-sa-3.0",
        "cc-by-nc-sa-4.0",
        "cdla-sharing-1.0",
        "cdla-permissive-1.0",
        "cdla-permissive-2.0",
        "wtfpl",
        "ecl-2.0",
        "epl-1.0",
        "epl-2.0",
        "etalab-2.0",
        "eupl-1.1",
        "eupl-1.2",
        "agpl-3.0",
        "gfdl",
        "gpl",
        "gpl-2.0",
        "gpl-3.0",
        "lgpl",
        "lgpl-2.1",
        "lgpl-3.0",
        "isc",
        "h-research",
        "intel-research",
        "lppl-1.3c",
        "ms-pl",
        "apple-ascl",
        "apple-amlr",
        "mpl-2.0",
        "odc-by",
        "odbl",
        "openmdw-1.0",
        "openrail++",
        "osl-3.0",
        "postgresql",
        "ofl-1.1",
        "ncsa",
        "unlicense",
        "zlib",
        "pddl",
        "lgpl-lr",
        "deepfloyd-if-license",
        "fair-noncommercial-research-license",
        "llama2",
        "llama3",
        "llama3.1",
        "llama3.2",
        "llama3.3",
        "llama4",
        "grok2-community",
        "gemma",
        "unknown",
        "other",
    ]
)
# the tasks that a policy or its dataset could name; any other is a warning, as on the public hub
TASKS = frozenset({"robotics", "reinforcement-learning", "image-text-to-text", "video-classification", "other"})
SIZES = frozenset(
    [
        "n<1K",
        "1K<n<10K",
        "10K<n<100K",
        "100K<n<1M",
        "1M<n<10M",
        "10M<n<100M",
        "100M<n<1B",
        "1B<n<10B",
        "10B<n<100B",
        "100B<n<1T",
        "n>1T",
    ]
)


def read_metadata(content: str) -> dict[str, Any] | None:
    """The metadata block at the head of a card; none where there is no block.

    Raises:
        ValueError: the block is not YAML, or not a mapping.
    """
    match = FRONT_MATTER.match(content)
    if match is None:
        return None
    try:
        data = yaml.safe_load(match.group(1) or "")
    except yaml.YAMLError as error:
        raise ValueError(f"YAML Metadata Error: {error}") from error
    if data is not None and not isinstance(data, dict):
        raise ValueError('"value" must be of type object')
    return data


def check_card(content: str, repo_type: str) -> tuple[list[str], list[str]]:
    """Errors and warnings for a card, one sentence each."""
    try:
        data = read_metadata(content)
    except ValueError as error:
        return [str(error)], []
    if not data:
        return [], ["empty or missing yaml metadata in repo card"]
    errors = [*_check_common(data), *(_check_dataset(data) if repo_type == "dataset" else _check_model(data))]
    warnings = []
    tasks = as_list(data.get("task_categories" if repo_type == "dataset" else "pipeline_tag"))
    for task in tasks:
        if task not in TASKS:
            warnings.append(f'The task "{task}" is not in the official list.')
    if "license" not in data:
        warnings.append("No license is named in the metadata.")
    return errors, warnings


def tags_of(data: dict[str, Any], content: str) -> list[str]:
    """The tags that the public hub derives from a card."""
    tags = [str(data[key]) for key in ("library_name", "pipeline_tag") if key in data]
    tags += [str(tag) for tag in as_list(data.get("tags"))]
    tags += [str(task) for task in as_list(data.get("task_categories"))]
    tags += [str(language) for language in as_list(data.get("language"))]
    tags += [f"dataset:{name}" for name in as_list(data.get("datasets"))]
    for name in as_list(data.get("base_model")):
        relation = data.get("base_model_relation", "finetune")
        tags += [f"base_model:{name}", f"base_model:{relation}:{name}"]
    tags += [f"license:{name}" for name in as_list(data.get("license"))]
    tags += [f"arxiv:{number}" for number in ARXIV.findall(content)]
    if "model-index" in data:
        tags.append("model-index")
    return list(dict.fromkeys([*tags, "region:us"]))


def as_list(value: Any) -> list[Any]:
    """A value that cards may give alone or in a list."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _check_common(data: dict[str, Any]) -> list[str]:
    errors = _check_strings(data, "license", lambda name: name in LICENSES, f"must be one of {sorted(LICENSES)}")
    errors += _check_strings(data, "tags", lambda tag: 0 < len(tag) <= 256, "must not be empty nor too long")
    return errors + _check_strings(data, "language", lambda code: code.isascii(), "must only contain language codes")


def _check_dataset(data: dict[str, Any]) -> list[str]:
    errors = _check_strings(data, "size_categories", lambda size: size in SIZES, f"must be one of {sorted(SIZES)}")
    errors += _check_strings(data, "task_categories", bool, "is not allowed to be empty")
    for number, entry in enumerate(data.get("configs") or []):
        if not isinstance(entry, dict) or not isinstance(entry.get("config_name"), str):
            errors.append(f'"configs[{number}].config_name" is required')
    return errors


def _check_model(data: dict[str, Any]) -> list[str]:
    errors = []
    for key in ("base_model", "datasets"):
        errors += _check_strings(
            data, key, lambda name: bool(REPO_ID.match(name)), "with value {value!r} is not valid: use the id of a repo"
        )
    for key in ("library_name", "pipeline_tag", "license_name", "license_link"):
        if key in data and not (isinstance(data[key], str) and data[key]):
            errors.append(f'"{key}" must be a string')
    if data.get("license") == "other" and "license_name" not in data:
        errors.append('"license_name" is required when "license" is other')
    if "model-index" in data:
        errors += _check_model_index(data["model-index"])
    return errors


def _check_strings(data: dict[str, Any], key: str, accepts: Callable[[str], bool], otherwise: str) -> list[str]:
    """Errors of a field that holds one string or a list of them."""
    if key not in data:
        return []
    errors = []
    for number, value in enumerate(as_list(data[key])):
        name = f"{key}[{number}]" if isinstance(data[key], list) else key
        if not isinstance(value, str):
            errors.append(f'"{name}" must be a string')
        elif not accepts(value):
            errors.append(f'"{name}" {otherwise.replace("{value!r}", repr(value))}')
    return errors if data[key] is not None else [f'"{key}" must be a string or a list']


def _check_model_index(models: Any) -> list[str]:
    if not isinstance(models, list):
        return ['"model-index" must be an array']
    errors: list[str] = []
    for m, model in enumerate(models):
        at = f"model-index[{m}]"
        if not isinstance(model, dict):
            errors.append(f'"{at}" must be of type object')
            continue
        errors += _required(model, at, "name")
        results = model.get("results")
        if not isinstance(results, list):
            errors.append(f'"{at}.results" must be an array')
            continue
        for r, result in enumerate(results):
            errors += _check_result(result, f"{at}.results[{r}]")
    return errors


def _check_result(result: Any, at: str) -> list[str]:
    if not isinstance(result, dict):
        return [f'"{at}" must be of type object']
    errors: list[str] = []
    for key, fields in (("task", ("type",)), ("dataset", ("type", "name"))):
        if not isinstance(result.get(key), dict):
            errors.append(f'"{at}.{key}" is required')
            continue
        for field in fields:
            errors += _required(result[key], f"{at}.{key}", field)
    dataset = result.get("dataset")
    if isinstance(dataset, dict) and isinstance(dataset.get("type"), str) and not DATASET_TYPE.match(dataset["type"]):
        errors.append(f'"{at}.dataset.type" with value "{dataset["type"]}" fails to match the required pattern')
    metrics = result.get("metrics")
    if not isinstance(metrics, list) or not metrics:
        return [*errors, f'"{at}.metrics" must contain at least one metric']
    for number, metric in enumerate(metrics):
        here = f"{at}.metrics[{number}]"
        if not isinstance(metric, dict):
            errors.append(f'"{here}" must be of type object')
            continue
        errors += _required(metric, here, "type")
        if metric.get("value") is None:
            errors.append(f'"{here}.value" is required')
    return errors


def _required(data: dict[str, Any], at: str, field: str) -> list[str]:
    value = data.get(field)
    if value is None:
        return [f'"{at}.{field}" is required']
    if not isinstance(value, str):
        return [f'"{at}.{field}" must be a string']
    return [] if value else [f'"{at}.{field}" is not allowed to be empty']
