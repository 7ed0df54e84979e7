"""The callbacks of every run: what follows an optimiser step, the progress bar, and TensorBoard on a disk that may be full."""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from accelerate.utils import set_seed
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import TensorBoardCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_callback import ProgressCallback

from ptr_hf.modeling_ptr import PTRPolicy
from ptr_hf.training.evaluation import EnvironmentSource, EvaluationCallback

if TYPE_CHECKING:
    from ptr_hf.training.trainer import PTRTrainer

logger = logging.getLogger(__name__)


def add_callbacks(trainer: "PTRTrainer", environment: EnvironmentSource | None) -> None:
    """Give a trainer its callbacks, beside `AfterStep`, and take out those of transformers' that they replace.

    Args:
        trainer: with its collaborators.
        environment: to evaluate the policy in, by the arguments `eval_env_*`; None evaluates nowhere.
    """
    # the guard starts anew before the run's own state is restored
    trainer.add_callback(trainer.guard)
    trainer.add_callback(trainer.resume)
    board = trainer.pop_callback(TensorBoardCallback)
    if isinstance(board, TensorBoardCallback):
        trainer.add_callback(RecoveringTensorBoard(board.tb_writer))
    if not trainer.args.disable_tqdm:
        trainer.remove_callback(DEFAULT_PROGRESS_CALLBACK)
        trainer.add_callback(PTRProgressCallback())
    if environment is not None:
        prefix, given = "eval_env_", vars(trainer.args)
        options = {name.removeprefix(prefix): value for name, value in given.items() if name.startswith(prefix)}
        trainer.add_callback(EvaluationCallback(trainer, environment, **options))


class AfterStep(TrainerCallback):
    """After every optimiser step, on every rank: moving average, queue, controller."""

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Give every rank noise of its own: transformers seeds all alike, and they would draw the same for other samples."""
        if args.world_size > 1:
            set_seed(args.seed + args.world_size * state.global_step, device_specific=True)

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """Update the policy."""
        assert isinstance(model, PTRPolicy)
        model.update()


class PTRProgressCallback(ProgressCallback):
    """The progress bar, with the figures one watches beside it; the full row goes to `report_to`."""

    _SHOWN = (("loss_action", "action"), ("accuracy", "acc"), ("score", "T"), ("weight_mean", "w"))

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Show the latest window in the bar instead of printing rows."""
        if state.is_world_process_zero and self.training_bar is not None and logs:
            shown = {label: f"{logs[name]:.3f}" for name, label in self._SHOWN if name in logs}
            if shown:
                self.training_bar.set_postfix(shown)


class RecoveringTensorBoard(TensorBoardCallback):
    """TensorBoard, whose writer is given up when its disk is full; the next row opens a new one."""

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Open the writer."""
        self._try(super().on_train_begin, *args, **kwargs)

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Write the row, or report that it could not be written."""
        self._try(super().on_log, *args, **kwargs)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Close the writer."""
        self._try(super().on_train_end, *args, **kwargs)

    def _try(self, write: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        try:
            write(*args, **kwargs)
        except OSError as error:
            logger.error(
                f"TensorBoard's row could not be written ({error}); training goes on, and the next row tries again."
            )
            self.tb_writer = None
