"""`RunPublisher`: the card, complete pushes in the course of training, and the final one.

transformers' Trainer would push a card about another kind of model, leave the scorer and the processors out of pushes
during training, and upload its pickled arguments with the token in them.
"""

import logging
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitInfo
from transformers.trainer_utils import HubStrategy, SchedulerType

from ptr_hf.publishing.card_facts import CardFacts, Evaluation
from ptr_hf.publishing.push import Destination, PushError, local_needs, published_files, remove_staged, stage
from ptr_hf.report.chunk_scores import SCORES_FILE, read_scores
from ptr_hf.report.dynamics import DYNAMICS_FILE, Dynamics, read_dynamics
from ptr_hf.report.evaluation import effective_sample_share, main_run, weight_shares
from ptr_hf.report.files import REPORT_FILE, beside_the_run
from ptr_hf.training.evaluation import EVALUATION_FILE, read_evaluations

if TYPE_CHECKING:
    from ptr_hf.training.trainer import PTRTrainer

PATIENCE = 600
"""Seconds that the end of training waits for a push in the background: the client itself waits for an answer for ever."""

logger = logging.getLogger(__name__)


class RunPublisher:
    """Publishes a run whole: policy, processors, `ptr_*`, card and report.

    Args:
        trainer: whose run it is.
        random_weights: whether the policy started from a configuration alone.
    """

    def __init__(self, trainer: "PTRTrainer", random_weights: bool) -> None:
        self._trainer = trainer
        self._random_weights = random_weights
        self._destination: Destination | None = None
        self._pushes: tuple[Future[CommitInfo], ...] = ()

    # ---- card and report ---------------------------------------------------------------------------------------------

    def card_facts(self, repo_id: str | None = None) -> CardFacts:
        """What is known of the run so far; what is not known stays out of the card."""
        from ptr_hf.publishing.model_card import policy_facts

        trainer, args = self._trainer, self._trainer.args
        output = Path(args.output_dir)
        shares: dict[str, Any] = {}
        if (output / SCORES_FILE).is_file():
            with beside_the_run(f"The card leaves {SCORES_FILE} out"):
                scores = read_scores(output / SCORES_FILE)
                shares = {
                    "task_shares": weight_shares(scores, "task"),
                    "source_shares": weight_shares(scores, "source"),
                    "effective_sample_size": effective_sample_share(scores),
                }
        return policy_facts(
            trainer.policy,
            random_weights=self._random_weights,
            data=trainer.training_data,
            steps=trainer.state.global_step or None,
            settings={
                "steps": trainer.state.global_step,
                "segments per step, all processes": args.segments_per_step,
                "processes": args.world_size,
                "learning rate": args.learning_rate,
                "schedule": SchedulerType(args.lr_scheduler_type).value,
                "weight decay": args.weight_decay,
                "precision": args.mixed_precision if args.mixed_precision != "no" else "float32",
                "seed": args.seed,
            },
            dynamics=self._dynamics(),
            evaluations=self._evaluations(),
            license=args.license,
            repo_id=repo_id,
            **shares,
        )

    def _dynamics(self) -> Dynamics | None:
        path = Path(self._trainer.args.output_dir) / DYNAMICS_FILE
        with beside_the_run("Card and report say nothing of the training's dynamics"):
            return read_dynamics(path) if path.is_file() else None
        return None

    def _evaluations(self) -> list[Evaluation]:
        names = ("environment", "task", "episodes", "success", "standard_error", "step")
        with beside_the_run("The card leaves the evaluations out"):
            rows = read_evaluations(self._trainer.args.output_dir)
            known: list[dict[str, Any]] = [{name: row.get(name) for name in names} for row in rows]
            return [Evaluation(**row) for row in known]
        return []

    def write_card(self, folder: Path) -> None:
        """Write the run's report, and README.md with its figures, into a folder; what fails is reported and costs itself alone.

        A report in the folder that is newer than the dynamics and the scores stays: whoever wrote it may have known more, such as
        results, the truth about the data or another run beside this one.
        """
        # they draw, and what draws is imported when there is something to draw
        from ptr_hf.publishing.model_card import write_model_card
        from ptr_hf.report.page import write_report

        config, dynamics = self._trainer.policy.config, self._dynamics()
        if dynamics is not None and dynamics.runs and not self._is_reported(folder):
            with beside_the_run("The report could not be written"):
                report = write_report(
                    folder,
                    dynamics=dynamics,
                    hyperparameters=config.hyperparameters(),
                    chance=dynamics.chance(main_run(dynamics)),
                    weights=config.weights_record or None,
                )
                logger.info("report written to %s", report)
        with beside_the_run("The card could not be written"):
            write_model_card(self.card_facts(self._destination.repo_id if self._destination else None), folder)

    def _is_reported(self, folder: Path) -> bool:
        report, output = folder / REPORT_FILE, Path(self._trainer.args.output_dir)
        drawn = [path.stat().st_mtime_ns for name in (DYNAMICS_FILE, SCORES_FILE) if (path := output / name).is_file()]
        return report.is_file() and report.stat().st_mtime_ns >= max(drawn, default=0)

    # ---- pushes ------------------------------------------------------------------------------------------------------

    def after_save(self, folder: Path) -> None:
        """Publish what `save_model` has written, or leave card and report beside it; what fails is reported, not raised.

        Args:
            folder: where the policy of the run was saved.
        """
        trainer = self._trainer
        if trainer.args.push_to_hub:
            try:
                self.push("Model save")
            except PushError as error:
                logger.warning("%s", error)
        elif trainer.state.global_step and trainer.is_world_process_zero():
            self.write_card(folder)

    def create_repo(self, token: str | None = None) -> None:
        """Create the repo, or say at once that it cannot be: before training, nothing is lost by stopping.

        Raises:
            PushError: the Hub refuses (token, permission, name); one that does not answer is only warned about.
        """
        if not self._trainer.is_world_process_zero():
            return
        self._destination = self._named() if token is None else replace(self._named(), token=token)
        try:
            self._destination = self._destination.create(Path(self._trainer.args.output_dir))
        except PushError as error:
            if error.final:
                raise
            logger.warning("%s Training goes on; every push tries again.", error)
        self._trainer.hub_model_id = self._destination.repo_id

    def push(self, message: str, tags: Sequence[str] = (), **where: Any) -> str | None:
        """As `PTRTrainer.push_to_hub`, with the fields of `Destination` that differ from the arguments' as keywords."""
        trainer, output = self._trainer, Path(self._trainer.args.output_dir)
        trainer.save_model(_internal_call=True)
        if not trainer.is_world_process_zero():
            return None
        self.finish()
        given = {name: value for name, value in where.items() if value is not None}
        self._destination = replace(self._named(), **given).create(output)
        self.write_card(output)
        for sentence in local_needs(output):
            logger.warning("%s", sentence)
        trainer.callback_handler.on_push_begin(trainer.args, trainer.state, trainer.control)
        return str(self._destination.push(output, message, tags=tags).commit_url)

    def _named(self) -> Destination:
        """Where the arguments send the run."""
        args, known = self._trainer.args, self._destination
        name = known.repo_id if known else args.hub_model_id or Path(args.output_dir).absolute().name
        return Destination(name, args.hub_private_repo, args.hub_revision, args.hub_token)

    def push_checkpoint(self, checkpoint: Path) -> None:
        """Push a checkpoint whole, in the background; a push that fails is reported and training goes on."""
        trainer, args, strategy = self._trainer, self._trainer.args, self._trainer.args.hub_strategy
        if not trainer.is_world_process_zero() or strategy == HubStrategy.END or self._destination is None:
            return
        if not all(push.done() for push in self._pushes) and not args.hub_always_push:
            return
        self.finish()
        trainer.callback_handler.on_push_begin(args, trainer.state, trainer.control)
        output = Path(args.output_dir)
        message = f"Training in progress, step {trainer.state.global_step}"
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

    def tidy(self) -> None:
        """Before a run: finish the last one's pushes, and delete what a killed run has staged."""
        self.finish()
        remove_staged(Path(self._trainer.args.output_dir))

    def finish(self) -> None:
        """Wait for the pushes in the background, and report what failed without stopping anything."""
        pushes, self._pushes = self._pushes, ()
        for push in pushes:
            try:
                error = push.exception(PATIENCE)
            except TimeoutError:
                logger.warning(
                    "A push to %s still runs after %d s and is no longer waited for.",
                    self._trainer.hub_model_id,
                    PATIENCE,
                )
                continue
            if error is not None:
                logger.warning("%s Training goes on.", error)
