"""The observations that followed a segment's chunks (Section 4.2): encoded once each, and as the samples that scorers compare."""

import torch
from jaxtyping import Bool, Float, Shaped
from lerobot.utils.constants import OBS_STATE
from torch import Tensor, nn

from ptr_hf.constants import CAMERA_MASK_SUFFIX
from ptr_hf.data.segments import Segment, SegmentLayout
from ptr_hf.method import ConsequenceEncoder, Samples
from ptr_hf.policies import AdapterBase, Views
from ptr_hf.policies.base import view_key


@torch.no_grad()
def consequence_targets(
    segment: Segment,
    views: Views,
    layout: SegmentLayout,
    adapter: AdapterBase,
    encoder: ConsequenceEncoder | None,
    shared_tower: nn.Module | None,
    with_current: bool,
) -> tuple[Float[Tensor, "rows target_dim"], Float[Tensor, "rows target_dim"]]:
    """y⁺ of every chunk (4.2), and the same embedding of its own view where a score reads it (else zeros).

    Every view is encoded once, and one the policy has just seen is not encoded again.

    Args:
        segment: a batch of segments.
        views: what the policy's own vision tower made of the chunks.
        layout: the segments were read at.
        adapter: of the base policy.
        encoder: of consequences; None where no score reads them.
        shared_tower: the base policy's own, where it is frozen; None where the encoder has a moving average.
        with_current: whether the chunks' own views are asked for.
    """
    rows = segment.length * segment.batch_size
    if encoder is None:
        nothing = segment.index.new_zeros(rows, 0, dtype=torch.float32)
        return nothing, nothing
    size = segment.batch_size
    # a view is the future of some chunk ("future", f), or else the current view of chunk t ("chunk", t)
    shown_by = {
        segment.future_index[t]: chunk for t in range(segment.length) if (chunk := layout.future_chunk(t)) is not None
    }
    embeddings: dict[tuple[str, int], Tensor] = {}
    cameras = recorded_cameras(segment, adapter)
    if shared_tower is not None:
        for t in range(segment.length) if with_current else sorted(shown_by.values()):
            states = [state[segment.rows(t)] for state in views.tower.values()]
            embeddings["chunk", t] = encoder.embed(states, camera_mask(segment, cameras, [("chunk", t)]))
        embeddings |= {("future", future): embeddings["chunk", chunk] for future, chunk in shown_by.items()}
    wanted = [("future", future) for future in sorted(set(segment.future_index))]
    if with_current:
        wanted += [("chunk", t) for t in range(segment.length) if t not in shown_by.values()]
    unseen = [view for view in wanted if view not in embeddings]
    if unseen:
        tower = shared_tower if shared_tower is not None else encoder.tower
        assert tower is not None
        features = []
        for key in cameras:
            kept = view_key(key)
            shown = torch.cat([_view(segment, kept if kept in segment.futures else key, *view) for view in unseen])
            features.append(shown.unsqueeze(1) if kept in segment.futures else adapter.encode_image(tower, key, shown))
        encoded = encoder.embed(features, camera_mask(segment, cameras, unseen))
        encoded = encoded.unflatten(0, (len(unseen), size))
        embeddings |= dict(zip(unseen, encoded.unbind(0), strict=True))
    targets = torch.cat([embeddings["future", future] for future in segment.future_index])
    if not with_current:
        return targets, torch.zeros_like(targets)
    embeddings |= {("chunk", chunk): embeddings["future", future] for future, chunk in shown_by.items()}
    return targets, torch.cat([embeddings["chunk", t] for t in range(segment.length)])


def samples_of(
    segment: Segment, targets: Float[Tensor, "rows target_dim"], adapter: AdapterBase, state_dim: int
) -> Samples:
    """A segment's consequences as candidates of its own and of other chunks.

    Args:
        segment: a batch of segments.
        targets: of its chunks.
        adapter: of the base policy.
        state_dim: width of the robot's state, by which hard negatives are found; 0 without one. EVO1 fills it up with zeros.
    """
    state = segment.chunks.get(OBS_STATE)
    if state is None or not state_dim:
        state = targets.new_zeros(len(targets), 0)
    elif state.ndim > 2:
        state = state[:, -1]
    state = state[:, :state_dim]
    valid = segment.future_valid
    cameras = recorded_cameras(segment, adapter)
    shown = camera_mask(segment, cameras, [("future", future) for future in segment.future_index])
    return Samples(
        targets=targets,
        # a consequence that no camera saw is none
        valid=valid if shown is None else valid & shown.any(dim=1),
        task=segment.task,
        source=segment.source,
        episode=segment.episode,
        frame=segment.target_index,
        state=state.float(),
    )


def recorded_cameras(segment: Segment, adapter: AdapterBase) -> list[str]:
    """The policy's cameras that the data has: one that the robot lacks is skipped, as the policy itself does."""
    return [key for key in adapter.target_keys() if key in segment.futures or view_key(key) in segment.futures]


def camera_mask(
    segment: Segment, cameras: list[str], shown: list[tuple[str, int]]
) -> Bool[Tensor, "rows cameras"] | None:
    """Which views have which camera, where the dataset says that some lack one (LeRobot's `<camera>_padding_mask`)."""
    names = [key + CAMERA_MASK_SUFFIX for key in cameras]
    if not any(name in segment.chunks for name in names):
        return None
    everywhere = torch.ones(segment.batch_size, dtype=torch.bool, device=segment.index.device)
    masks = [
        torch.cat(
            [_view(segment, name, kind, number) if name in segment.chunks else everywhere for kind, number in shown]
        )
        for name in names
    ]
    return torch.stack(masks, dim=1)


def _view(segment: Segment, key: str, kind: str, number: int) -> Shaped[Tensor, "batch ..."]:
    """One camera's frames of a future, or of a chunk's own time, of every segment of the batch."""
    if kind == "future":
        return segment.futures[key][number]
    own = segment.chunks[key][segment.rows(number)]
    # a policy with several observation steps sees the last one as its present
    return own if own.ndim == segment.futures[key][0].ndim else own[:, -1]
