"""From pictures to vectors: through the frozen vision tower of a policy, or as thumbnails, which need none."""

import hashlib
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from lerobot.configs import FeatureType
from lerobot.policies.factory import make_pre_post_processors
from lerobot.processor import PolicyProcessorPipeline
from lerobot.utils.constants import IMAGENET_STATS
from torch import Tensor, nn
from torch.nn import functional

from ptr_hf.artifacts.checkpoint import is_ptr_source, resolve_processors
from ptr_hf.artifacts.processor_checks import PROCESSOR_FILES
from ptr_hf.configuration_ptr import PTRConfig
from ptr_hf.files.base_source import check_base
from ptr_hf.modeling_ptr import PTRPolicy
from ptr_hf.policies import make_adapter
from ptr_hf.policies.base import AdapterBase, unwrap
from ptr_hf.policies.hooks import preserved_modes
from ptr_hf.processor_ptr import saved_processors, saved_renames

logger = logging.getLogger(__name__)

THUMBNAILS = "thumbnails"
SIDE, GRID, WIDEST, BATCH = 16, 4, 768, 32
"""Pixels of a thumbnail's side; cells of a side in which a tower's tokens are averaged; numbers kept of a picture; pictures at
once."""


class Thumbnails:
    """Pictures averaged down to 16 x 16 pixels, as they are.

    Attributes:
        name: as a user reads it.
        digest: changes with everything that changes the vectors.
        width: of a vector, at most `WIDEST`.
    """

    name = THUMBNAILS
    digest = f"{THUMBNAILS} {SIDE}"
    width = 3 * SIDE**2

    def encode(
        self, camera: str, place: int, images: UInt8[np.ndarray, "n 3 height width"]
    ) -> Float[np.ndarray, "n size"]:
        """Encode pictures of one camera.

        Args:
            camera: its feature in the dataset.
            place: its number among the dataset's cameras.
            images: 8-bit RGB.
        """
        small = functional.adaptive_avg_pool2d(torch.from_numpy(images).float() / 255, SIDE)
        return small.flatten(1).numpy()


class TowerEncoder:
    """The lower half of a policy's vision tower, its tokens averaged in 4 x 4 cells of the picture.

    That is the layer at which PTR compares consequences. More numbers than `WIDEST` are projected onto so many random
    directions, the same ones always. The policy is left as it is.

    Args:
        policy: a LeRobot policy, or the `PeftModel` around one.
        preprocessor: its own.
        renames: dataset camera -> policy camera. One that the policy does not know goes through the tower as the policy's camera
            in the same place, which a warning says.
        name: as a user reads it.

    Raises:
        ValueError: the policy sees no pictures, or is of no supported type.
    """

    def __init__(
        self, policy: nn.Module, preprocessor: PolicyProcessorPipeline, renames: Mapping[str, str], name: str
    ) -> None:
        self._adapter: AdapterBase = make_adapter(policy)
        config = unwrap(policy).config
        if not config.image_features:
            raise ValueError(
                f"The {config.type} policy {name} sees no pictures, so it has no vision tower to encode them: give a policy with "
                f"cameras, or {THUMBNAILS!r}, which needs none."
            )
        self.name, self._policy, self._preprocessor, self._renames = name, policy, preprocessor, renames
        self._inputs = {
            key: feature.shape
            for key, feature in config.input_features.items()
            if feature.type is not FeatureType.VISUAL
        }
        self._device = next(policy.parameters()).device
        layer = max(1, self._adapter.num_tower_layers() // 2)
        with preserved_modes(policy, training=False):
            self._tower = self._adapter.build_tower(layer, share=True)
        size = GRID**2 * self._adapter.target_dim(layer)
        self.width = min(size, WIDEST)
        self._directions: Tensor | None = None
        if size > WIDEST:
            drawn = torch.randn(size, WIDEST, generator=torch.Generator().manual_seed(0))
            self._directions = (drawn / math.sqrt(WIDEST)).to(self._device)
        self._named: set[str] = set()
        self.digest = self._digest(layer)

    @torch.no_grad()
    def encode(
        self, camera: str, place: int, images: UInt8[np.ndarray, "n 3 height width"]
    ) -> Float[np.ndarray, "n size"]:
        """See `Thumbnails.encode`."""
        key = self._key(camera, place)
        parts = []
        with preserved_modes(self._policy, training=False):
            for batch in torch.from_numpy(np.ascontiguousarray(images)).split(BATCH):
                prepared = self._prepared(key, batch.to(self._device).float() / 255)
                tokens = self._adapter.encode_image(self._tower, key, prepared).float()
                cells = _in_cells(tokens, batch.shape[-2] / batch.shape[-1])
                parts.append((cells if self._directions is None else cells @ self._directions).cpu().numpy())
        return np.concatenate(parts)

    def _key(self, camera: str, place: int) -> str:
        known = self._adapter.target_keys()
        key = self._renames.get(camera, camera)
        if key in known:
            return key
        stands_for = known[place % len(known)]
        if camera not in self._named:
            logger.warning(
                "The policy %s has no camera %s; its pictures go through the tower as %s.",
                self.name,
                camera,
                stands_for,
            )
            self._named.add(camera)
        return stands_for

    def _prepared(self, key: str, images: Float[Tensor, "n 3 height width"]) -> Float[Tensor, "n 3 _ _"]:
        """Pictures as they leave the policy's preprocessor, beside a state of zeros and no instruction."""
        rows = len(images)
        others = {name: torch.zeros(rows, *shape, device=images.device) for name, shape in self._inputs.items()}
        prepared: Tensor = self._preprocessor({**others, key: images, "task": [""] * rows})[key]
        return prepared.to(self._device)

    def _digest(self, layer: int) -> str:
        """Of the tower's weights, of how pictures are prepared, and of the settings that name pictures."""
        digest = hashlib.sha256(f"{self._adapter.family} {layer} {GRID} {self.width}".encode())
        for name, value in self._adapter.tower_parameters(layer):
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        shades = torch.linspace(0, 1, 3 * 64, device=self._device).reshape(1, 3, 8, 8)
        for key in self._adapter.target_keys():
            digest.update(self._prepared(key, shades).float().cpu().contiguous().numpy().data)
        settings = vars(unwrap(self._policy).config)
        about = {name: settings[name] for name in sorted(settings) if any(word in name for word in ("resize", "crop"))}
        digest.update(json.dumps([about, sorted(self._renames.items())], default=str).encode())
        return digest.hexdigest()


type ImageEncoder = Thumbnails | TowerEncoder
"""Turns pictures into vectors."""


def image_encoder(policy: Any, device: str) -> ImageEncoder:
    """What `inspect_dataset(policy=...)` stands for.

    Args:
        policy: "thumbnails"; the folder or Hub id of a LeRobot policy or PTR checkpoint; or one that is loaded. Pictures are
            prepared by the saved preprocessor; without one they are normalised as LeRobot trains, by ImageNet's statistics.
        device: where a policy that is not loaded yet goes.

    Raises:
        ValueError: there is no such policy, it is of no supported type, or it sees no pictures.
    """
    if isinstance(policy, str) and policy == THUMBNAILS:
        return Thumbnails()
    if isinstance(policy, nn.Module):
        base = policy.base if isinstance(policy, PTRPolicy) else policy
        make_adapter(base)
        return TowerEncoder(base, _usual_preprocessor(unwrap(base).config), {}, type(unwrap(base)).__name__)
    if not isinstance(policy, str | Path):
        raise ValueError(
            f"policy is a folder, a Hub id, a loaded policy or {THUMBNAILS!r}, not a {type(policy).__name__}."
        )
    if is_ptr_source(policy):
        loaded = PTRPolicy.from_pretrained(policy).to(device)
        loaded.config.device = device
    else:
        check_base(policy)
        loaded = PTRPolicy.from_base(PTRConfig(device=device, base_path=str(policy), preset="sft"))
    config = unwrap(loaded.base).config
    config.device = device
    if (resolve_processors(policy) / PROCESSOR_FILES[0]).is_file():
        preprocessor, _ = saved_processors(loaded.config, policy)
        return TowerEncoder(loaded.base, preprocessor, saved_renames(policy), str(policy))
    return TowerEncoder(loaded.base, _usual_preprocessor(config), {}, str(policy))


def _usual_preprocessor(config: Any) -> PolicyProcessorPipeline:
    stats = {key: {name: np.asarray(value) for name, value in IMAGENET_STATS.items()} for key in config.image_features}
    return make_pre_post_processors(config, dataset_stats=stats)[0]


def _in_cells(tokens: Float[Tensor, "n patches size"], aspect: float) -> Float[Tensor, "n cells"]:
    """Tokens averaged in the cells of a grid; in as many stretches of their order where they lie on no rectangle.

    Args:
        tokens: of pictures, row by row.
        aspect: height by width of the pictures; a tower that makes them square lays its tokens on a square.
    """
    patches = tokens.shape[1]
    for rows in (math.isqrt(patches), round(math.sqrt(patches * aspect))):
        if rows and patches % rows == 0 and (rows * rows == patches or rows != math.isqrt(patches)):
            grid = tokens.transpose(1, 2).unflatten(2, (rows, patches // rows))
            return functional.adaptive_avg_pool2d(grid, GRID).flatten(1)
    return functional.adaptive_avg_pool1d(tokens.transpose(1, 2), GRID**2).flatten(1)
