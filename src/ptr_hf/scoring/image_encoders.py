"""From pictures to vectors: through the frozen vision tower of a policy or a pretrained vision model, or as thumbnails."""

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Mapping
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
from transformers import AutoImageProcessor, AutoModel

from ptr_hf.artifacts.checkpoint import is_ptr_source, resolve_processors
from ptr_hf.artifacts.processor_checks import PROCESSOR_FILES
from ptr_hf.configuration_ptr import PTRConfig
from ptr_hf.files.base_source import check_base
from ptr_hf.files.foreign_code import no_foreign_code
from ptr_hf.modeling_ptr import PTRPolicy
from ptr_hf.policies import make_adapter
from ptr_hf.policies.base import AdapterBase, unwrap
from ptr_hf.policies.hooks import preserved_modes
from ptr_hf.processor_ptr import saved_processors, saved_renames

logger = logging.getLogger(__name__)

THUMBNAILS = "thumbnails"
TRANSFORMERS = "transformers:"
"""Before the folder or Hub id of a vision model of transformers."""
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
                parts.append(_few(_in_cells(tokens, batch.shape[-2] / batch.shape[-1])).cpu().numpy())
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
        _add_weights(digest, self._adapter.tower_parameters(layer))
        shades = torch.linspace(0, 1, 3 * 64, device=self._device).reshape(1, 3, 8, 8)
        for key in self._adapter.target_keys():
            digest.update(self._prepared(key, shades).float().cpu().contiguous().numpy().data)
        settings = vars(unwrap(self._policy).config)
        about = {name: settings[name] for name in sorted(settings) if any(word in name for word in ("resize", "crop"))}
        digest.update(json.dumps([about, sorted(self._renames.items())], default=str).encode())
        return digest.hexdigest()


class VisionModelEncoder:
    """The last layer of a pretrained vision model of transformers, averaged in 4 x 4 cells of the picture.

    Of a model of pictures and texts it is the vision part. Pictures are prepared by the model's own image processor. No code of
    the repo is run, and only weights in safetensors are read. More numbers than `WIDEST` are projected as by `TowerEncoder`.

    Args:
        source: folder or Hub id, e.g. "facebook/dinov2-small".
        device: where the model goes.

    Raises:
        ValueError: there is no such model, it sees no pictures, its weights are not in safetensors, or it needs code of its own.
    """

    def __init__(self, source: str, device: str) -> None:
        try:
            with no_foreign_code():
                self._processor = AutoImageProcessor.from_pretrained(source)
                model = AutoModel.from_pretrained(source, use_safetensors=True)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{TRANSFORMERS}{source} cannot look at pictures: expected is a folder or Hub id with an image processor and a "
                f"vision model in safetensors that transformers knows, e.g. facebook/dinov2-small. {error}"
            ) from error
        revision = model.config._commit_hash  # of a Hub repo
        self.name, self._device = f"{TRANSFORMERS}{source}" + (f"@{revision}" if revision else ""), device
        self._model = getattr(model, "vision_model", model).to(device).eval()
        self.width = self.encode("", 0, np.zeros((1, 3, 64, 64), np.uint8)).shape[1]
        digest = hashlib.sha256(f"{GRID} {self.width} {self._processor.to_json_string()}".encode())
        _add_weights(digest, self._model.state_dict().items())
        self.digest = digest.hexdigest()

    @torch.no_grad()
    def encode(
        self, camera: str, place: int, images: UInt8[np.ndarray, "n 3 height width"]
    ) -> Float[np.ndarray, "n size"]:
        """See `Thumbnails.encode`."""
        parts = []
        for batch in torch.from_numpy(np.ascontiguousarray(images)).split(BATCH):
            prepared = self._processor(images=list(batch), return_tensors="pt")["pixel_values"].to(self._device)
            tokens = self._model(pixel_values=prepared).last_hidden_state.float()
            if tokens.ndim == 4:  # a convolutional network
                tokens = tokens.flatten(2).transpose(1, 2)
            patches = math.isqrt(tokens.shape[1]) ** 2  # those of the class come first
            cells = _in_cells(tokens[:, -patches:], prepared.shape[-2] / prepared.shape[-1])
            parts.append(_few(cells).cpu().numpy())
        return np.concatenate(parts)


type ImageEncoder = Thumbnails | TowerEncoder | VisionModelEncoder
"""Turns pictures into vectors."""


def image_encoder(policy: Any, device: str) -> ImageEncoder:
    """What `inspect_dataset(policy=...)` stands for.

    Args:
        policy: "thumbnails"; the folder or Hub id of a LeRobot policy or PTR checkpoint; or one that is loaded; or
            "transformers:" and the folder or Hub id of a vision model, which sees square pictures. A policy's pictures are
            prepared by the saved preprocessor; without one they are normalised as LeRobot trains, by ImageNet's statistics.
        device: where a policy that is not loaded yet goes.

    Raises:
        ValueError: there is no such policy, it is of no supported type, or it sees no pictures.
    """
    if isinstance(policy, str) and policy == THUMBNAILS:
        return Thumbnails()
    if isinstance(policy, str) and policy.startswith(TRANSFORMERS):
        return VisionModelEncoder(policy.removeprefix(TRANSFORMERS), device)
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


def _few(cells: Float[Tensor, "n cells"]) -> Float[Tensor, "n size"]:
    """At most `WIDEST` numbers a picture: more are projected onto random directions."""
    size = cells.shape[1]
    if size <= WIDEST:
        return cells
    drawn = torch.randn(size, WIDEST, generator=torch.Generator().manual_seed(0))
    return cells @ (drawn / math.sqrt(WIDEST)).to(cells.device)


def _add_weights(digest: Any, weights: Iterable[tuple[str, Tensor]]) -> None:
    for name, value in weights:
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


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
