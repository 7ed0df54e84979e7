"""The vision tower of a policy, cut after some of its layers: the encoder that consequence targets start from."""

import copy
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

RESNET_STEM = 4


@dataclass(frozen=True)
class VisionTower:
    """Where a policy's vision tower lies, or the state projector of one that sees no images, and how it is cut.

    Attributes:
        root: the policy's own module.
        stem: names of its submodules before the first layer.
        layers: names of the submodules of each layer, the last of which returns the hidden states.
        widths: of the hidden states after each layer.
        head: names of what follows the layers, in a tower that is cut into a model of its own class; None where the submodules
            simply run one after the other.
        settings: what the config of such a model says instead of the policy's.
    """

    root: nn.Module
    stem: tuple[str, ...]
    layers: tuple[tuple[str, ...], ...]
    widths: tuple[int, ...]
    head: tuple[str, ...] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def frozen(self) -> bool:
        """Whether no parameter trains."""
        return not any(parameter.requires_grad for parameter in self.root.parameters())

    def names(self, layer: int) -> tuple[str, ...]:
        """The submodules up to a layer.

        Raises:
            ValueError: the tower has no such layer.
        """
        if not 1 <= layer <= len(self.layers):
            raise ValueError(
                f"The vision tower has {len(self.layers)} layers, so target_layer must be between 1 and "
                f"{len(self.layers)}, not {layer}."
            )
        return (*self.stem, *(name for names in self.layers[:layer] for name in names))

    def states(self, layer: int) -> nn.Module:
        """The module that returns the hidden states after `layer` layers."""
        return self.root.get_submodule(self.names(layer)[-1])

    def parameters(self, layer: int) -> Iterable[tuple[str, Tensor]]:
        """Parameters and buffers up to a layer, under exactly the names of `cut(layer).state_dict()`."""
        kept = tuple(f"{name}." for name in self.names(layer))
        return ((name, value) for name, value in self.root.state_dict().items() if name.startswith(kept))

    def cut(self, layer: int, share: bool) -> nn.Module:
        """The tower up to a layer: a frozen float32 copy in eval mode, or with `share` of the policy's own modules."""
        modules = {name: self.root.get_submodule(name) for name in self.names(layer)}
        if self.head is None:
            tower: nn.Module = nn.Sequential(OrderedDict(modules))
        else:
            config: Any = copy.deepcopy(self.root.config)
            for name, value in self.settings.items():
                setattr(config, name, value)
            # The shell's own weights are never read: on the meta device they cost nothing.
            with torch.device("meta"):
                tower = type(self.root)(config)
            for name in (name for names in self.layers[layer:] for name in names):
                parent, _, child = name.rpartition(".")
                delattr(tower.get_submodule(parent), child)
            for name, module in [*modules.items(), *((name, nn.Identity()) for name in self.head)]:
                tower.set_submodule(name, module)
            tower.train(self.root.training)
        return tower if share else copy.deepcopy(tower).float().requires_grad_(False).eval()


def transformer_tower(
    root: Any, stem: tuple[str, ...], layers: str, head: tuple[str, ...], **settings: Any
) -> VisionTower:
    """A vision transformer of the transformers library, whose layers lie in one list."""
    count = len(root.get_submodule(layers))
    names = tuple((f"{layers}.{index}",) for index in range(count))
    return VisionTower(root, stem, names, (int(root.config.hidden_size),) * count, head, settings)


def resnet_tower(root: nn.Module) -> VisionTower:
    """A ResNet without its pooling; a layer is one of its four stages."""
    names = [name for name, _ in root.named_children()]
    stages = names[RESNET_STEM:]
    return VisionTower(
        root, tuple(names[:RESNET_STEM]), tuple((name,) for name in stages), tuple(_channels(root, n) for n in stages)
    )


def projector_tower(projector: nn.Module, width: int) -> VisionTower:
    """A projector of states: one layer, one token."""
    return VisionTower(nn.Sequential(OrderedDict(projection=projector)), (), (("projection",),), (width,))


def flatten_map(feature_map: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch patches channels"]:
    """A feature map's cells as tokens."""
    return feature_map.flatten(2).transpose(1, 2)


def _channels(resnet: nn.Module, stage: str) -> int:
    block: Any = list(resnet.get_submodule(stage).children())[-1]
    return int((block.conv3 if isinstance(block, Bottleneck) else block.conv2).weight.shape[0])
