"""The part of `PTRTrainer` that publishes: the card, complete pushes in the course of training, and the final one.

transformers' Trainer would push a card about another kind of model, leave the scorer and the processors out of pushes
during training, and upload its pickled arguments with the token in them.
"""

import logging
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from peft import PeftModel
from transformers import Trainer
from transformers.trainer_utils import HubStrategy, SchedulerType

from ptr_hf.artifacts.peft import source_of
from ptr_hf.modeling_ptr import PTRPolicy
from ptr_hf.policies.base import unwrap
from ptr_hf.publishing.card_facts import BasePolicy, CardFacts, Evaluation, TrainingData, TrainingRun
from ptr_hf.publishing.model_card import library_versions, write_model_card
from ptr_hf.publishing.push import Destination, PushError, local_needs, published_files, stage
from ptr_hf.report import (
    DYNAMICS_FILE,
    REPORT_FILE,
    SCORES_FILE,
    Dynamics,
    effective_sample_share,
    read_dynamics,
    read_scores,
    weight_shares,
    write_report,
)
from ptr_hf.report.evaluation import main_run
from ptr_hf.report.files import beside_the_run
from ptr_hf.training.arguments import PTRTrainingArguments
from ptr_hf.training.evaluation import EVALUATION_FILE, read_evaluations

CARD_FILE = "README.md"
PATIENCE = 600
"""Seconds that the end of training waits for a push in the background: the client itself waits for an answer for ever."""

logger = logging.getLogger(__name__)


class PublishingTrainer(Trainer):
    """A Trainer whose pushes are whole: policy, processors, `ptr_*`, card and report.

    Attributes:
        training_data: what the policy is trained on, for the card.
        random_weights: whether the policy started from a configuration alone.
    """

    args: PTRTrainingArguments
    training_data: Sequence[TrainingData] = ()
    random_weights: bool = False
    _destination: Destination | None = None
    _pushes: "tuple[Future[CommitInfo], ...]" = ()

    @property
    def policy(self) -> PTRPolicy:
        """The policy in training, without Accelerate's wrappers."""
        return self.accelerator.unwrap_model(self.model)

    # ---- card and report ---------------------------------------------------------------------------------------------

    def card_facts(self, repo_id: str | None = None) -> CardFacts:
        """What is known of the run so far; what is not known stays out of the card."""
        args, config, output = self.args, self.policy.config, Path(self.args.output_dir)
        base = unwrap(self.policy.base).config
        shares: dict[str, Any] = {}
        if (output / SCORES_FILE).is_file():
            with beside_the_run(f"The card leaves {SCORES_FILE} out"):
                scores = read_scores(output / SCORES_FILE)
                shares = {
                    "task_shares": weight_shares(scores, "task"),
                    "source_shares": weight_shares(scores, "source"),
                    "effective_sample_size": effective_sample_share(scores),
                }
        source = config.base_path or (None if base.pretrained_path is None else str(base.pretrained_path))
        per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return CardFacts(
            config=config,
            base=BasePolicy(
                policy_type=base.type,
                source=None if self.random_weights else source,
                revision=config.base_revision,
                random_weights=self.random_weights,
            ),
            chunk_size=config.resolved_chunk_size,
            peft=isinstance(self.policy.base, PeftModel) and source_of(self.policy.base) is not None,
            data=self.training_data,
            training=TrainingRun(
                steps=self.state.global_step or None,
                batch_size=per_step,
                processes=args.world_size,
                learning_rate=args.learning_rate,
                lr_scheduler=SchedulerType(args.lr_scheduler_type).value,
                weight_decay=args.weight_decay,
                precision=args.mixed_precision if args.mixed_precision != "no" else "float32",
                seed=args.seed,
            ),
            dynamics=self._dynamics(),
            evaluations=self._evaluations(),
            versions=library_versions(),
            license=args.license,
            repo_id=repo_id,
            **shares,
        )

    def _dynamics(self) -> Dynamics | None:
        path = Path(self.args.output_dir) / DYNAMICS_FILE
        with beside_the_run("Card and report say nothing of the training's dynamics"):
            return read_dynamics(path) if path.is_file() else None
        return None

    def _evaluations(self) -> list[Evaluation]:
        names = ("environment", "task", "episodes", "success", "standard_error", "step")
        with beside_the_run("The card leaves the evaluations out"):
            rows = read_evaluations(self.args.output_dir)
            known: list[dict[str, Any]] = [{name: row.get(name) for name in names} for row in rows]
            return [Evaluation(**row) for row in known]
        return []

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the card with its pictures and the report to the output folder, where transformers would write its own."""
        if self.is_world_process_zero():
            self.write_card(Path(self.args.output_dir))

    def write_card(self, folder: Path) -> None:
        """Write README.md with its pictures, and the run's report, into a folder; a figure that fails costs the figure alone.

        A report in the folder that is newer than the dynamics and the scores stays: whoever wrote it may have known more, such as
        results, the truth about the data or another run beside this one.
        """
        with beside_the_run("The card could not be written"):
            write_model_card(self.card_facts(self._destination.repo_id if self._destination else None), folder)
        dynamics = self._dynamics()
        if dynamics is not None and dynamics.runs and not self._is_reported(folder):
            with beside_the_run("The report could not be written"):
                report = write_report(
                    folder,
                    dynamics=dynamics,
                    hyperparameters=self.policy.config.hyperparameters(),
                    chance=dynamics.chance(main_run(dynamics)),
                    weights=self.policy.config.weights_record or None,
                )
                logger.info("report written to %s", report)

    def _is_reported(self, folder: Path) -> bool:
        report, output = folder / REPORT_FILE, Path(self.args.output_dir)
        drawn = [path.stat().st_mtime_ns for name in (DYNAMICS_FILE, SCORES_FILE) if (path := output / name).is_file()]
        return report.is_file() and report.stat().st_mtime_ns >= max(drawn, default=0)

    # ---- pushes ------------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As transformers' Trainer; beside the policy of a trained run it leaves the model card and the report.

        With `push_to_hub=True` it publishes too; what fails there is reported, not raised.

        Args:
            output_dir: folder; by default `args.output_dir`.
        """
        super().save_model(output_dir, _internal_call=True)
        if _internal_call:
            return
        if self.args.push_to_hub:
            try:
                self.push_to_hub(commit_message="Model save")
            except PushError as error:
                logger.warning("%s", error)
        elif self.state.global_step and self.is_world_process_zero():
            self.write_card(Path(output_dir or self.args.output_dir))

    def init_hf_repo(self, token: str | None = None) -> None:
        """Create the repo, or say at once that it cannot be: before training, nothing is lost by stopping.

        Raises:
            PushError: the Hub refuses (token, permission, name); one that does not answer is only warned about.
        """
        if not self.is_world_process_zero():
            return
        output = Path(self.args.output_dir)
        name = self.args.hub_model_id or output.absolute().name
        self._destination = Destination(
            name, self.args.hub_private_repo, self.args.hub_revision, token or self.args.hub_token
        )
        try:
            self._destination = self._destination.create(output)
        except PushError as error:
            if error.final:
                raise
            logger.warning("%s Training goes on; every push tries again.", error)
        self.hub_model_id = self._destination.repo_id

    def push_to_hub(
        self,
        repo_id: str | None = None,
        commit_message: str = "End of training",
        *,
        tags: str | Sequence[str] | None = None,
        revision: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        **_: Any,
    ) -> str | None:
        """Save the policy, write its card and report, and push the whole folder in one commit.

        Args:
            repo_id: user/name; by default `args.hub_model_id`, or the name of `args.output_dir`.
            commit_message: of the commit.
            tags: git tags to set on the commit, e.g. "v1.0".
            revision: branch; by default `args.hub_revision`, or main.
            private: whether a new repo is private.
            token: of the Hub; by default `args.hub_token`, or the one that `hf auth login` stored.

        Returns:
            the address of the commit on the main process, None on the others.

        Raises:
            PushError: it did not get through; the folder is complete, and the message has the command to push it.
        """
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        args, output = self.args, Path(self.args.output_dir)
        known = self._destination
        destination = Destination(
            repo_id or (known.repo_id if known else None) or args.hub_model_id or output.absolute().name,
            args.hub_private_repo if private is None else private,
            revision or args.hub_revision,
            token or args.hub_token,
        )
        self._destination = destination.create(output)
        self.write_card(output)
        for sentence in local_needs(output):
            logger.warning("%s", sentence)
        self.callback_handler.on_push_begin(args, self.state, self.control)
        names = [tags] if isinstance(tags, str) else list(tags or ())
        return str(self._destination.push(output, commit_message, tags=names).commit_url)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push a checkpoint whole, in the background; a push that fails is reported and training goes on."""
        args, strategy = self.args, self.args.hub_strategy
        if not self.is_world_process_zero() or strategy == HubStrategy.END or self._destination is None:
            return
        if not all(push.done() for push in self._pushes) and not args.hub_always_push:
            return
        self._finish_current_push()
        self.callback_handler.on_push_begin(args, self.state, self.control)
        output, checkpoint = Path(args.output_dir), Path(checkpoint_folder)
        message = f"Training in progress, step {self.state.global_step}"
        extra = [path for name in (DYNAMICS_FILE, EVALUATION_FILE) if (path := output / name).is_file()]
        try:
            self._destination = self._destination.create(output)
            folder = stage([*published_files(checkpoint), *extra], output)
            self.write_card(folder)
            self._pushes = (self._destination.push_later(folder, message),)
            if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
                name = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else checkpoint.name
                whole = stage((path for path in sorted(checkpoint.iterdir()) if path.is_file()), output)
                state = self._destination.push_later(whole, f"{message}, trainer state", path_in_repo=name)
                self._pushes = (*self._pushes, state)
        except (PushError, OSError, ValueError) as error:
            logger.warning("%s Training goes on.", error)

    def _finish_current_push(self) -> None:
        """Wait for the pushes in the background, and report what failed without stopping anything."""
        pushes, self._pushes = self._pushes, ()
        for push in pushes:
            try:
                error = push.exception(PATIENCE)
            except TimeoutError:
                logger.warning(
                    "A push to %s still runs after %d s and is no longer waited for.", self.hub_model_id, PATIENCE
                )
                continue
            if error is not None:
                logger.warning("%s Training goes on.", error)
