"""Whether a dataset's features fit a policy's: what is renamed, what is missing, what is of another size, what is not read."""

import json
import logging
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.utils.constants import OBS_ENV_STATE, OBS_STATE

from ptr_hf.constants import EMPTY_CAMERA
from ptr_hf.data.mixture.metadata import MixtureMetadata
from ptr_hf.data.segments import ACTION, OBSERVATION_PREFIX

Features = Mapping[str, Mapping[str, Any]]
"""A dataset's `meta.features`."""
NEEDS_STATE = ("act", "diffusion", "evo1", "multi_task_dit", "pi0", "pi05", "pi0_fast", "smolvla", "smolvla_state")
"""Policies whose code reads observation.state whatever their configuration says."""

logger = logging.getLogger(__name__)


def check_fit(
    config: PreTrainedConfig, features: Features, renames: Mapping[str, str], where: str, *, given: bool = True
) -> None:
    """Refuse a dataset that a policy cannot be trained on, and say which of its observations the policy does not read.

    Args:
        config: of the base policy.
        features: of the dataset.
        renames: dataset key -> policy key.
        where: what messages call the dataset.
        given: the user wrote the renames for this dataset.

    Raises:
        ValueError: a rename does nothing or takes something away, or a camera, a state or a size is not the policy's.
    """
    if given:
        check_renames(config.input_features or {}, features, renames, where)
    check_cameras(config, features, renames)
    check_vectors(config, renamed_features(features, renames), where)
    if unread := unread_observations(config, features, renames, where):
        logger.warning("%s", unread)


def check_mixture_fit(config: PreTrainedConfig, meta: MixtureMetadata) -> None:
    """`check_fit` for the sources of a mixture, each of which may lack some of the policy's cameras.

    Args:
        config: of the base policy.
        meta: of the mixture.
    """
    reads, unread = config.input_features or {}, []
    for source in meta.sources:
        for key, name in source.config.rename.items():
            if name not in reads:
                raise ValueError(
                    f"rename of the source {source.name} maps {key!r} onto {name!r}, which the policy does not read"
                    f"{near(name, reads) or '.'} It reads {_list(reads)}."
                )
        check_cameras(config, source.cameras.values(), lacks_some=True)
        cameras = {key: source.meta.features[key] for key in source.cameras}
        unread.append(unread_observations(config, cameras, source.cameras, f"the source {source.name}", "its rename"))
    check_vectors(config, meta.features, meta.repo_id)
    for sentence in filter(None, unread):
        logger.warning("%s", sentence)


def renamed_features(features: Features, renames: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The dataset's features by the policy's names."""
    return {renames.get(key, key): dict(feature) for key, feature in features.items()}


def check_renames(
    reads: Mapping[str, PolicyFeature], features: Features, renames: Mapping[str, str], where: str
) -> None:
    """Refuse an entry of rename_map that matches nothing or takes something away.

    Args:
        reads: the policy's input features.
        features: of the dataset.
        renames: dataset key -> policy key.
        where: what messages call the dataset.

    Raises:
        ValueError: naming the entry, and what was probably meant.
    """
    observations = [key for key in features if key.startswith(OBSERVATION_PREFIX)]
    for key, name in renames.items():
        entry = f"rename_map maps {key!r} onto {name!r}"
        if key not in features:
            if name in features and key in reads:
                raise ValueError(
                    f"{entry}, but it goes from the dataset's name to the policy's, and {key!r} is the policy's: write it "
                    f"the other way round, {json.dumps({name: key})}."
                )
            raise ValueError(
                f"{entry}, and {where} has no {key!r}{near(key, observations) or '.'} It has {_list(observations)}."
            )
        if key not in observations:
            raise ValueError(f"{entry}, and only observations can be renamed; {where} has {_list(observations)}.")
        if name not in reads:
            raise ValueError(
                f"{entry}, which the policy does not read{near(name, reads) or '.'} It reads {_list(reads)}."
            )
        if features[key]["dtype"] in ("image", "video") and reads[name].type is not FeatureType.VISUAL:
            raise ValueError(f"{entry}, but {key!r} is a camera, and {name!r} is none.")
        if features[key]["dtype"] not in ("image", "video") and reads[name].type is FeatureType.VISUAL:
            raise ValueError(f"{entry}, but {key!r} is no camera, and {name!r} is one.")
        others = [other for other in features if other != key and renames.get(other, other) == name]
        if others:
            what = "maps onto it too" if others[0] in renames else "is called so already"
            raise ValueError(
                f"{entry}, and {others[0]!r} of {where} {what}: the policy would read one of the two alone."
            )


def check_cameras(
    config: PreTrainedConfig,
    feature_keys: Iterable[str],
    rename_map: Mapping[str, str] | None = None,
    *,
    lacks_some: bool = False,
) -> None:
    """Refuse a dataset whose cameras, once renamed, are not the policy's.

    A policy may declare more cameras than the robot has only where it fills the missing ones itself (SmolVLA), or where the
    dataset is one of a mixture, which does (`lacks_some`); one has to be there.

    Raises:
        ValueError: naming the missing cameras and the ones there are.
    """
    renamed = {(rename_map or {}).get(key, key) for key in feature_keys}
    cameras = {
        key: feature for key, feature in (config.input_features or {}).items() if feature.type is FeatureType.VISUAL
    }
    for key in cameras.keys() & renamed:
        if cameras[key].shape[0] != 3:
            raise ValueError(
                f"{key} has {cameras[key].shape[0]} channels (a depth map?), and the cameras of a {config.type} policy are "
                "colour pictures of 3: leave it out of the policy's input_features."
            )
    expected = [key for key in cameras if not key.startswith(EMPTY_CAMERA)]
    missing = [key for key in expected if key not in renamed]
    fills_missing = (lacks_some or config.type == "smolvla") and len(missing) < len(expected)
    if missing and not fills_missing:
        have = sorted(key for key in renamed if key.startswith("observation.image")) or ["none"]
        raise ValueError(
            f"The policy sees the camera {', '.join(missing)}, which the dataset lacks (it has {', '.join(have)}): map the names "
            "with rename_map={'dataset key': 'policy key'}, or choose a policy for these cameras."
        )


def check_vectors(config: PreTrainedConfig, features: Features, where: str) -> None:
    """Refuse a dataset that lacks a state that the policy reads, or whose states or actions have another size.

    Args:
        config: of the base policy.
        features: of the dataset, by the policy's names.
        where: what messages call the dataset.

    Raises:
        ValueError: naming the feature, both sizes, and what to do.
    """
    inputs, settings = config.input_features or {}, vars(config)
    # GR00T takes zeros for a state that there is not
    reads = [key for key in (OBS_STATE, OBS_ENV_STATE) if key in inputs and config.type != "groot"]
    if config.type in NEEDS_STATE and OBS_STATE not in reads:
        reads.append(OBS_STATE)
    for key in reads:
        if key not in features:
            others = [other for other in features if other.startswith(OBSERVATION_PREFIX)]
            raise ValueError(
                f"The {config.type} policy reads {key!r}, which {where} lacks (it has {_list(others)}): map the dataset's "
                "name onto it with rename_map={'dataset key': 'policy key'}, or choose a policy that does without."
            )
    outputs = config.output_features or {}
    for key, declared, widest in (
        (ACTION, outputs.get(ACTION), settings.get("max_action_dim")),
        (OBS_STATE, inputs.get(OBS_STATE), settings.get("max_state_dim")),
        (OBS_ENV_STATE, inputs.get(OBS_ENV_STATE), None),
    ):
        if key not in features or declared is None:
            continue
        size, own = int(features[key]["shape"][0]), int(declared.shape[0])
        if widest is not None and size > widest:
            raise ValueError(
                f"{key!r} of {where} has {size} dimensions, and the {config.type} policy takes at most {widest}: train a "
                "policy that is wider."
            )
        # a state is padded to the policy's width whatever was declared
        if size != own and (widest is None or key == ACTION):
            other = (
                "give the policy's folder or Hub id in the place of the loaded policy, and it takes the dataset's size"
                if widest is not None
                else "choose a policy of that size, or one that is trained from scratch"
            )
            raise ValueError(
                f"{key!r} of {where} has {size} dimensions, and the {config.type} policy is made for {own}: {other}."
            )


def unread_observations(
    config: PreTrainedConfig,
    features: Features,
    renames: Mapping[str, str],
    where: str,
    option: str = "rename_map",
) -> str | None:
    """One sentence that names the cameras and states of a dataset that a policy does not read; None if it reads all.

    Args:
        config: of the base policy.
        features: of the dataset.
        renames: dataset key -> policy key.
        where: what the sentence calls the dataset.
        option: what names are mapped with.
    """
    reads = config.input_features or {}
    unread = {
        key: feature["dtype"] in ("image", "video")
        for key, feature in features.items()
        if key.startswith(OBSERVATION_PREFIX)
        and renames.get(key, key) not in reads
        and feature["dtype"] not in ("string", "language")
    }
    if not unread:
        return None
    taken = {renames.get(key, key) for key in features}
    free = [
        key
        for key, feature in reads.items()
        if feature.type is FeatureType.VISUAL and key not in taken and not key.startswith(EMPTY_CAMERA)
    ]
    told = f"The policy does not read {', '.join(unread)} of {where}"
    cameras = [key for key, picture in unread.items() if picture]
    if not (cameras and free):
        return f"{told}."
    given = {key: name for key, name in renames.items() if key != name}
    map_ = json.dumps({**given, **dict(zip(cameras, free, strict=False))})
    return f"{told}; its cameras {', '.join(free)} are free, so that {option}='{map_}' would show it more."


def near(key: str, known: Iterable[str]) -> str:
    """What was probably meant by a key that does not exist, as the end of a sentence; empty where nothing is like it."""
    found = get_close_matches(key, list(known), n=1, cutoff=0.75)
    return f": did you mean {found[0]!r}?" if found else ""


def _list(known: Iterable[str]) -> str:
    return ", ".join(known) or "none"
