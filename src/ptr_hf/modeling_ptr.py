"""`PTRPolicy`: a LeRobot policy, its consequence scorer and its belief as one module with one forward.

A step, as data: a batch of segments is cut into chunks and futures, the vision tower sees every view once, the base
policy is traced chunk by chunk under the belief (all chunks at once without one), the futures become targets, and the
objective scores and weighs each chunk. `update()` after the optimiser step moves the moving average, the queue and the
controller.
"""

import logging
from collections import deque
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from lerobot.configs import PreTrainedConfig
from lerobot.datasets import LeRobotDatasetMetadata
from lerobot.policies.factory import get_policy_class
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.processor import PolicyProcessorPipeline
from torch import Tensor, nn

from ptr_hf.artifacts.checkpoint import load_policy, save_policy
from ptr_hf.artifacts.peft import merged
from ptr_hf.configuration_ptr import PTRConfig
from ptr_hf.constants import ACTION_DIM_PAD, BASE_PREFIX
from ptr_hf.data.bookkeeping import mend_metadata
from ptr_hf.data.datasets import check_one_instruction
from ptr_hf.data.masked_segments import MaskedSegments
from ptr_hf.data.normalization import policy_statistics
from ptr_hf.data.segments import (
    ACTION,
    PAD_SUFFIX,
    SOURCE_INDEX,
    Segment,
    SegmentLayout,
    is_rows,
    segment_rows,
    split_segment,
)
from ptr_hf.files.foreign_code import no_foreign_code
from ptr_hf.hyperparameters import PAPER_WARMUP_STEPS
from ptr_hf.method import (
    ChunkBatch,
    ConsequenceEncoder,
    ObjectiveOutput,
    PTRObjective,
)
from ptr_hf.pathway.build import NO_DATA, BeliefModule, DataSizes, build_objective
from ptr_hf.pathway.summaries import motion_of, summaries
from ptr_hf.pathway.targets import consequence_targets, samples_of
from ptr_hf.policies import AdapterBase, Views, make_adapter, refusal, supported_policies
from ptr_hf.policies.base import unwrap
from ptr_hf.policies.batches import without_unused
from ptr_hf.scores import EpisodeTable, FrameWeights, ScoreWeigher, weighed_chunks, weighed_loss, weight_metrics

logger = logging.getLogger(__name__)


class PTRPolicy(PreTrainedPolicy):
    """Posterior-Transition Reweighting around a LeRobot policy.

    It is a LeRobot policy itself: `forward(batch) -> (loss, metrics)`, `select_action`, `predict_action_chunk`, `reset`,
    and `update()`, which LeRobot's training loop calls after every optimiser step.

    Args:
        config: names the base policy and the method's hyperparameters.
        base_policy: an existing LeRobot policy (or a PEFT model around one) to wrap; otherwise `config.base` describes a new
            one. `from_base` loads the one that `config.base_path` names.
        sizes: of the data whose verdicts are remembered; `set_episodes` chooses others.
        kwargs: what LeRobot's factory passes along (dataset statistics and metadata); they go to a base policy built here.

    Raises:
        ValueError: `config.base_path` names trained weights, and no `base_policy` has them.

    Example:
        >>> policy = PTRPolicy.from_base(PTRConfig(base_path="lerobot/smolvla_base", num_belief_tokens=0))
        >>> loss, metrics = policy(batch)
    """

    config_class = PTRConfig
    name = "ptr"

    def __init__(
        self,
        config: PTRConfig,
        base_policy: nn.Module | None = None,
        sizes: DataSizes = NO_DATA,
        **kwargs: Any,
    ) -> None:
        super().__init__(config)
        self.config: PTRConfig = config
        meta = kwargs.get("dataset_meta")
        if meta is not None:
            # lerobot-train asks for the processors next, which would normalise by what there is
            policy_statistics(config.base_config if base_policy is None else unwrap(base_policy).config, meta, None)
        if base_policy is None:
            # LeRobot's factory, which names the data, has no later moment for weights than this
            if config.base_path is not None and meta is None:
                raise ValueError(
                    f"PTRPolicy(config) loads no weights, and base_path={config.base_path} names some: call "
                    "PTRPolicy.from_base(config)."
                )
            base_policy = build_base(config, **kwargs)
        self.base: PreTrainedPolicy = base_policy
        self._adapter: AdapterBase | None = None
        chunk = self.adapter.chunk_size
        if config.chunk_size not in (None, chunk):
            raise ValueError(
                f"chunk_size={config.chunk_size} was asked for, but the base policy predicts chunks of {chunk}; leave "
                "chunk_size out, or load the base policy through base_path with another chunk_size."
            )
        config.adopt(unwrap(base_policy).config)
        self.objective: PTRObjective | None = None
        self.target_encoder: ConsequenceEncoder | None = None
        self.belief: BeliefModule | None = None
        self.frame_weights: FrameWeights | None = None
        self._sizes = sizes
        self._masked = MaskedSegments()
        # A tuple keeps a shared tower out of this module's parameters: the base policy owns them.
        self._shared_tower: tuple[nn.Module, ...] = ()
        if config.scorer:
            self._build_scorer()
        if config.num_belief_tokens:
            adapter = self.adapter
            self.belief = BeliefModule(
                adapter.action_dim,
                adapter.hidden_dim,
                adapter.context_dim,
                config.num_belief_tokens,
                config.belief_temperature,
            )
        self.to(config.device)
        if meta is not None:
            _check_bookkeeping(meta)
            self._meet_data(meta)
            self.set_episodes(EpisodeTable.from_metadata(meta, config.standardize_by))
        self.reset()

    @classmethod
    def from_base(cls, config: PTRConfig) -> "PTRPolicy":
        """A policy around the trained LeRobot policy that `config.base_path` names.

        Args:
            config: its `base` overrides fields of the trained policy's configuration.

        Raises:
            ValueError: the policy is not one that PTR supports, or its files are damaged or name code that would run.

        Example:
            >>> policy = PTRPolicy.from_base(PTRConfig(base_path="lerobot/smolvla_base"))
        """
        return cls(config, base_policy=build_base(config))

    # ---- construction ----------------------------------------------------------------------------------------------

    @property
    def adapter(self) -> AdapterBase:
        """What PTR reads from the base policy."""
        if self._adapter is None or self._adapter.policy is not self.base:
            self._adapter = make_adapter(self.base)
        return self._adapter

    @property
    def target_layer(self) -> int:
        """Layer of the consequence encoder: the configured one, or the middle of the policy's vision tower."""
        return self.config.target_layer or max(1, self.adapter.num_tower_layers() // 2)

    def _build_scorer(self) -> None:
        config, adapter = self.config, self.adapter
        self.objective = self._new_objective()
        self.set_run_length(config.run_steps)
        if not config.reads_futures:
            return
        layer = self.target_layer
        shared = adapter.tower_is_frozen()
        tower = adapter.build_tower(layer, share=shared)
        self._shared_tower = (tower,) if shared else ()
        self.target_encoder = ConsequenceEncoder(None if shared else tower, config.ema_decay, config.target_eps)

    def _new_objective(self) -> PTRObjective:
        """A fresh objective for the data that are known."""
        target_dim = self.adapter.target_dim(self.target_layer) if self.config.reads_futures else 0
        return build_objective(self.config, self.adapter, target_dim, self._sizes)

    def set_run_length(self, steps: int | None) -> None:
        """Fix the scorer's warm-up: a share of the run's steps, or the paper's count when the length is unknown."""
        self.config.run_steps = steps
        if self.objective is None:
            return
        warmup = self.config.scorer_warmup_steps
        if 0 < warmup < 1:
            warmup = PAPER_WARMUP_STEPS if steps is None else round(warmup * steps)
        self.objective.warmup_steps = int(warmup)

    def set_episodes(self, episodes: EpisodeTable, seed: int = 0) -> None:
        """Say which episodes the run trains on; a score that is kept per episode starts anew.

        Args:
            episodes: of the training data.
            seed: of the random weights, a control.
        """
        config, old = self.config, self.objective
        if old is None or old.weigher is None:
            return
        sizes = DataSizes(episodes.num_episodes, episodes.num_slots(config.slot_frames), episodes.num_tasks)
        if sizes != self._sizes:
            self._sizes = sizes
            self.objective = self._new_objective()
            self.to(config.device)
            # heads that do not depend on the data are kept: a trained scorer can be reused on new demonstrations
            own, learned = self.objective.state_dict(), old.state_dict()
            kept = {name: value for name, value in learned.items() if own[name].shape == value.shape}
            self.objective.load_state_dict(own | kept)
            self.set_run_length(config.run_steps)
        weigher = None if self.objective is None else self.objective.weigher
        assert isinstance(weigher, ScoreWeigher)
        weigher.lay_out(episodes, seed)

    def set_weights(self, weights: FrameWeights | None) -> None:
        """Say how much every frame of the training data counts, of a policy without a scorer; no checkpoint holds them.

        Args:
            weights: by the batches' `index`; None counts all alike.

        Raises:
            ValueError: the policy's scorer weighs.
        """
        if weights is not None and self.objective is not None:
            raise ValueError("The policy trains a scorer that weighs its data: build it with preset='ptr_offline'.")
        self.frame_weights = weights
        self.config.weights_record = {} if weights is None else dict(weights.record)

    def _meet_data(self, meta: LeRobotDatasetMetadata) -> None:
        """Under LeRobot's own loop: whether it can read the data, and the weights that the configuration names for them."""
        check_one_instruction(meta, self.config.layout)
        if self.config.weights is not None:
            if PTRConfig.weights_reader is None:
                raise ValueError(
                    f"weights={self.config.weights} are read by PTRTrainer, and by LeRobot's commands: elsewhere import "
                    "lerobot_policy_ptr first."
                )
            # each process for itself: an inspection is the same on all of them
            self.set_weights(PTRConfig.weights_reader(self.config, meta.root, meta))

    @property
    def weighs(self) -> bool:
        """Whether training weighs chunks: there is a scorer, or a given weight is not 1."""
        return self.objective is not None or (self.frame_weights is not None and self.frame_weights.move)

    def seed_draws(self, seed: int) -> None:
        """Seed the method's private random stream (queue draws, derangements)."""
        if self.objective is not None:
            self.objective.seed = seed

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """Turn on the base policy's gradient checkpointing; transformers' Trainer calls this, its options do not apply.

        Raises:
            ValueError: the base policy has none.
        """
        self.adapter.gradient_checkpointing_enable()

    def compile_base(self, **options: Any) -> None:
        """Compile the regions of the base policy that the method does not read, in place; keys and files stay the same.

        Args:
            options: of `torch.compile`.

        Raises:
            ValueError: the base policy has no such region.
        """
        modules = list(self.adapter.compilable())
        if not modules:
            raise ValueError(
                f"No part of the {self.adapter.family} policy can be compiled under PTR: leave torch_compile out."
            )
        for module in modules:
            module.compile(**options)

    # ---- training --------------------------------------------------------------------------------------------------

    def forward(
        self, batch: dict[str, Any], reduction: Literal["mean", "none"] = "mean"
    ) -> tuple[Tensor | ObjectiveOutput, dict[str, Any] | None]:
        """LeRobot's contract, for a batch of segments read at `config.layout`.

        Args:
            batch: collated and preprocessed.
            reduction: "mean" gives the whole objective (Eq. 32) and its metrics as floats; "none" gives the per-chunk
                `ObjectiveOutput` and no metrics, for a caller that puts the objective together itself.

        Returns:
            The loss (a 0-d tensor, or per chunk), and the metrics by name, None with reduction="none".
        """
        if self.objective is None:
            plain = self._plain(batch)
            if self.training and self.weighs:
                weighed = self._weighed(plain)
                if reduction == "none":
                    return weighed, {}
                loss = weighed_loss(weighed)
                return loss, _native({"loss_action": loss, **weight_metrics(weighed)})
            if ACTION_DIM_PAD not in plain:
                with self.adapter.features_scope(plain) as given:
                    return self.base(given)
            # LeRobot's own loss would count the dimensions that a robot does not have
            loss, valid = self.adapter.trace(plain).loss, ~plain[ACTION + PAD_SUFFIX].all(dim=1)
            return (loss * valid).sum() / valid.sum().clamp(min=1), {}
        output = self.compute(batch)
        if reduction == "none":
            return output, {}
        terms = self.objective.combine(output)
        named = {f"loss_{name}" if name != "loss" else name: value for name, value in terms.items()}
        named |= self.objective.metrics(output)
        masked = ~output.chunk_valid.view(self.config.layout.segment_length, -1).any(dim=0)
        values = _native({**named, "masked": masked.sum()})
        if sentence := self._masked.count(int(values.pop("masked")), len(masked), "read so far"):
            logger.warning("%s", sentence)
        return terms["loss"], values

    def _weighed(self, plain: dict[str, Any]) -> ObjectiveOutput:
        """The loss and the given weight of every chunk."""
        assert self.frame_weights is not None
        weight, valid = self.frame_weights.of(plain["index"]), ~plain[ACTION + PAD_SUFFIX].all(dim=1)
        loss = self.adapter.losses(self.adapter.arrange(plain))
        return weighed_chunks(loss, weight, valid, plain.get("task_index"), plain.get(SOURCE_INDEX))

    def _plain(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Without a scorer the base policy sees its own batch; several chunks become rows."""
        # without futures every row is a chunk
        return batch if self.config.layout.is_plain else segment_rows(batch, self.config.layout)

    def split(self, batch: dict[str, Any], layout: SegmentLayout | None = None) -> Segment:
        """Cut a preprocessed batch of segments into chunks and futures that the base policy's adapter can read.

        Args:
            batch: what the preprocessor made of `segment_rows`, or preprocessed segments.
            layout: the batch was read at; by default the policy's own.

        Raises:
            ValueError: the policy's preprocessor needed rows, or the batch was not read at this layout.
        """
        if self.adapter.preprocesses_rows and not is_rows(batch):
            raise ValueError(
                f"The {self.adapter.family} policy's preprocessor reads one chunk a row, so segments must be laid out as rows "
                "before it: use PTRTrainer, or the preprocessor of make_ptr_pre_post_processors."
            )
        return split_segment(self.adapter.arrange(batch), layout or self.config.layout)

    def compute(self, batch: dict[str, Any]) -> ObjectiveOutput:
        """Trace, target, score and weigh every chunk of a batch of segments.

        Returns:
            per-chunk tensors (N,), N = T·B, time-major; nothing is reduced and nothing has left the device.
        """
        if self.objective is None:
            raise ValueError(
                "This policy has no scorer (preset='sft'); call forward(batch) for the base policy's loss."
            )
        return self.objective(self.read(self.split(batch)))

    def read(self, segment: Segment) -> ChunkBatch:
        """What the objective asks of a batch of segments: losses, summaries and targets of its chunks, nothing yet compared."""
        views = self._encode_views(segment)
        # before the forward, whose graph is then held until the backward: this pass of the tower keeps nothing
        targets, current = self._targets(segment, views)
        traced = self._trace(segment, views)
        details = {}
        if self.objective is not None and self.objective.weigher is not None:
            details = {"current": current, "motion": motion_of(segment.chunks), "index": segment.index}
        return ChunkBatch(
            **traced,
            **details,
            samples=samples_of(segment, targets, self.adapter, self.config.state_dim),
            chunk_valid=segment.chunk_valid,
            segment_length=segment.length,
        )

    def chunk_losses(self, segment: Segment) -> Float[Tensor, " rows"]:
        """The policy's own loss of every chunk, traced chunk by chunk so that policies draw the same noise.

        Args:
            segment: at any layout whose chunks are this policy's.
        """
        if self.belief is not None:
            return self._trace(segment, self._encode_views(segment))["loss"]
        return torch.cat([self.adapter.trace(segment.chunk(t)).loss for t in range(segment.length)])

    def _encode_views(self, segment: Segment) -> Views:
        """The policy's own vision tower on the current views of all chunks, in one batch."""
        return self.adapter.encode_views(segment.chunks, self.target_layer if self._shared_tower else None)

    def _trace(self, segment: Segment, views: Views) -> dict[str, Any]:
        """What the base policy's forwards give a `ChunkBatch`, N = T·B rows, time-major.

        One forward per chunk under the carried belief (4.1), or one for the whole segment without belief.
        """
        if self.belief is None:
            trace = self.adapter.trace(segment.chunks, views=views)
            zero = torch.zeros_like(trace.loss.detach())
            return summaries(trace) | {"entropy": zero, "diversity": zero}
        memory, tokenizer = self.belief.memory, self.belief.tokenizer
        tokens = memory.start(segment.batch_size)
        traced: list[dict[str, Tensor]] = []
        for t in range(segment.length):
            trace = self.adapter.trace(
                segment.chunk(t), belief=memory.to_backbone(tokens), views=views.rows(segment.rows(t))
            )
            update = tokenizer(trace.action_hidden, trace.action_tokens, trace.action_mask)
            tokens = memory.carry(update.tokens)
            traced.append(summaries(trace) | {"entropy": update.row_entropy, "diversity": update.row_diversity})
        return {name: torch.cat([part[name] for part in traced]) for name in traced[0]}

    def _targets(
        self, segment: Segment, views: Views
    ) -> tuple[Float[Tensor, "rows target_dim"], Float[Tensor, "rows target_dim"]]:
        """y⁺ of every chunk, and the embedding of its own view where a score reads it; see `consequence_targets`."""
        return consequence_targets(
            segment,
            views,
            self.config.layout,
            self.adapter,
            self.target_encoder,
            self._shared_tower[0] if self._shared_tower else None,
            with_current=self.objective is not None and self.objective.weigher is not None,
        )

    @torch.no_grad()
    def update(self) -> None:
        """After the optimiser step, in this order and identically on every rank: EMA, queue, controller."""
        if self.objective is None:
            return
        if self.target_encoder is not None and not self.target_encoder.shared:
            self.target_encoder.update(self.adapter.tower_parameters(self.target_layer))
        self.objective.after_step()
        if self.objective.step % self.config.controller_interval == 0:
            self.objective.update_controller()

    def get_optim_params(self) -> Any:
        """The base policy's own parameter groups, and the side pathway's parameters as one more."""
        return [*self.base_groups(), *self.side_groups()]

    def side_groups(self) -> list[dict[str, Any]]:
        """The side pathway's parameters as one group, with the learning rate that was chosen for it; none without any."""
        side = [p for name, p in self.named_parameters() if not name.startswith(BASE_PREFIX) and p.requires_grad]
        rate = self.config.head_learning_rate
        own_rate = {} if rate is None else {"lr": rate}
        return [{"params": side, **own_rate}] if side else []

    def base_groups(self) -> list[dict[str, Any]]:
        """The base policy's groups: LeRobot's policies return groups, parameters, or parameters by name."""
        groups = unwrap(self.base).get_optim_params()
        if isinstance(groups, list):
            return list(groups)
        if isinstance(groups, dict):
            built = self.config.base_config.get_optimizer_preset().build(groups)
            assert isinstance(built, torch.optim.Optimizer)
            return [{"params": group["params"], "lr": group["lr"]} for group in built.param_groups]
        return [{"params": [p for p in groups if p.requires_grad]}]

    def side_state_dict(self) -> dict[str, Tensor]:
        """Everything but the base policy: scorer, belief, moving average (when not shared), queue, controller."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith(BASE_PREFIX)}

    # ---- inference -------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget the episode: action queue and belief."""
        unwrap(self.base).reset()
        self._action_queue: deque[Tensor] = deque()
        self._belief_tokens: Tensor | None = None

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Any], **kwargs: Any) -> Tensor:
        """Predict the next action chunk; with belief tokens it reads and then updates the carried belief.

        Args:
            batch: one preprocessed observation a row, as LeRobot's processors return it.
            kwargs: as the base policy takes them.

        Returns:
            Actions (batch, chunk, action_dim), normalised: the postprocessor turns them into the robot's units.

        Raises:
            ValueError: the batch has another number of rows than the belief that is carried; `reset` begins an episode.
        """
        self.eval()
        if self.belief is None:
            with self.adapter.action_scope(batch):
                actions = self.base.predict_action_chunk(batch, **kwargs)
            return without_unused(actions, batch.get(ACTION_DIM_PAD))
        memory = self.belief.memory
        rows = next(value.shape[0] for value in batch.values() if isinstance(value, Tensor) and value.ndim > 0)
        if self._belief_tokens is None:
            self._belief_tokens = memory.start(rows)
        if len(self._belief_tokens) != rows:
            raise ValueError(
                f"The belief of this episode has {len(self._belief_tokens)} rows but the batch has {rows}; call reset() "
                "before a batch of another size."
            )
        rollout = self.adapter.rollout(
            self.adapter.arrange(batch), belief=memory.to_backbone(self._belief_tokens), **kwargs
        )
        update = self.belief.tokenizer(rollout.action_hidden, rollout.action_tokens, rollout.action_mask)
        self._belief_tokens = memory.carry(update.tokens)
        return rollout.actions

    @torch.no_grad()
    def select_action(self, batch: dict[str, Any], **kwargs: Any) -> Tensor:
        """Give the next action; a chunk is predicted whenever the last one is used up.

        Args:
            batch: one preprocessed observation a row, as LeRobot's processors return it.
            kwargs: as the base policy takes them.

        Returns:
            Actions (batch, action_dim), normalised: the postprocessor turns them into the robot's units.
        """
        if self.belief is None:
            self.eval()
            with self.adapter.action_scope(batch):
                action = self.base.select_action(batch, **kwargs)
            return without_unused(action, batch.get(ACTION_DIM_PAD))
        self.adapter.observe(batch)
        if not self._action_queue:
            steps = int(vars(self.config.base_config)["n_action_steps"])
            chunk = self.predict_action_chunk(batch, **kwargs)[:, :steps]
            self._action_queue.extend(chunk.transpose(0, 1))
        return self._action_queue.popleft()

    def merge_adapter(self) -> None:
        """Fold a PEFT adapter into the base policy's weights for good; nothing to do without one."""
        self.base = merged(self.base, in_place=True)

    # ---- files -----------------------------------------------------------------------------------------------------

    def _save_pretrained(self, save_directory: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        save_policy(self, save_directory, state_dict)

    def export_base(self, folder: str | Path, without_belief: bool = False) -> Path:
        """Write the base policy alone, as LeRobot saves it, for LeRobot without ptr_hf; a PEFT adapter is merged.

        Args:
            folder: created if missing; the processors are the caller's to save (`ptr-export` copies them).
            without_belief: export a policy trained with belief tokens too, which then acts without them.

        Returns:
            The folder.

        Raises:
            ValueError: the policy was trained with belief tokens, which no plain LeRobot policy reads.
        """
        if self.belief is not None and not without_belief:
            raise ValueError(
                f"This policy was trained with {self.config.num_belief_tokens} belief tokens, and its base alone acts without "
                "them, which it was not trained for: run it with ptr_hf installed, or ask for it with without_belief=True."
            )
        merged(self.base).save_pretrained(Path(folder))
        return Path(folder)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload policy",
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        tags: Sequence[str] = (),
        preprocessor: PolicyProcessorPipeline | None = None,
        postprocessor: PolicyProcessorPipeline | None = None,
        license: str | None = None,
        **_: Any,
    ) -> str:
        """Publish the policy with a card that says what is known of it; `PTRTrainer.push_to_hub` knows its run too.

        Args:
            repo_id: user/name.
            commit_message: of the one commit.
            private: whether a new repo is private.
            token: of the Hub; by default the one that `hf auth login` stored.
            branch: to push to, created where it is missing; by default main.
            tags: git tags to set on the commit.
            preprocessor: the policy's LeRobot pipeline; whoever runs it needs it.
            postprocessor: likewise.
            license: for the card, as the Hub names it.

        Returns:
            the address of the commit.

        Raises:
            PushError: it did not get through; the message says where the files are and how to push them again.
        """
        from ptr_hf.publishing.push import Destination
        from ptr_hf.publishing.push_policy import push_policy

        processors = [pipeline for pipeline in (preprocessor, postprocessor) if pipeline is not None]
        if len(processors) == 1:
            raise ValueError("A policy is published with both of its processors or with none: give the other one too.")
        destination = Destination(repo_id, private, branch, token)
        return push_policy(self, destination, processors=processors, license=license, message=commit_message, tags=tags)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_name_or_path: str | Path,
        *,
        config: PreTrainedConfig | None = None,
        merge_adapter: bool = False,
        trusted_sources: Collection[str] = (),
        **kwargs: Any,
    ) -> "PTRPolicy":
        """Load a PTR checkpoint from a folder or the Hub, strictly: every key, every shape.

        Args:
            pretrained_name_or_path: folder or Hub id.
            config: replaces the saved configuration (LeRobot's factory passes the one it has parsed).
            merge_adapter: fold a PEFT adapter into the base policy's weights; by default it is kept, and trainable.
            trusted_sources: repos whose code LeRobot's processors may load, beyond the ones that LeRobot names itself.
            kwargs: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only` for the Hub.

        Returns:
            The policy, in eval mode.

        Raises:
            ValueError: the checkpoint is none, is damaged, or names what may not be loaded; the sentence names the file.

        Example:
            >>> policy = PTRPolicy.from_pretrained("me/my_policy")
        """
        meta = kwargs.get("dataset_meta")
        _check_bookkeeping(meta)
        policy = load_policy(
            cls,
            pretrained_name_or_path,
            config=config,
            merge_adapter=merge_adapter,
            trusted_sources=trusted_sources,
            **kwargs,
        )
        if meta is not None:
            # LeRobot's training loop, which reads the data itself, names them
            policy._meet_data(meta)
        return policy


def _native(values: dict[str, Tensor]) -> dict[str, Any]:
    """Numbers as LeRobot's loop logs them; one transfer from the device for all."""
    return dict(zip(values, torch.stack([value.detach().double() for value in values.values()]).tolist(), strict=True))


def _check_bookkeeping(meta: Any) -> None:
    """LeRobot's factory gives the metadata that its dataset reads by: what the data settle is set right for both."""
    if isinstance(meta, LeRobotDatasetMetadata):
        for sentence in mend_metadata(meta, fixed_index=True):
            logger.warning("%s", sentence)


@no_foreign_code()
def build_base(config: PTRConfig, **kwargs: Any) -> PreTrainedPolicy:
    """The base policy that a configuration describes: new, or with the trained weights that `base_path` names.

    Args:
        config: of the PTR policy.
        kwargs: as LeRobot's policies take them.

    Raises:
        ValueError: PTR does not support policies of its type.
    """
    base_config = config.base_config
    if base_config.type not in supported_policies():
        raise ValueError(refusal(base_config.type))
    policy_class = get_policy_class(base_config.type)
    if config.base_path is None:
        return policy_class(base_config, **kwargs)
    return policy_class.from_pretrained(config.base_path, config=base_config, revision=config.base_revision, **kwargs)
