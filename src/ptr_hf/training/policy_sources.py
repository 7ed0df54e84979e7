"""Which policy the arguments of `PTRTrainer` stand for."""

from pathlib import Path
from typing import Any

from lerobot.configs import FeatureType, PreTrainedConfig
from lerobot.policies.factory import make_policy
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.feature_utils import dataset_to_policy_features
from peft import PeftConfig
from torch import nn

from ptr_hf.artifacts.checkpoint import is_ptr_source
from ptr_hf.artifacts.peft import wrap_with_peft
from ptr_hf.configuration_ptr import PTRConfig, chunk_settings
from ptr_hf.data.fit import check_vectors, renamed_features
from ptr_hf.files.foreign_code import no_foreign_code
from ptr_hf.modeling_ptr import PTRPolicy, build_base
from ptr_hf.policies.base import unwrap
from ptr_hf.training.arguments import PTRTrainingArguments

type ModelSource = str | Path | PreTrainedConfig | nn.Module


def resolve_policy(
    model: ModelSource, args: PTRTrainingArguments, meta: Any = None, peft_config: PeftConfig | None = None
) -> PTRPolicy:
    """The `PTRPolicy` that a model argument of `PTRTrainer` stands for, on the arguments' device.

    Args:
        model: see `PTRTrainer`.
        args: source of hyperparameters, device and revision.
        meta: metadata of the dataset; gives a policy that starts from a configuration its features.
        peft_config: of an adapter to train in place of the policy's weights.

    Raises:
        ValueError: the model is none of these, its type is not supported, or it cannot take an adapter.
    """
    device = args.device.type
    adapted = args.use_peft or peft_config is not None
    if isinstance(model, str | Path) and is_ptr_source(model, args.model_revision):
        model = PTRPolicy.from_pretrained(model, revision=args.model_revision)
    if isinstance(model, PTRPolicy):
        if adapted:
            raise ValueError(
                "A PTRPolicy is built around its base: give the base policy with peft_config, or wrap the base by PEFT before "
                "PTRPolicy(config, base_policy=...)."
            )
        _check_hyperparameters(args, model.config)
        model.config.device = device
        return model.to(args.device)
    hyperparameters = args.hyperparameters()
    if isinstance(model, nn.Module):
        base = unwrap(model)
        if not isinstance(base, PreTrainedPolicy):
            raise ValueError(
                f"{type(model).__name__} is no LeRobot policy: give a LeRobot policy, a PTRPolicy, a Hub id or a folder."
            )
        base.config.device = device
        if adapted:
            model = wrap_with_peft(model, peft_config, args.peft_overrides)
        return PTRPolicy(PTRConfig(device=device, **hyperparameters), base_policy=model.to(args.device))
    if isinstance(model, PTRConfig):
        raise ValueError("Give the base policy's configuration with the hyperparameters in args, or PTRPolicy(config).")
    if isinstance(model, PreTrainedConfig):
        if adapted:
            raise ValueError(
                "An adapter needs trained weights under it: give a policy's Hub id or folder with peft_config."
            )
        return _fresh_policy(model, device, hyperparameters, meta, args.observation_renames)
    config = PTRConfig(device=device, base_path=str(model), base_revision=args.model_revision, **hyperparameters)
    if meta is not None:
        robot = renamed_features(meta.features, args.observation_renames)
        # a released VLA pads every robot's vectors to the same width; others have weights of this robot's sizes
        if "max_action_dim" not in vars(config.base_config):
            check_vectors(config.base_config, robot, meta.repo_id)
        fit_to_robot(config, robot)
    if not adapted:
        return PTRPolicy.from_base(config)
    trained = build_base(config)
    trained.config.pretrained_path = Path(model)
    return PTRPolicy(config, base_policy=wrap_with_peft(trained, peft_config, args.peft_overrides).to(args.device))


def fit_to_robot(config: PTRConfig | PreTrainedConfig, features: dict[str, Any]) -> None:
    """Give a pretrained policy this robot's action and state sizes, as LeRobot does; its cameras stay its own.

    Args:
        config: whose features are set.
        features: of the dataset, by the policy's names.
    """
    declared = (config.base_config if isinstance(config, PTRConfig) else config).input_features or {}
    robot = dataset_to_policy_features(features)
    config.output_features = {key: feature for key, feature in robot.items() if feature.type is FeatureType.ACTION}
    config.input_features = {
        key: robot.get(key, feature) if feature.type is FeatureType.STATE else feature
        for key, feature in declared.items()
    }


def _check_hyperparameters(args: PTRTrainingArguments, config: PTRConfig) -> None:
    """Refuse hyperparameters that a finished `PTRPolicy` would silently overrule."""
    own = config.hyperparameters()
    for name, value in args.given.items():
        if name == "weights":
            # they belong to the data, not to the policy
            _give_weights(value, config)
        elif value != own[name]:
            raise ValueError(
                f"{name}={value} was given, but the PTRPolicy brings {name}={own[name]}, which was fixed when it was built: "
                f"leave {name} out, or start from a LeRobot policy."
            )


def _give_weights(weights: str, config: PTRConfig) -> None:
    if config.scorer or not config.alpha:
        raise ValueError(
            f"weights={weights} was given, but the PTRPolicy was built with preset={config.preset!r}, which does not read them: "
            "leave weights out, or start from a LeRobot policy."
        )
    config.weights = weights


@no_foreign_code()
def _fresh_policy(
    config: PreTrainedConfig, device: str, hyperparameters: dict[str, Any], meta: Any, renames: dict[str, str]
) -> PTRPolicy:
    if meta is None:
        raise ValueError("A policy configuration needs a dataset to take its features from: give train_dataset too.")
    config.device = device
    described = renamed_features(meta.features, renames)
    if not config.input_features:
        features = dataset_to_policy_features(described)
        config.input_features = {
            key: feature for key, feature in features.items() if feature.type is not FeatureType.ACTION
        }
    check_vectors(config, described, meta.repo_id)
    if hyperparameters["chunk_size"] is not None:
        vars(config).update(
            chunk_settings(type(config), hyperparameters["chunk_size"], {"n_obs_steps": config.n_obs_steps})
        )
    try:
        base = make_policy(config, ds_meta=meta, rename_map=renames)
    except ValueError as error:
        raise ValueError(f"No {config.type} policy can be made for the dataset {meta.repo_id}: {error}") from error
    return PTRPolicy(PTRConfig(device=device, **hyperparameters), base_policy=base)
